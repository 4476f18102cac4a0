"""What a table reader gives: batches of rows for the one scan at opening, and segments for reading them again.

A new file format implements `TableReader`; everything after it (checks, split, caching) is the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from tapedist.data.tables.columns import Column


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell as a message shows it.

    Attributes:
        where: `file:line:column`, or `file:row N:column` for files without lines.
        value: what stands there; empty where there is not even a number's type.
        rule: what is wrong with the text; empty if it is a number.
    """

    where: str
    value: str
    rule: str = ""


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """Consecutive rows.

    Attributes:
        columns: one array `[k]` of numbers a column; NaN where a cell is no number.
        explain: `(row of this batch, position of the column)` -> the cell, for an error message.
    """

    columns: Sequence[np.ndarray]
    explain: Callable[[int, int], Cell]


class SegmentStore(Protocol):
    """Rows that can be read again in segments.

    Attributes:
        starts: int64 `[segments + 1]`: the first row of each segment, and the number of rows.
        row_bytes: memory of one row of a loaded segment.
    """

    row_bytes: int

    @property
    def starts(self) -> np.ndarray: ...

    def load(self, segment: int) -> Sequence[np.ndarray]:
        """One array `[rows]` a column."""


class TableReader(Protocol):
    """A table in some file format.

    Attributes:
        columns: the header.
        default_target: the target that the format itself marks, or empty.
        default_weight: the weight that goes with it, or empty.
        default_features: the features that go with it; empty means all other numeric columns.
    """

    columns: tuple[Column, ...]
    default_target: str
    default_weight: str
    default_features: tuple[str, ...]

    def batches(self, names: Sequence[str]) -> Iterator[RowBatch]:
        """All rows in order, in batches of bounded memory."""

    def segments(self, names: Sequence[str]) -> SegmentStore | None:
        """The rows in place, or None if this format cannot be read from the middle."""

    def check_unchanged(self) -> None:
        """Raises StateError if a file changed since it was opened."""


def inexact_integers(values: np.ndarray) -> np.ndarray:
    """Which integers have no equal float64; only some beyond 2**53 in magnitude.

    Args:
        values: an integer array.

    Returns:
        A boolean array of its shape.
    """
    if not values.size or (int(values.max()) <= 2**53 and int(values.min()) >= -(2**53)):
        return np.zeros(values.shape, bool)
    rounded = values.astype(np.float64)
    inside = rounded < float(np.iinfo(values.dtype).max)  # The maximum itself rounds up, out of the type.
    exact = np.zeros(values.shape, bool)
    exact[inside] = rounded[inside].astype(values.dtype) == values[inside]
    return ~exact


INEXACT = "is an integer beyond 2**53 that float64 cannot hold exactly"
