"""What training knows of a split's numbers before it sees a row: their ranges, and from them bounds on every term.

Minima and maxima have no order: the ranges of a split do not depend on who reads it or in which blocks. Bounds are
ranges in the units and the type of training; they fix the grids of its sums.

Numbers too small to train on become 0, because units of computing treat them in different ways.

Legend: `d` features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tapedist.data.source import Ranges, RowArrays, Source, row_blocks
from tapedist.errors import InputError
from tapedist.text import display

# The least magnitude of each type that is not 0: float32's denormals go; of float64 so much that products are normal.
LEAST = {"float32": 2.0**-126, "float64": 2.0**-250}
# From here on float64 rounds up to the least float32. A thread of TensorFlow, which flushes denormals, may round to 0
# what lies between; so it is moved to where there is nothing to round.
ROUNDS_UP = 2.0**-126 - 2.0**-150

_PIECE = 16_384  # Temporaries that stay in the cache.
_FEW_COLUMNS = 16  # Up to here columns are faster one by one.


def flushed(values: np.ndarray, dtype: Any) -> np.ndarray:
    """`values` rounded to `dtype`, with 0 for what is then smaller than the type's least magnitude."""
    dtype = np.dtype(dtype)
    least, sizes = LEAST[dtype.name], np.abs(values)
    if (sizes < least).any():
        below = ROUNDS_UP if values.dtype.itemsize > dtype.itemsize else least
        values = np.where(sizes < least, np.where(sizes < below, 0.0, np.sign(values) * least), values)
    with np.errstate(over="ignore"):  # A loss that is not finite is told by name.
        return values.astype(dtype, copy=False)


def holds_tiny(values: np.ndarray, ends: np.ndarray | None = None) -> bool:
    """Whether a number other than 0 is below the least magnitude of any type.

    Args:
        values: of any shape; NaN does not count.
        ends: the least and the greatest, if they are known.
    """
    if not values.size:
        return False
    low, high = ends if ends is not None else (values.min(), values.max())
    if low >= LEAST["float32"] or high <= -LEAST["float32"]:
        return False
    flat = values.reshape(-1)
    for first in range(0, len(flat), _PIECE):
        sizes = np.abs(flat[first : first + _PIECE])
        if np.fmin.reduce(sizes) < LEAST["float32"] and ((sizes < LEAST["float32"]) & (sizes > 0)).any():
            return True
    return False


def ranges(
    source: Source,
    split: str,
    *,
    log: Callable[[str], object] = lambda sentence: None,
) -> Ranges:
    """The ranges of a split, by the source's own method `ranges(split)` if it knows them, or by a pass over all rows.

    Args:
        source: the rows.
        split: "train" or "test".
        log: told of a pass.

    Raises:
        InputError: if a pass finds a number that is not finite, or a negative weight.
    """
    if not source.num_rows(split):
        return Ranges.none(source.num_features)
    known = source.raw.ranges(split)
    if known is None:
        log(
            f"reading all {source.num_rows(split)} {split} rows once for the ranges of their columns; a source with a "
            "method ranges(split) spares this pass"
        )
        known = ranges_of_rows(source.raw, split)
    return source.in_units(known)


def ranges_of_rows(source: Source, split: str) -> Ranges:
    """The ranges of a split by a pass over all of its rows; arguments as in `ranges`.

    Raises:
        InputError: if a number is not finite, or a weight negative.
    """
    names, exponent = (*source.feature_names, source.target_name), source.weight_exponent
    return ranges_of_blocks(row_blocks(source, split), names, split=split, weight_exponent=exponent)


