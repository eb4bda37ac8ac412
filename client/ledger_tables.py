"""What a ledger says, in tables and as JSON or CSV."""

import csv
import io
import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.ledger_summary import RunSpent, Spending
from client.ledger_words import number, short, span
from common.privacy.ledger_file import FILE_NAME, HEAD_NAME
from common.privacy.ledger_report import Charge, LedgerReport

_COLUMNS = (
    "line",
    "run",
    "round",
    "mechanism",
    "noise_multiplier",
    "sample_rate",
    "steps",
    "epsilon_after",
    "answered",
)


def as_dict(spending: Spending, max_epsilon: float | None) -> dict[str, Any]:
    """All that `show` says as JSON takes it; what is infinite is null, and `unprotected` says why."""
    report = spending.report
    return {
        **report_dict(report),
        "problem": report.problem,
        "line": report.line,
        "max_epsilon": max_epsilon,
        "rolled_back": spending.rolled_back,
        "moved": spending.moved,
        "runs": [
            {
                "run": run.run,
                "charged": len(run.charges),
                "answered": run.answered,
                "unprotected": run.unprotected,
                "epsilon_after": _finite(run.epsilon),
                "epsilon_after_prv": run.tight_epsilon,
                "mechanisms": {
                    name: {
                        "steps": sum(release.steps for release in releases),
                        "noise_multipliers": sorted({release.noise_multiplier for release in releases}),
                        "sample_rates": sorted({release.sample_rate for release in releases}),
                    }
                    for name, releases in run.mechanisms.items()
                },
            }
            for run in spending.runs
        ],
    }


def report_dict(report: LedgerReport) -> dict[str, Any]:
    """The figures of a report; what is infinite is null."""
    return {
        "path": str(report.path),
        "public_key": report.public_key,
        "records": report.records,
        "charged": report.rounds,
        "answered": report.answered,
        "unprotected": report.unprotected,
        "order": report.order,
        "delta": report.delta,
        "epsilon": _finite(report.epsilon),
        "epsilon_recomputed": _finite(report.recomputed_epsilon),
        "adopted": report.copies,
        "torn": report.torn,
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def print_spending(console: Console, spending: Spending, max_epsilon: float | None) -> None:
    """The table of the runs, what is wrong in red above it, the total below."""
    report = spending.report

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(f"{escape(str(report.path))}\nledger {escape(report.public_key)}, {report.records:,} records")
    if report.problem is not None:
        where = f"line {report.line}: " if report.line else ""
        say(f"[bold red]not to be trusted:[/] [red]{where}{escape(report.problem)}[/]")
    if spending.rolled_back is not None:
        say(
            f"[bold red]rolled back:[/] [red]a coordinator's witness showed it (line {spending.rolled_back}). What was spent since the "
            "copy was made is missing below, and this client trains no more[/]"
        )
    if spending.moved and spending.has_key:
        say(
            "[bold red]moved:[/] [red]it lies elsewhere than it says, so a client refuses it: see `visard ledger adopt`[/]"
        )
    elif spending.moved:
        say("a copy for reading: no client uses it")
    if report.copies:
        say(f"[yellow]adopted {report.copies} times:[/] its owner vouched each time that no other copy was in use")
    if spending.runs:
        console.print(_table(spending.runs))
    say(_total(report, max_epsilon))


def _total(report: LedgerReport, max_epsilon: float | None) -> str:
    if report.unprotected:
        return "[bold red]a run without any privacy saw these faces: no epsilon holds for them[/]"
    if report.order is None or report.delta is None:
        return "nothing was charged"
    text = f"epsilon {number(report.epsilon)} spent (delta {report.delta:g}, at RDP order {report.order:g}, fixed at the first charge)"
    if max_epsilon is None:
        return text
    share = f" of {number(max_epsilon)}, {report.epsilon / max_epsilon:.0%}"
    return f"[red]{text}{share}[/]" if report.epsilon > max_epsilon else text + share


def _table(runs: tuple[RunSpent, ...]) -> Table:
    """A row a run; a line of it a mechanism."""
    tight = any(run.tight_epsilon is not None for run in runs)
    table = Table(padding=0)
    for name in ("run", "charged", "answered", "mechanism", "steps", "noise", "sample rate", "epsilon after"):
        table.add_column(name, justify="left" if name in ("run", "mechanism") else "right")
    if tight:
        table.add_column("by PRV", justify="right")
    for run in runs:
        kinds = run.mechanisms.values()
        cells = [
            escape(short(run.run)),
            f"{len(run.charges):,}",
            f"{run.answered:,}",
            "no privacy" if run.unprotected else "\n".join(run.mechanisms),
            "\n".join(f"{sum(release.steps for release in releases):,}" for releases in kinds),
            "\n".join(span(release.noise_multiplier for release in releases) for releases in kinds),
            "\n".join(span(release.sample_rate for release in releases) for releases in kinds),
            number(run.epsilon),
        ]
        if tight:
            cells.append("" if run.tight_epsilon is None else number(run.tight_epsilon))
        table.add_row(*cells, style="red" if run.unprotected else None)
    return table


def print_checked(console: Console, report: LedgerReport, compared: bool) -> None:
    """What was checked and what was not. compared: a public key was given."""
    lines = [str(report.path), f"ledger {report.public_key}" + (", the key that was given" if compared else "")]
    lines.append(f"checked: {report.records:,} lines, that each follows the one before and is signed by this key")
    if report.order is not None:
        lines.append(
            f"checked: the sums of {report.rounds:,} charges, {report.answered:,} of them answered, at order {report.order:g}: epsilon "
            f"{number(report.epsilon)}, computed again {number(report.recomputed_epsilon)}"
        )
    if report.path.name == FILE_NAME and report.path.with_name(HEAD_NAME).exists():
        lines.append("checked: the signed head beside it, that no line is missing at the end")
    else:
        lines.append("not checked: there is no head beside it, so lines missing at the end do not show")
    if not compared:
        lines.append(
            "not checked: whose ledger it is. Give --public-key as its owner told it, or another ledger would pass"
        )
    if report.torn:
        lines.append(
            f"{report.torn} bytes of a last line without its end: never acknowledged, the client takes them away"
        )
    lines.append("not to be had from the files: whether this is the newest copy. Only a coordinator's witness knows")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _rows(found: list[Charge]) -> list[dict[str, Any]]:
    return [
        {
            "line": charge.line,
            "run": charge.run,
            "round": charge.server_round,
            "mechanism": charge.release.mechanism,
            "noise_multiplier": charge.release.noise_multiplier,
            "sample_rate": charge.release.sample_rate,
            "steps": charge.release.steps,
            "epsilon_after": _finite(charge.epsilon),
            "answered": charge.answered,
        }
        for charge in found
    ]


def charges_json(found: list[Charge]) -> str:
    """The charges as JSON, one object each."""
    return json.dumps(_rows(found), indent=1)


def charges_csv(found: list[Charge]) -> str:
    """The charges as CSV (RFC 4180), a row a charge under a row of names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS)
    writer.writeheader()
    writer.writerows(_rows(found))
    return text.getvalue()
