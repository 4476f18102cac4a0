"""Options: the fields of a config dataclass, each with its flag's help and the values that it may have.

A field's name, default, help and rule are written once, where it is declared; its flag (`flags.py`), its line in the
help and the check of its value follow from them. No TensorFlow, no absl: a bad value is refused in milliseconds, and
all bad values at once.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tapedist.errors import InputError
from tapedist.text import display, plain, to_text, wrong_characters

SWITCHES = ("auto", "true", "false")
INT64_MAX = 2**63 - 1
_NUMBERS_OR_WORDS: dict[str, type] = {"float | str": float, "int | str": int}


class Default(str):
    """The word of a default, distinct from the same word of a user: a default is never an error by itself."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule for the values of an option.

    Attributes:
        allows: whether a value is valid.
        text: the rule in words, which follow the option and its value; with the fix, if it is not obvious.
    """

    allows: Callable[[Any], bool]
    text: str


ANY = Rule(lambda value: True, "")
FINITE = Rule(math.isfinite, "must be finite")
NOT_NEGATIVE = Rule(lambda v: 0 <= v < math.inf, "must be finite and not negative")
POSITIVE = Rule(lambda v: 0 < v < math.inf, "must be finite and above 0")
FRACTION = Rule(lambda v: 0 <= v < 1, "must be in [0, 1)")
NON_NEGATIVE_INT = Rule(lambda v: 0 <= v <= INT64_MAX, "must not be negative")
AT_LEAST_ONE = Rule(lambda v: 1 <= v <= INT64_MAX, "must be at least 1")
RANK_OR_NONE = Rule(lambda v: v >= -1, "must be -1 (none) or more")


def between(least: int, most: int, *, means: str = "") -> Rule:
    """A rule for integers from `least`, which may have a meaning of its own, to `most`."""
    first = f"{least} ({means})" if means else f"{least}"
    return Rule(lambda v: least <= v <= most, f"must be from {first} to {_bound(most)}")


def _bound(number: int) -> str:
    """A bound in words; those of integer types are powers of two."""
    for power in range(13, 64):
        if number - 2**power in (-1, 0):
            return f"2**{power}" + " - 1" * (number < 2**power)
    return str(number)


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    rule: Rule | None = None,
    changes_answer: bool = True,
    path: bool = False,
) -> Any:
    """A config field with the help, rule and default of its flag.

    Args:
        default: the field's default.
        help: one sentence; it becomes the flag's help text.
        choices: the allowed words, for an enumeration.
        rule: the allowed values; for text, by default, printable characters.
        changes_answer: whether another value may change the fitted parameters. Only such fields enter
            `TrainConfig.fingerprint`, so only they are compared with a stored run on resume.
        path: whether it may name a file, so that its flag takes `~` for the home folder.
    """
    metadata = {"help": help, "choices": choices, "rule": rule, "changes_answer": changes_answer, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A dataclass whose fields are made by `option`, validated on construction.

    Raises:
        InputError: if any field or combination is invalid; `problems` lists every one of them.
    """

    def __post_init__(self) -> None:
        # Rules compare numbers, so they are applied only if all types are right.
        problems = list(self._wrong_types()) or [*self._wrong_values(), *self._wrong_combinations()]
        if problems:
            raise InputError(*problems)

    def _wrong_types(self) -> Iterator[str]:
        """Converts each field to exactly its type, and yields an error for each value that cannot be converted."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), _kind(field)
            try:
                object.__setattr__(self, field.name, _coerced_field(value, field))
            except (TypeError, ValueError, OverflowError):
                listed = "a list of numbers" if field.type == "tuple[float, ...]" else "a list of names"
                wanted = listed if kind is tuple else f"of type {kind.__name__}"
                given = type(value).__name__
                yield f"--{field.name}={display(repr(value))}: must be {wanted}, not {given}{_hint(value, kind)}"

    def _wrong_values(self) -> Iterator[str]:
        for field in dataclasses.fields(self):
            yield from _wrong_value(field, getattr(self, field.name))

    def _wrong_combinations(self) -> Iterator[str]:
        """Yields errors between fields; each field may be wrong by itself, too."""
        return iter(())


def _coerced_field(value: Any, field: dataclasses.Field[Any]) -> Any:
    """`value` as the field's type; a library user may pass a bool for a switch, and one name without a list."""
    value = plain(value)
    if field.metadata["choices"] == SWITCHES and isinstance(value, bool):
        return to_text(value)
    if field.type in _NUMBERS_OR_WORDS and isinstance(value, str):
        return value
    if field.type == "tuple[str, ...]":
        return tuple(_coerced(item, str) for item in _items(value))
    return _coerced(value, _kind(field))


def _kind(field: dataclasses.Field[Any]) -> type:
    return _NUMBERS_OR_WORDS.get(str(field.type)) or type(field.default)


def _coerced(value: Any, kind: type) -> Any:
    """`value` as exactly `kind`, if nothing is lost: library users pass NumPy scalars, paths and lists.

    Raises:
        TypeError: if `value` is something else.
        OverflowError: if it is too large for a float.
    """
    value = plain(value)
    if kind is tuple:
        return tuple(_coerced(item, float) for item in _items(value))
    if kind is str and not isinstance(value, bytes):
        return str.__str__(os.fspath(value))  # A text enumeration overrides `__str__`.
    # After `plain`, only arrays and NumPy's complex numbers and time spans have a `dtype`.
    if (kind is bool) != isinstance(value, bool) or isinstance(value, (str, bytes)) or hasattr(value, "dtype"):
        raise TypeError
    return operator.index(value) if kind is int else kind(value)


def _hint(value: Any, kind: type) -> str:
    """The fix for a whole number that is a float."""
    number = plain(value)
    whole = kind is int and isinstance(number, float) and number.is_integer() and abs(number) <= INT64_MAX
    return f"; give {int(number)}" if whole else ""


def _items(value: Any) -> Sequence[Any]:
    """The items of a list, or of an array or column of one dimension; anything else is one item."""
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        return list(value.to_numpy() if hasattr(value, "to_numpy") else value)
    return value if isinstance(value, (tuple, list)) else (value,)


def _wrong_value(field: dataclasses.Field[Any], value: Any) -> Iterator[str]:
    choices, rule = field.metadata["choices"], field.metadata["rule"]
    if choices:
        if value not in choices:
            yield f"--{field.name}={display(value)}: must be one of {', '.join(choices)}"
    elif rule:
        if not rule.allows(value):
            yield f"--{field.name}={display(value)}: {rule.text}"
    else:
        for word in value if isinstance(value, tuple) else (value,):
            if isinstance(word, str) and (problem := wrong_characters(word)):
                yield f"--{field.name}={word!r}: {problem}"
