"""What a table reader gives: the header, and all rows in batches, in their order.

A new file format derives from `TableReader`; everything after it (checks, split, keeping) is the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tapedist.data.tables.columns import Column
from tapedist.data.tables.files import TableFile

INEXACT = "is an integer beyond 2**53 that float64 cannot hold exactly"


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


class TableReader:
    """A table in some file format.

    Attributes:
        files: the table, in order.
        columns: the header.
        num_rows: rows in all files, or None where only reading them tells.
        default_target: the target that the format itself marks, or empty.
        default_weight: the weight that goes with it, or empty.
        default_features: the features that go with it; empty means all other numeric columns.
    """

    files: Sequence[TableFile]
    columns: tuple[Column, ...]
    num_rows: int | None = None
    default_target: str = ""
    default_weight: str = ""
    default_features: tuple[str, ...] = ()

    def batches(self, names: Sequence[str]) -> Iterator[RowBatch]:
        """All rows of the columns `names` in order, in batches of bounded memory; as often as it is called.

        Raises:
            InputError: if a file cannot be decoded.
            StateError: if a file changed since it was opened.
        """
        raise NotImplementedError

    def check_unchanged(self) -> None:
        """Raises StateError if a file changed since it was opened."""
        for file in self.files:
            file.check_unchanged()


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
