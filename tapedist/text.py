"""Conversion of values to text and back, for flags, flagfiles, messages and files."""

from __future__ import annotations

import csv
import enum
import io
import math
import re
import unicodedata
from collections.abc import Callable
from typing import Any

_MAX_SHOWN = 60


def display(value: Any) -> str:
    """`value` as an error message may show it: short, on one line, without control characters."""
    try:
        text = to_text(value)
    except ValueError:  # Python refuses to print an int of more than 4,300 digits in decimal.
        text = hex(value)
    text = _short(text)
    return text if text.isprintable() else repr(text)


def quoted(text: str) -> str:
    """A user's word in quotes, for a sentence."""
    return repr(_short(text))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


def plain(value: Any) -> Any:
    """Converts a scalar of NumPy, an array without dimensions, or a member of an enumeration to its Python value.

    Anything else is returned as it is. A float32 becomes its shortest decimal number: `np.float32(0.1)` is 0.1.
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if getattr(value, "shape", None) != ():
        return value
    if hasattr(value, "numpy"):  # A tensor of TensorFlow or PyTorch.
        return plain(value.numpy())
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    if kind == "f":
        return float(str(value[()]) if value.dtype.itemsize < 8 else value)
    return value.item() if kind in ("b", "i", "u", "U") else value


def wrong_characters(text: str) -> str:
    """The rule that the characters of a user's word break, and the fix; empty if it can be typed and stored.

    Blanks of every language are allowed inside: columns have such names.
    """
    if text.isprintable() and text == text.strip():
        return ""
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "is not UTF-8; rename it"
    if text != text.strip() or any(unicodedata.category(c) == "Cc" for c in text):
        return "must not hold control characters, nor blanks at its ends; rename it"
    return ""


def to_text(value: Any) -> str:
    """Converts `value` to the text of a flag; the functions of `READERS` read it back.

    Args:
        value: a bool, int, float, str, or a tuple of them.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        words, line = [to_text(item) for item in value], io.StringIO()
        bare = all(word == word.strip() for word in words)  # Unquoted words lose blanks at their ends when read.
        csv.writer(line, lineterminator="", quoting=csv.QUOTE_MINIMAL if bare else csv.QUOTE_ALL).writerow(words)
        return line.getvalue()
    return value if isinstance(value, str) else repr(value)


def _parse_bool(text: str) -> bool:
    words = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
    if text.lower() not in words:
        raise ValueError("must be true or false")
    return words[text.lower()]


def _parse_int(text: str) -> int:
    """Reads 12, -3, 1_000_000 and, because rows come in billions, 1e9."""
    if match := re.fullmatch(r"([+-]?\d{1,20})[eE]\+?(\d{1,2})", text):
        return int(match[1]) * 10 ** int(match[2])
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _parse_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("must be a number") from None
    if math.isinf(value) and "inf" not in text.lower():
        raise ValueError("must be a number of at most 1.7e308 in size")
    return value


def _parse_float_or_word(text: str) -> float | str:
    return text if text.isalpha() and text.lower() not in ("nan", "inf", "infinity") else _parse_float(text)


def _parse_int_or_word(text: str) -> int | str:
    return text if text.isalpha() else _parse_int(text)


def _parse_floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(_parse_float(item) for item in text.split(","))
    except ValueError:
        raise ValueError("must be numbers separated by commas, like 9 or 9,-2.5") from None


def _parse_names(text: str) -> tuple[str, ...]:
    try:
        names = next(csv.reader([text], strict=True, skipinitialspace=True), [])
    except csv.Error:
        raise ValueError('must be names separated by commas, like x or x,"y, z"') from None
    return tuple(names if '"' in text else [name.strip() for name in names])  # Quotes keep a name as it is.


# The reader of a field, by its annotation as written. It raises ValueError with the rule that the text breaks.
READERS: dict[str, Callable[[str], Any]] = {
    "bool": _parse_bool,
    "int": _parse_int,
    "float": _parse_float,
    "float | str": _parse_float_or_word,
    "int | str": _parse_int_or_word,
    "str": str,
    "tuple[float, ...]": _parse_floats,
    "tuple[str, ...]": _parse_names,
}


def printable(word: str, longest: int | None = None) -> str:
    """`word` with control characters spelled out, as in `a\\nb`, and cut to `longest` characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in word)
    return shown if longest is None or len(shown) <= longest else shown[: longest - 1] + "…"


def number(value: float, digits: int = 4, *, padded: bool = False) -> str:
    """A number with a true minus sign; `padded`: with trailing zeros, for measured ones (`1.000`)."""
    text = f"{value:#.{digits}g}".removesuffix(".") if padded else f"{value:.{digits}g}"
    if 1e4 <= abs(value) < 1e7:
        text = f"{value:,.0f}"  # As on the axes of figures.
    return text.replace("-", "\N{MINUS SIGN}")
