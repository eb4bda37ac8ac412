"""How a plan tells numbers to people."""


def number(value: float) -> str:
    """Three digits, and whole from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def in_rounds(count: int) -> str:
    """`1 round`, `20 rounds`."""
    return "1 round" if count == 1 else f"{count:,} rounds"