def ranges_of_blocks(
    blocks: Iterable[RowArrays], names: Sequence[str], *, split: str = "train", weight_exponent: int = 0
) -> Ranges:
    """The ranges of rows that are given in blocks, `x [k, d]`, `y [k]` and `w [k]` or None.

    Args:
        blocks: in the order of the rows.
        names: of the features and of the target.
        split: what the rows are called in messages.
        weight_exponent: weights are divided by 2 to the power of it.

    Raises:
        InputError: if a number is not finite, or a weight negative.
    """
    count, done, weight = len(names), 0, 1.0
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    for x, y, w in blocks:
        kept_x, kept_y = x, y
        if w is not None:
            _check(w, w, "the weight", split, done)
            if not (w > 0).all():
                kept_x, kept_y = x[w > 0], y[w > 0]
            weight = max(weight if done else 0.0, float(w.max(initial=0.0)))
        if len(kept_y):
            least, most = (np.append(_by_column(kept_x, end), end.reduce(kept_y)) for end in (np.minimum, np.maximum))
            for position in np.flatnonzero(~(np.isfinite(least) & np.isfinite(most)))[:1].tolist():
                what = f"column {display(names[position])}"
                _check([*x.T, y][position], np.ones(len(y)) if w is None else w, what, split, done)
            low, high = np.minimum(low, least), np.maximum(high, most)
        done += len(y)
    return Ranges.of_extremes(low, high, float(np.ldexp(weight, -weight_exponent)))


def _by_column(x: np.ndarray, end: np.ufunc) -> np.ndarray:
    """The least or greatest value of each column, in the faster form."""
    return np.array([end.reduce(column) for column in x.T]) if x.shape[1] <= _FEW_COLUMNS else end.reduce(x, axis=0)


def _check(values: np.ndarray, w: np.ndarray, what: str, split: str, done: int) -> None:
    """Raises InputError at the first number in a row that counts which is not finite, or, of weights, negative."""
    bad = ~np.isfinite(values) & ((w > 0) | ~np.isfinite(w)) | ((values < 0) if values is w else False)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{what} of {split} row {done + row} is {values[row]:g}; must be "
            f"{'finite and at least 0' if values is w else 'finite'}; correct it or leave the row out"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Bounds:
    """Bounds of a split, in the units of training and in its type.

    Attributes:
        low: float64 `[d + 1]`, the least value of each feature and, last, of the target.
        high: float64 `[d + 1]`, the largest.
        weight: the largest weight.
        least: smaller numbers count as 0.
    """

    low: np.ndarray
    high: np.ndarray
    weight: float
    least: float

    @classmethod
    def of(cls, ranges: Ranges, *, dtype: str) -> Bounds:
        """Bounds of rows that are rounded to `dtype`, "float32" or "float64"."""
        least = LEAST[dtype]

        def as_trained(values: np.ndarray) -> np.ndarray:
            with np.errstate(over="ignore"):  # What overflows is refused where it is read.
                rounded = np.asarray(values).astype(dtype).astype(np.float64)
            return np.where(np.abs(rounded) < least, 0.0, rounded)

        weight = max(float(as_trained(np.array(ranges.weight))), least)
        return cls(as_trained(ranges.low), as_trained(ranges.high), weight, least)

    def largest(self) -> np.ndarray:
        """Of each feature, of the target, of the weights: float64 `[d + 2]`."""
        columns = np.maximum(np.maximum(np.abs(self.low), np.abs(self.high)), self.least)
        return np.append(columns, self.weight)

    def shifts(self) -> np.ndarray:
        """What is subtracted from the columns before products of them are summed, float64 `[d + 1]`.

        Near the middle of a column's range, and of so few bits that the differences have few.
        """
        spread = self.high - self.low
        quantum = pow2(np.where(spread > 0, spread, 1.0)) / 32
        middle = self.low / 2 + self.high / 2
        quotient = middle / quantum
        rounded = np.where(np.abs(quotient) < 2.0**52, np.rint(quotient) * quantum, middle)
        return np.where(spread > 0, rounded, self.low)

    def tops(self) -> np.ndarray:
        """Powers of two that no shifted column exceeds, float64 `[d + 1]`."""
        shifts = self.shifts()
        largest = np.maximum(np.abs(self.low - shifts), np.abs(self.high - shifts))
        return pow2(np.maximum(largest, self.least))


def pow2(values: np.ndarray) -> np.ndarray:
    """The least powers of two that are not below `values`, positive and normal."""
    bits = np.ascontiguousarray(values, np.float64).view(np.int64) + (2**52 - 1)
    return (bits & ~np.int64(2**52 - 1)).view(np.float64)
