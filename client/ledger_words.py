"""How a ledger's figures and names are written."""

from collections.abc import Iterable

_SHORT = 8


def number(value: float) -> str:
    """Four digits; infinity in words."""
    return "infinite" if value == float("inf") else f"{value:.4g}"


def span(values: Iterable[float]) -> str:
    """One value, or the least and the greatest of several."""
    found = sorted(set(values))
    return number(found[0]) if len(found) == 1 else f"{number(found[0])} to {number(found[-1])}"


def short(run: str) -> str:
    """The beginning of a run's name. A coordinator chose it: what cannot be printed is shown as a question mark."""
    shown = "".join(char if char.isprintable() else "?" for char in run)
    return shown if len(shown) <= _SHORT else f"{shown[:_SHORT]}..."
