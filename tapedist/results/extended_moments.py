"""Second moments of streamed rows to about 106 bits, at the speed of matrix products.

Squaring the condition number is what makes plain normal equations lose digits: the error of the solution is
`cond**2 * u` (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., 20.4). With moments whose `u` is
2**-104 that product stays below `cond * 2**-53`, which is what rounding the data themselves to float64 already did,
for every condition number up to 1e15. So one pass over the rows is enough, in any block sizes.

The products are made exact as by Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication by
using fast routines of matrix multiplication and its applications", Numerical Algorithms 59 (2012): columns are
cut into slices of so few bits that a float64 matrix product of two slices has no rounding at all, whatever the order
of its sums. Exactness also makes the moments independent of the number of threads.

Legend: `k` rows of a chunk, `d` features, `m = d + 2` columns (ones, the features, the target).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from tapedist.errors import InputError
from tapedist.results.extended import Extended, two_product, two_sum

Rows = tuple[np.ndarray, np.ndarray, np.ndarray | None]

# Slices of b bits multiply exactly over k rows when 2 b + log2(k) <= 53. Six slices hold 120 bits.
_CHUNK_ROWS = 4096
_SLICE_BITS = 20
_MAX_SLICES = 6
_CHUNK_NUMBERS = 2**21
# Sums of a few features must not overflow, nor may squares of the target. Columns are multiplied in scaled units.
_MOST = 1e300
_MOST_TARGET = 1e150
# Later rows may be so many powers of two larger than the first ones before sums are brought to new units.
_ROOM = 64
# Numbers that all are multiples of one power of two and leave so many of their last bits unused are no results of
# rounding: of two rounded numbers in a row, one is odd in its last bit.
_UNUSED_BITS = 8


class ExtendedMoments:
    """Accumulates sums of `w`, `w * z` and `w * z * z'`, `z` the shifted features and target of a row.

    Attributes:
        num_rows: rows of positive weight seen.
        shift: float64 `[d + 1]`, subtracted from every row: near the first rows' means, or zero if not `centred`.
        scale: float64 `[m]`, powers of two that the shifted columns are divided by.
        weight_scale: the power of two that weights are divided by.
        largest: float64 `[d + 1]`, the largest magnitude of each raw column.
        quantum: float64 `[d + 1]`, a power of two of which all numbers of the column are multiples; 0 if none is known.
        sums: `[m, m]`, `sum w * z * z'` of the columns (1, x, y), shifted and scaled.
    """

    def __init__(self, num_features: int, *, centred: bool = True, names: tuple[str, ...] | None = None):
        self.num_features = num_features
        self.centred = centred
        self.names = (*(names or [f"feature {j}" for j in range(num_features)]), "the target")
        self.num_rows = 0
        self.shift = np.zeros(num_features + 1)
        self.scale = np.ones(num_features + 2)
        self.weight_scale = 1.0
        self.largest = np.zeros(num_features + 1)
        self.quantum = np.full(num_features + 1, np.inf)
        self.sums = Extended.zeros(num_features + 2, num_features + 2)

    def add(self, x: np.ndarray, y: np.ndarray, w: np.ndarray | None = None) -> None:
        """Adds rows `x [k, d]`, `y [k]` of weights `w [k]` (1 if None). Rows of weight 0 are not looked at.

        Raises:
            InputError: A value is not finite, or a weight is negative or not finite.
        """
        rows = max(64, min(_CHUNK_ROWS, _CHUNK_NUMBERS // (self.num_features + 2) // _MAX_SLICES))
        for first in range(0, len(y), rows):
            part = slice(first, first + rows)
            self._add_chunk(x[part], y[part], None if w is None else w[part])

    def _add_chunk(self, x: np.ndarray, y: np.ndarray, w: np.ndarray | None) -> None:
        if w is not None:
            w = np.asarray(w, np.float64)
            if not (np.isfinite(w).all() and (w >= 0).all()):
                raise InputError(f"weights: hold {w[~(np.isfinite(w) & (w >= 0))][0]}; must be finite and not negative")
            x, y, w = x[w > 0], y[w > 0], w[w > 0]
        elif self.weight_scale != 1:
            w = np.ones(len(y))
        raw = np.concatenate([np.asarray(x).T, np.reshape(y, (1, -1))], dtype=np.float64)
        if not len(y):
            return
        largest = np.abs(raw).max(axis=1)
        self._check_finite(raw, largest)
        if not self.num_rows:
            self._choose_shift_and_scale(raw, w)
        self.num_rows += len(y)
        self.largest = np.maximum(self.largest, largest)
        self._note_quantum(raw)
        high, low = two_sum(raw, -self.shift[:, None])
        self._make_room(high, w)
        ones, scale = np.ones((1, len(y))), self.scale[1:, None]
        columns = Extended(np.concatenate([ones, high / scale]), np.concatenate([0 * ones, low / scale]))
        right = list(_slices(columns))
        left = right
        if w is not None and not (w == self.weight_scale).all():
            weights = w / self.weight_scale
            product, error = two_product(columns.hi, weights)
            left = list(_slices(Extended(*two_sum(product, error + columns.lo * weights))))
        self.sums = self.sums + _exact_product(left, right)

    def _check_finite(self, raw: np.ndarray, largest: np.ndarray) -> None:
        limits = np.full(len(raw), _MOST)
        limits[-1] = _MOST_TARGET
        if not (largest < limits).all():  # NaN if any number is.
            column, row = np.argwhere(~(np.abs(raw) < limits[:, None]))[0]
            raise InputError(
                f"{self.names[column]!r}: holds {raw[column, row]}; values must be finite and below "
                f"{limits[column]:g}; drop such rows or use other units"
            )

    def _choose_shift_and_scale(self, raw: np.ndarray, w: np.ndarray | None) -> None:
        if self.centred:
            middle = (raw / raw.shape[1]).sum(axis=1)
            spread = np.abs(raw - raw[:, :1]).max(axis=1)
            # Few bits in the shift leave few bits in the difference; a column that does not change becomes zero.
            quantum = np.ldexp(1.0, np.maximum(np.frexp(spread)[1] - 5, -1000))
            self.shift = np.where(spread > 0, np.round(middle / quantum) * quantum, raw[:, 0])
        largest = np.abs(raw - self.shift[:, None]).max(axis=1)
        self.scale[1:] = np.ldexp(1.0, np.where(largest > 0, np.frexp(largest)[1], 0))
        if w is not None:
            self.weight_scale = float(np.ldexp(1.0, np.frexp(w.max())[1] - 1))

    def exact(self, precision: float) -> np.ndarray:
        """Whether the numbers of each column, bool `[d + 1]`, are such as no rounding relative by `precision` made.

        Integers are, as far as all of them have a representation: counts, microseconds since 1970.
        """
        bits = np.where(self.quantum >= 1, 1.0, 2.0**-_UNUSED_BITS) / precision
        return self.largest <= bits * self.quantum

    def _note_quantum(self, raw: np.ndarray) -> None:
        """Lowers the quanta to those of a chunk. Columns of ordinary decimals are not looked at a second time."""
        open_columns = np.flatnonzero(self.exact(2.0**-53))
        values = raw[open_columns]
        quantum = np.where((np.rint(values) == values).all(axis=1), 1.0, 0.0)
        for place in np.flatnonzero(quantum == 0):
            mantissas, exponents = np.frexp(values[place][values[place] != 0])
            bits = np.ldexp(mantissas, 53).astype(np.int64)
            quantum[place] = np.ldexp((bits & -bits).astype(np.float64), exponents - 53).min()
        self.quantum[open_columns] = np.minimum(self.quantum[open_columns], quantum)
        self.quantum[~self.exact(2.0**-53)] = 0.0

    def _make_room(self, shifted: np.ndarray, w: np.ndarray | None) -> None:
        """Brings the sums to larger units where the first rows were no measure of these ones."""
        exponents = np.frexp(self.scale[1:])[1]
        # Columns that were zero so far have no unit yet.
        begun = np.diag(self.sums.hi)[1:] == 0
        if (begun | (np.frexp(self.largest + np.abs(self.shift))[1] > exponents + _ROOM)).any():
            largest = np.abs(shifted).max(axis=1)
            needed = np.ldexp(1.0, np.frexp(largest)[1])
            grown, begun = np.frexp(largest)[1] > exponents + _ROOM, begun & (largest > 0)
            shrink = np.ones(len(self.scale))
            shrink[1:][grown & ~begun] = (self.scale[1:] / needed)[grown & ~begun]
            self.scale[1:] = np.where(grown | begun, needed, self.scale[1:])
            self.sums = self.sums.scaled(shrink[:, None] * shrink[None, :])
        exponent = np.frexp(1.0 if w is None else w.max())[1]
        if exponent > np.frexp(self.weight_scale)[1] + _ROOM:
            larger = float(np.ldexp(1.0, exponent - 1))
            self.sums = self.sums.scaled(self.weight_scale / larger)
            self.weight_scale = larger

    def merge(self, blocks: Iterable[Rows]) -> ExtendedMoments:
        """Adds every block; returns itself."""
        for x, y, w in blocks:
            self.add(x, y, w)
        return self


def _slices(columns: Extended) -> Iterator[np.ndarray]:
    """Cuts `[m, k]` columns into float64 slices of `_SLICE_BITS` bits, most significant first.

    Adding and subtracting `1.5 * 2**(e + 52)` rounds to a multiple of `2**e`.
    """
    high, low = columns.hi, columns.lo
    exponents = np.frexp(np.abs(high).max(axis=1, keepdims=True))[1]
    for number in range(1, _MAX_SLICES + 1):
        sigma = np.ldexp(1.5, exponents - number * _SLICE_BITS + 52)
        cut = (high + sigma) - sigma
        yield cut
        high, low = two_sum(high - cut, low)
        if not high.any():
            return


def _exact_product(left: list[np.ndarray], right: list[np.ndarray]) -> Extended:
    """`sum(left) @ sum(right)'` of slices `[m, k]`: exact products, added from the most significant on."""
    m = left[0].shape[0]
    total = Extended.zeros(m, m)
    # Beyond this level a product is below 2**-120 of the largest.
    for level in range(min(len(left) + len(right) - 1, _MAX_SLICES + 1)):
        for i in range(max(0, level - len(right) + 1), min(level + 1, len(left))):
            j = level - i
            if left is right and i > j:
                break
            product = left[i] @ right[j].T
            total = total + product
            if left is right and i < j:
                total = total + product.T
    return total
