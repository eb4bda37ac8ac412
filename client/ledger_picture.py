"""Epsilon against charges, run by run, as a picture."""

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from client.ledger_summary import RunSpent, Spending
from client.ledger_words import number, short
from common.errors import ConfigError
from common.files import write_atomically

DOTS_PER_INCH = 120
MAX_NAMED = 14
COLOURS = ("#1b6ca8", "#2a9d5c", "#e08e1b", "#7b4fa3", "#17a2b8", "#8c6d46", "#c2568c", "#6b7a8f")
ALARM = "#c8102e"


def draw(path: Path, spending: Spending, max_epsilon: float | None = None) -> None:
    """Write a PNG for its owner alone (0600): epsilon after each charge in the colour of its run.

    max_epsilon: the owner's budget, drawn as a line. Raises ConfigError where nothing was charged, OSError where it
    cannot be written.
    """
    if not spending.charges:
        raise ConfigError("nothing was charged to this ledger: there is nothing to draw yet; leave out --out")
    figure = Figure(figsize=(8.8, 4.6), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.12, 0.67, 0.73))
    charged = len(spending.charges)
    top = max(spending.charges[-1].epsilon, max_epsilon or 0.0)
    axes.set(xlim=(0, charged * 1.02), ylim=(0, 1.12 * top or 1.0))
    colours = {run.run: COLOURS[place % len(COLOURS)] for place, run in enumerate(spending.runs)}
    _curve(axes, spending, colours)
    if max_epsilon is not None:
        axes.axhline(max_epsilon, color="black", linewidth=1, linestyle=(0, (2, 2)))
        _at_the_line(axes, 0.01, max_epsilon, f"budget {number(max_epsilon)}", "black")
    after = sum(charge.line < (spending.rolled_back or 0) for charge in spending.charges)
    if spending.rolled_back is not None:
        axes.axvline(after, color=ALARM, linewidth=1.5)
    _names(figure, spending, colours)
    axes.set_xlabel("charges, one a round", fontsize=9)
    axes.set_ylabel("epsilon", fontsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.text(0.02, 0.965, _title(spending), va="top", fontsize=11, parse_math=False)
    subtitle, colour = _subtitle(spending)
    figure.text(0.02, 0.912, subtitle, va="top", fontsize=8.5, color=colour, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue(), private=True)


def _curve(axes: Axes, spending: Spending, colours: dict[str, str]) -> None:
    """A staircase: up at each charge, level until the next. One line for each stretch of charges of one run."""
    epsilons = np.array([0.0, *(charge.epsilon for charge in spending.charges)])
    runs = [charge.run for charge in spending.charges]
    starts = [0, *(place for place in range(1, len(runs)) if runs[place] != runs[place - 1])]
    for start, end in zip(starts, [*starts[1:], len(runs)], strict=True):
        places = np.arange(start, end + 1)
        axes.step(places, epsilons[places], where="post", color=colours[runs[start]], linewidth=2)


def _at_the_line(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.annotate(
        text,
        (x, y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        color=colour,
    )


def _names(figure: Figure, spending: Spending, colours: dict[str, str]) -> None:
    """Which colour is which run, at the right; the last runs where there are many."""
    shown = spending.runs[-MAX_NAMED:]
    lines = [Line2D([], [], color=ALARM if run.unprotected else colours[run.run], linewidth=2) for run in shown]
    names = [_name(run) for run in shown]
    if len(shown) < len(spending.runs):
        lines.insert(0, Line2D([], [], linewidth=0))
        names.insert(0, f"{len(spending.runs) - len(shown)} earlier runs")
    if spending.rolled_back is not None:
        lines.append(Line2D([], [], color=ALARM, linewidth=1.5))
        names.append("rolled back here")
    legend = figure.legend(
        lines,
        ["." for _ in lines],
        loc="upper left",
        bbox_to_anchor=(0.765, 0.86),
        fontsize=8,
        frameon=False,
        borderpad=0,
        handlelength=1.2,
    )
    # Set afterwards: in a label, matplotlib would take $ for mathematics and _ for something to hide.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def _name(run: RunSpent) -> str:
    return f"{short(run.run)}, " + ("no privacy" if run.unprotected else f"{len(run.charges):,} rounds")


def _title(spending: Spending) -> str:
    report = spending.report
    spent = "no epsilon holds after" if report.unprotected else f"epsilon {number(report.epsilon)} spent in"
    return f"ledger {report.public_key[:16]}: {spent} {report.rounds:,} charges"


def _subtitle(spending: Spending) -> tuple[str, str]:
    report = spending.report
    if report.problem is not None:
        return "not to be trusted: it does not verify", ALARM
    if spending.rolled_back is not None:
        return "rolled back: what was spent after the copy was made is missing", ALARM
    if report.unprotected:
        return "a run without any privacy saw these faces: no epsilon holds for them", ALARM
    return f"at the ledger's RDP order {report.order:g}, delta {report.delta:g}", "#555555"
