"""Users' words, made safe to show: names of columns, files and runs may hold anything."""

from __future__ import annotations


def printable(word: str, longest: int | None = None) -> str:
    """`word` with control characters spelled out, as in `a\\nb`, and cut to `longest` characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in word)
    return shown if longest is None or len(shown) <= longest else shown[: longest - 1] + "…"
