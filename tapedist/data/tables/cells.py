"""What counts as a number in a text cell, and what to say of a cell that is none."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from tapedist.data.tables.reader import INEXACT

NUMBER_PATTERN = r"[ \t]*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?[ \t]*"
_NUMBER = re.compile(NUMBER_PATTERN, re.ASCII)
_INTEGER = re.compile(r"[ \t]*[+-]?\d+[ \t]*", re.ASCII)
_MOST_SHOWN = 40
_LONGEST = 100  # Of a misspelt number; patterns that go back and forth are not tried on more.

# Amounts of money, shares, and negative numbers as accountants write them, around a number with any separators.
_MONEY = "[$\u00a2\u00a3\u00a5\u20a0-\u20bf]|USD|EUR|GBP|JPY|CHF|CNY|INR|CAD|AUD|SEK|NOK|DKK|PLN|BRL"
_DIGITS = r"\d[\d.,'\u2019 \u00a0\u2009\u202f]*|[.,]\d+"
_SIGN = r"[+\-\u2212]?"
# What people and programs write for a number that is none; a column of these is still meant as numbers.
_LOOKALIKES = tuple(
    (re.compile(rf"\s*(?:{pattern})\s*", re.IGNORECASE), rule)
    for pattern, rule in (
        (r"[+-]?(nan|inf|infinity)", "is not finite"),
        (r"#(div/0!|value!|ref!|num!|name\?|null!)", "is a spreadsheet's error"),
        (
            rf"{_SIGN}\d{{1,3}}(,\d{{2,3}})*,\d{{3}}(\.\d*)?([eE][+-]?\d+)?",
            "has a thousands comma; write the digits alone (or a decimal point, if it is a decimal comma)",
        ),
        (rf"{_SIGN}[\d.]*,\d+([eE][+-]?\d+)?", "has a decimal or thousands comma; write a decimal point"),
        (r"[+-]?\d[\d_]*_\d[\d_.]*", "has underscores; write digits only"),
        (r"[+-]?0[xX][0-9a-fA-F]+", "is hexadecimal; write it in decimal"),
        (rf"{_SIGN}({_DIGITS})\s*%|%\s*{_SIGN}({_DIGITS})", "has a percent sign; write the number alone"),
        (rf"{_SIGN}\s*({_MONEY})\s*{_SIGN}({_DIGITS})", "has a currency sign; write the number alone"),
        (rf"{_SIGN}({_DIGITS})\s*({_MONEY})", "has a currency sign; write the number alone"),
        (rf"\(\s*({_MONEY})?\s*({_DIGITS})\s*\)", "has brackets for a negative number; write a minus sign"),
        (r"\u2212\d+(\.\d*)?([eE][+-]?\d+)?", "has a minus sign that is not the keyboard's; write -"),
        (
            rf"{_SIGN}\d{{1,3}}([ '\u2019\u00a0\u2009\u202f]\d{{3}})+([.,]\d*)?",
            "is text, because of the marks between its digits; write the digits alone",
        ),
        (rf"{_SIGN}\d{{1,3}}(\.\d{{3}}){{2,}}", "has thousands points; write the digits alone"),
    )
)
# Words and signs for no number, of pandas, R, Excel, databases and questionnaires.
_BLANKS = frozenset(("", "na", "n/a", "null", "none", "nil", "nat", "(null)", "\\n", "?", "-", "--", ".")) | frozenset(
    ("#n/a", "#na", "#n/a n/a", "<na>", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan")
)
_WITH_UNIT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)\s*[^\W\d_].*|[<>~]=?\s*[+-]?(\d+\.?\d*|\.\d+)", re.DOTALL)


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
        if abs(value) >= 2**53 and _INTEGER.fullmatch(text) and not _is_exact(value, text):
            return math.nan, INEXACT
        return value, ""
    if is_blank(text):
        return math.nan, "is blank"
    return math.nan, _lookalike(text) or "is text, not a number"


def _is_exact(value: float, text: str) -> bool:
    """Whether `value` is the integer in `text`, whose zeros in front may be more than Python's `int` reads."""
    return abs(int(value)) == int(text.strip().lstrip("+-").lstrip("0"))


def _lookalike(text: str) -> str:
    """The rule that a misspelt number breaks; empty if the text is none."""
    if len(text) > _LONGEST:
        return ""
    return next((rule for pattern, rule in _LOOKALIKES if pattern.fullmatch(text)), "")


def is_blank(text: str) -> bool:
    """Whether a cell holds nothing, or a word for nothing."""
    return text.strip().lower() in _BLANKS


def meant_as_number(text: str) -> bool:
    """Whether a cell is a number or a common misspelling of one."""
    return bool(_NUMBER.fullmatch(text) or _lookalike(text))


def judged(cells: Sequence[str]) -> tuple[bool, str, str]:
    """What a column holds, by some of its cells.

    Args:
        cells: those that are not blank.

    Returns:
        `(numeric, kind, doubt)`: at least half of the cells are meant as numbers; the kind in the user's words; why a
        user may take a column for numbers although it is not, or empty.
    """
    numbers = sum(map(meant_as_number, cells))
    if 2 * numbers >= len(cells):
        return True, "numbers", ""
    word = quoted(next(cell for cell in cells if not meant_as_number(cell)))
    doubt = ""
    if 10 * numbers >= len(cells):
        doubt = f"{numbers} of its first {len(cells)} cells are numbers, but most are not, like {word}"
    elif 2 * sum(bool(_WITH_UNIT.fullmatch(cell.strip())) for cell in cells) >= len(cells):
        doubt = f"its cells have words beside the numbers, like {word}"
    return False, f"text ({word})", doubt


def quoted(text: str) -> str:
    """A cell for a message: shortened, with control characters escaped."""
    return repr(text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "...")
