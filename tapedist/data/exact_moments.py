"""Second moments of streamed rows as integers: they have no order, and each result is rounded once.

Squaring the condition number is what makes plain normal equations lose digits: the error of the solution is
`cond**2 * u` (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., 20.4). With moments whose `u` is
2**-104 that product stays below `cond * 2**-53`, which is what rounding the data themselves to float64 already did,
for every condition number up to 1e15. So one pass over the rows is enough, in any block sizes.

A column is shifted by about the middle of its range, which is exact as a pair of float64, divided by the power of two
above what is left, and cut into slices (`exact_arithmetic.slices`); products of slices of which the numbers add up to
less than the count of slices are added.

Legend: `k` rows of a chunk, `d` features, `c = d + 1` columns (the features, then the target), `L` slices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from tapedist.data.exact_arithmetic import (
    SLICE_BITS,
    SLICE_ROWS,
    IntegerSums,
    exponent_above,
    rounded,
    scaled,
    slices,
    two_product,
    two_sum,
)
from tapedist.data.layout import piece_rows
from tapedist.data.source import Ranges, Source, row_blocks
from tapedist.errors import InputError

MOST_SLICES = 6  # 126 bits: what double-double arithmetic makes use of.
_CHUNK_NUMBERS = 2**17  # Of all slices of a chunk: they stay in a cache.
_LEAST_ROWS = 256
# Sums of a few features must not overflow, nor may squares of the target.
MOST = 1e300
_MOST_TARGET = 1e150
# Numbers that all are multiples of one power of two and leave so many of their last bits unused are no results of
# rounding: of two rounded numbers in a row, one is odd in its last bit.
_UNUSED_BITS = 8
_SHIFT_BITS = 5  # Of a shift below the power of two above the range: few bits in it leave few bits in the difference.
_SHIFT_UNIT = 128  # A shift is a multiple of 2**-128 of its column's scale.


class ExactMoments:
    """Accumulates sums of `w`, `w * z` and `w * z * z'`, `z` the shifted and scaled columns of a row.

    Args:
        ranges: of all rows that will be added.
        names: the features' names, for messages.
        num_slices: `L`; the moments are good to about `21 L` bits of the square of the largest number.
        products: whether products of two columns are wanted; else squares only.
        weight_exponent: weights were divided by 2 to the power of it.

    Attributes:
        num_rows: rows of positive weight seen.
        num_features: `d`.
        shift: float64 `[c]`, subtracted from every row.
        exponents: int64 `[c]`, of the powers of two that shifted columns are divided by.

    Raises:
        InputError: A number is not finite.
    """

    def __init__(
        self, ranges: Ranges, *, names: Sequence[str], num_slices: int = MOST_SLICES, products: bool = True,
        weight_exponent: int = 0,
    ):  # fmt: skip
        count = len(ranges.low)
        self.names, self.num_features = (*names, "the target"), count - 1
        self.num_rows = 0
        self.num_slices, self.products = num_slices, products
        self._ranges = ranges if ranges.weight > 0 else Ranges(np.zeros(count), np.zeros(count), 1.0)
        self.largest = np.maximum(np.abs(self._ranges.low), np.abs(self._ranges.high))
        self._refuse(~(self.largest < MOST), MOST)
        self.shift, self.exponents = _shifts(self._ranges)
        self.weight_exponent = int(exponent_above(self._ranges.weight)) + weight_exponent
        self._given_weight_exponent = weight_exponent
        self._squares = IntegerSums(num_slices, count, *([count] if products else []))
        self._sums, self._weights = IntegerSums(num_slices, count), IntegerSums(num_slices, 1)
        self._quantum = np.full(count, np.inf)

    def add(self, columns: np.ndarray, w: np.ndarray | None = None) -> None:
        """Adds rows as `columns [c, k]` of weights `w [k]` (1 if None). Rows of weight 0 are not looked at.

        Raises:
            InputError: A weight is negative or not finite, or a number is not in the ranges.
        """
        rows = max(_LEAST_ROWS, min(SLICE_ROWS, _CHUNK_NUMBERS // (len(self.shift) + 1) // MOST_SLICES))
        for first in range(0, columns.shape[1], rows):
            part = slice(first, first + rows)
            self._add_chunk(columns[:, part], None if w is None else w[part])

    def _add_chunk(self, columns: np.ndarray, w: np.ndarray | None) -> None:
        if w is not None:
            if not (np.isfinite(w).all() and (w >= 0).all()):
                raise InputError(f"weights: hold {w[~(np.isfinite(w) & (w >= 0))][0]}; must be finite and not negative")
            if not (w > 0).all():
                columns, w = columns[:, w > 0], w[w > 0]
            w = np.ldexp(w, self._given_weight_exponent - self.weight_exponent)
        k = columns.shape[1]
        if not k:
            return
        self.num_rows += k
        if self.num_slices == MOST_SLICES and self.products:
            self._note_quantum(columns)
        high, low = two_sum(columns, -self.shift[:, np.newaxis])
        high, low = scaled(high, -self.exponents[:, np.newaxis]), scaled(low, -self.exponents[:, np.newaxis])
        self._refuse(~(np.abs(high).max(axis=1) <= 1), MOST, "; its rows have changed since they were first read")
        right = list(slices(high, low, self.num_slices))
        left = right
        if w is None or (w == 1).all():
            self._weights.add((0, 0), np.array(k << (SLICE_BITS - 1)))
        else:
            for level, part in enumerate(slices(w, None, self.num_slices)):
                self._weights.add((level, 0), part.sum().astype(np.int64))
            product, error = two_product(high, w)
            left = list(slices(*two_sum(product, error + low * w), self.num_slices))
        for level, part in enumerate(left):
            self._sums.add(level, part.sum(axis=1).astype(np.int64))
        self._add_products(left, right)

    def _add_products(self, left: list[np.ndarray], right: list[np.ndarray]) -> None:
        for level in range(self.num_slices):
            total = None
            for i in range(max(0, level - len(right) + 1), min(level + 1, len(left))):
                j = level - i
                if left is right and i > j:
                    break
                product = left[i] @ right[j].T if self.products else np.einsum("ij,ij->i", left[i], right[j])
                found = product.astype(np.int64)
                if left is right and i < j:
                    found = found + found.T
                total = found if total is None else total + found
            if total is not None:
                self._squares.add(level, total)

    def _refuse(self, bad: np.ndarray, limit: float, because: str = "") -> None:
        if bad.any():
            column = int(bad.argmax())
            low, high = self._ranges.low[column], self._ranges.high[column]
            value = high if not abs(high) < limit else low
            raise InputError(
                f"{self.names[column]!r}: holds {value}; values must be finite and below "
                f"{limit:g}; drop such rows or use other units{because}"
            )

    def check_limits(self) -> None:
        """Whether squares of the target have room.

        Raises:
            InputError: if not.
        """
        limits = np.full(len(self.largest), MOST)
        limits[-1] = _MOST_TARGET
        self._refuse(~(self.largest < limits), _MOST_TARGET)

    def exact(self, precision: float) -> np.ndarray:
        """Whether the numbers of each column, bool `[c]`, are such as no rounding relative by `precision` made.

        Integers are, as far as all of them have a representation: counts, microseconds since 1970.
        """
        bits = np.where(self._quantum >= 1, 1.0, 2.0**-_UNUSED_BITS) / precision
        return self.largest <= bits * self._quantum

    def _note_quantum(self, columns: np.ndarray) -> None:
        """Lowers the powers of two, 1 at most, of which all numbers of a column are multiples; 0 where none is known.

        Columns of ordinary decimals are not looked at a second time.
        """
        open_columns = np.flatnonzero(self.exact(2.0**-53))
        if not len(open_columns):
            return
        values = columns[open_columns]
        quantum = np.where((np.rint(values) == values).all(axis=1), 1.0, 0.0)
        for place in np.flatnonzero(quantum == 0):
            mantissas, exponents = np.frexp(values[place][values[place] != 0])
            bits = np.ldexp(mantissas, 53).astype(np.int64)
            quantum[place] = np.ldexp((bits & -bits).astype(np.float64), exponents - 53).min()
        self._quantum[open_columns] = np.minimum(self._quantum[open_columns], quantum)
        self._quantum[~self.exact(2.0**-53)] = 0.0

    @property
    def _unit(self) -> int:
        """Sums count in units of `2**-unit`, squares in units of `2**-(unit + 20)`."""
        return SLICE_BITS * self.num_slices - 1

    @functools.cached_property
    def _integers(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Squares (`[c, c]` or `[c]`), sums `[c]` and the sum of weights. Asked for when all rows are in."""
        squares = self._squares.of_levels(SLICE_BITS)
        if self.products:  # With weights, of two columns the first one is weighted.
            upper = np.triu(np.ones(squares.shape, bool))
            squares = np.where(upper, squares, squares.T)
        return squares, self._sums.of_levels(SLICE_BITS), self._weights.of_levels(SLICE_BITS)[0]

    def total(self) -> tuple[np.ndarray, np.ndarray]:
        """The sum of weights in units of `2**weight_exponent`, `(high, low)`."""
        high, low = rounded(np.array([self._integers[2]], object), 1, -self._unit)
        return high[0], low[0]

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the columns `[c]`, raw units, `(high, low)`."""
        _, sums, total = self._integers
        pairs = []
        for shift, exponent, value in zip(self.shift.tolist(), self.exponents.tolist(), sums, strict=True):
            exact = Fraction(shift) + Fraction(value, total) * Fraction(2) ** exponent
            pairs.append((float(exact), float(exact - Fraction(float(exact)))))
        high, low = zip(*pairs, strict=True)
        return np.array(high), np.array(low)

    def centred(self) -> tuple[np.ndarray, np.ndarray]:
        """Weighted sums of products (or squares) of the centred columns, in units of `2**exponents`, `(high, low)`."""
        squares, sums, total = self._integers
        outer = np.multiply.outer(sums, sums) if self.products else sums * sums
        return rounded(squares * total - (outer << (SLICE_BITS - 1)), total, -(self._unit + SLICE_BITS - 1))

    def about_zero(self) -> tuple[np.ndarray, np.ndarray]:
        """The same of the raw columns, in the same units, `(high, low)`."""
        squares, sums, total = self._integers
        columns = zip(self.shift.tolist(), self.exponents.tolist(), strict=True)
        shifts = np.array([_integer(shift, _SHIFT_UNIT - exponent) for shift, exponent in columns], object)
        if self.products:
            across, ends = np.multiply.outer(shifts, sums), np.multiply.outer(shifts, shifts)
            across = across + across.T
        else:
            across, ends = 2 * shifts * sums, shifts * shifts
        parts = (squares << 2 * _SHIFT_UNIT) + (((across << _SHIFT_UNIT) + ends * total) << (SLICE_BITS - 1))
        return rounded(parts, 1, -(self._unit + SLICE_BITS - 1 + 2 * _SHIFT_UNIT))

    def deviations(self, *, about_mean: bool) -> np.ndarray:
        """Of the columns from their means, or from 0, float64 `[c]`, raw units: roots of mean squares, rounded once."""
        squares, unit = (self.centred() if about_mean else self.about_zero())[0], self.total()[0]
        squares = np.diag(squares) if self.products else squares
        return np.ldexp(np.sqrt(np.maximum(squares, 0.0) / unit), self.exponents)


def _integer(value: float, exponent: int) -> int:
    """`value * 2**exponent`, which is an integer."""
    numerator, denominator = value.as_integer_ratio()
    bits = exponent - (denominator.bit_length() - 1)
    return numerator << bits if bits >= 0 else numerator >> -bits


def _shifts(ranges: Ranges) -> tuple[np.ndarray, np.ndarray]:
    """What is subtracted from each column, and the exponents of the powers of two above what is left."""
    low, high = ranges.low, ranges.high
    unit = exponent_above(high / 2 - low / 2) + 1 - _SHIFT_BITS
    middle = low / 2 + high / 2
    with np.errstate(over="ignore", under="ignore"):
        steps = np.ldexp(middle, -unit)
        shift = np.where(np.abs(steps) < 2.0**52, np.ldexp(np.rint(steps), unit), middle)
    shift = np.where(low == high, low, shift)
    largest = np.maximum(np.abs(low - shift), np.abs(high - shift))
    # A column that does not change becomes zero; its scale is that of its number.
    return shift, exponent_above(np.where(largest > 0, largest, np.abs(low)))


def exact_moments(
    source: Source, ranges: Ranges, *, num_slices: int = MOST_SLICES, products: bool = True,
) -> ExactMoments:  # fmt: skip
    """The moments of the training rows: one pass.

    Args:
        source: the rows.
        ranges: of the same rows.
        num_slices: see `ExactMoments`.
        products: likewise.

    Raises:
        InputError: a number is not finite.
    """
    exponent = source.weight_exponent
    moments = ExactMoments(
        ranges, names=source.feature_names, num_slices=num_slices, products=products, weight_exponent=exponent
    )
    for columns, w in _column_blocks(source):
        moments.add(columns, None if w is None else np.ldexp(w, -exponent))
    return moments


def _column_blocks(source: Source) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The training rows in the blocks of `row_blocks`: `(columns [c, k], w [k] or None)`, float64.

    Contiguous columns are the fastest. The next block takes a block's memory: fresh memory would cost as much as
    reading it.
    """
    buffer = np.zeros(0)
    for x, y, w in row_blocks(source, "train"):
        size = (source.num_features + 1) * len(y)
        buffer = buffer if size <= len(buffer) else np.empty(size)
        yield as_columns(x, y, buffer[:size].reshape(-1, len(y))), w


def as_columns(x: Any, y: Any, columns: np.ndarray | None = None) -> np.ndarray:
    """`[c, k]` of `x [k, d]` and `y [k]`, float64, in new memory or in `columns`."""
    x = np.asarray(x)
    columns = np.empty([x.shape[1] + 1, len(y)]) if columns is None else columns
    step = piece_rows(x.shape[1])
    for first in range(0, len(y), step):  # Turned around where they stay in the cache.
        columns[:-1, first : first + step] = x[first : first + step].T
    columns[-1] = y
    return columns
