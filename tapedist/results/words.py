"""Words and numbers made fit to show: names of columns, files and runs may hold anything."""

from __future__ import annotations


def printable(word: str, longest: int | None = None) -> str:
    """`word` with control characters spelled out, as in `a\\nb`, and cut to `longest` characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in word)
    return shown if longest is None or len(shown) <= longest else shown[: longest - 1] + "…"


def number(value: float, digits: int = 4, *, padded: bool = False) -> str:
    """A number with a true minus sign; `padded`: with its zeros, as a measured one is told (`1.000`)."""
    text = f"{value:#.{digits}g}".removesuffix(".") if padded else f"{value:.{digits}g}"
    if 1e4 <= abs(value) < 1e7:
        text = f"{value:,.0f}"  # As on the axes of figures.
    return text.replace("-", "\N{MINUS SIGN}")
