"""Epsilon against rounds, under each privacy model, as a picture."""

import io
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from common.errors import ConfigError
from common.files import write_atomically
from simulations.plan import Plan
from simulations.plan_question import ALONE, CENTRAL, DISTRIBUTED, LOCAL
from simulations.plan_words import in_rounds, number

DOTS_PER_INCH = 120
POINTS = 33
# Rounds beyond the plan's that are drawn, as a multiple; epsilons beyond which nothing is drawn.
BEYOND = 10
# Between two names at the right, as a share of the height.
APART = 0.06
LEAST_EPSILON, MOST_EPSILON = 0.01, 1e4
STYLES = {
    CENTRAL: ("#1b6ca8", "-"),
    DISTRIBUTED: ("#2a9d5c", (0, (6, 2))),
    LOCAL: ("#d1495b", "-"),
    ALONE: ("#7a7a7a", "-."),
}


def draw(path: Path, plan: Plan) -> None:
    """Write a PNG: epsilon after 1 to ten times the plan's rounds for the noise on the mean that the plan has.

    Raises ConfigError where there are no rounds, OSError where it cannot be written.
    """
    if not plan.rounds:
        raise ConfigError("num-rounds = 0: there is no epsilon against rounds to draw; leave out --out, or give rounds")
    figure = Figure(figsize=(8.4, 5.0), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.115, 0.72, 0.72))
    rounds = np.unique(np.geomspace(1, BEYOND * plan.rounds, POINTS).round().astype(int))
    curves = {model: np.array([plan.epsilon_after(model, int(count)) for count in rounds]) for model in plan.models}
    finite = np.concatenate([curve[np.isfinite(curve)] for curve in curves.values()])
    low = max(LEAST_EPSILON, 0.6 * min(finite.min(), plan.budget))
    high = min(MOST_EPSILON, 2 * max(finite.max(), plan.budget))
    axes.set(xscale="log", yscale="log", xlim=(1, rounds[-1]), ylim=(low, high))
    _budget(axes, plan)
    _curves(axes, plan, rounds, curves)
    axes.set_xlabel("rounds", fontsize=9)
    axes.set_ylabel("epsilon", fontsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
    figure.text(0.02, 0.965, _title(plan), va="top", fontsize=11, parse_math=False)
    figure.text(0.02, 0.915, _subtitle(plan), va="top", fontsize=8.5, color="#555555", parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _budget(axes: Axes, plan: Plan) -> None:
    axes.axhline(plan.budget, color="black", linewidth=1, linestyle=(0, (2, 2)))
    low = axes.get_ylim()[0]
    axes.plot([plan.rounds] * 2, [low, plan.epsilon], color="black", linewidth=0.8, linestyle=(0, (1, 2)))
    axes.plot([plan.rounds], [plan.epsilon], "o", color="black", markersize=6, zorder=5)
    axes.annotate(in_rounds(plan.rounds), (plan.rounds, low), xytext=(4, 4), textcoords="offset points", fontsize=8)


def _curves(axes: Axes, plan: Plan, rounds: np.ndarray, curves: dict[str, np.ndarray]) -> None:
    """The lines. They and the budget are named at their right ends; the names keep apart, in the lines' order."""
    low, high = axes.get_ylim()
    came = "budget" if plan.question.solved != "epsilon" else "comes to"
    names = [(plan.budget, f"{came} {number(plan.budget)}", "black")]
    for model, curve in curves.items():
        colour, style = STYLES[model]
        seen = np.where(np.isfinite(curve), curve, 1e300)
        axes.plot(rounds, seen, color=colour, linestyle=style, linewidth=1.8)
        name = "one client alone" if model == ALONE else model
        names.append((seen[-1], name if curve.min() <= high else f"{name}: over", colour))
    names.sort()
    places = [math.log(min(max(end, low), high) / low) / math.log(high / low) for end, *_ in names]
    for above in range(1, len(places)):
        places[above] = max(places[above], places[above - 1] + APART)
    places[-1] = min(places[-1], 1.0)
    for below in range(len(places) - 2, -1, -1):
        places[below] = min(places[below], places[below + 1] - APART)
    for place, (_, name, colour) in zip(places, names, strict=True):
        axes.text(1.015, place, name, transform=axes.transAxes, color=colour, fontsize=9, va="center")


def _title(plan: Plan) -> str:
    question = plan.question
    return (
        f"Epsilon against rounds: {question.persons:,.0f} {question.units} at {question.clients} "
        f"client{'s' if question.clients != 1 else ''}, {number(question.batch)} in a step"
    )


def _subtitle(plan: Plan) -> str:
    return (
        f"for the same noise on the mean update as {plan.question.model} at noise multiplier {plan.noise_multiplier:.4g} "
        f"(delta {plan.question.config.privacy.delta:g}); lower is more private"
    )
