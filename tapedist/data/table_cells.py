"""What counts as a number in a text cell, and what to say of a cell that is none."""

from __future__ import annotations

import math
import re

from tapedist.data.table_rows import INEXACT

NUMBER_PATTERN = r"[ \t]*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?[ \t]*"
_NUMBER = re.compile(NUMBER_PATTERN, re.ASCII)
_INTEGER = re.compile(r"[ \t]*[+-]?\d+[ \t]*", re.ASCII)
_MOST_SHOWN = 40

# What people and programs write for a number that is none; a column of these is still meant as numbers.
_LOOKALIKES = (
    (re.compile(r"\s*[+-]?(nan|inf|infinity)\s*", re.IGNORECASE), "is not finite"),
    (re.compile(r"\s*[+-]?[\d.]*\d,\d+([eE][+-]?\d+)?\s*"), "has a decimal or thousands comma; write a decimal point"),
    (re.compile(r"\s*[+-]?\d[\d_]*_\d[\d_.]*\s*"), "has underscores; write digits only"),
    (re.compile(r"\s*[+-]?0[xX][0-9a-fA-F]+\s*"), "is hexadecimal; write it in decimal"),
)
_BLANKS = frozenset({"", "na", "n/a", "null", "none", "#n/a"})


def number(text: str) -> tuple[float, str]:
    """The number in a cell.

    Args:
        text: the cell, unquoted.

    Returns:
        `(value, "")`, or `(nan, rule)` where the rule says what is wrong.
    """
    if _NUMBER.fullmatch(text):
        value = float(text)
        if math.isinf(value):
            return math.nan, "is beyond float64 (1.8e308)"
        if abs(value) >= 2**53 and _INTEGER.fullmatch(text) and int(value) != int(text):
            return math.nan, INEXACT
        return value, ""
    if text.strip().lower() in _BLANKS:
        return math.nan, "is blank"
    for pattern, rule in _LOOKALIKES:
        if pattern.fullmatch(text):
            return math.nan, rule
    return math.nan, "is text, not a number"


def is_blank(text: str) -> bool:
    """Whether a cell holds nothing, or a word for nothing."""
    return text.strip().lower() in _BLANKS


def meant_as_number(text: str) -> bool:
    """Whether a cell is a number or a common misspelling of one."""
    return bool(_NUMBER.fullmatch(text)) or any(pattern.fullmatch(text) for pattern, _ in _LOOKALIKES)


def quoted(text: str) -> str:
    """A cell for a message: shortened, with control characters escaped."""
    return repr(text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "...")
