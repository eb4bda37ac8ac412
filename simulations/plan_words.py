"""How a plan tells numbers to people."""


def number(value: float) -> str:
    """Three digits, and whole from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
