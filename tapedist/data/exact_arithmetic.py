"""Float64 arithmetic in NumPy whose bits depend on the numbers alone: on no order of rows, no library, no CPU.

Elementwise `+ - * /`, `sqrt` and `rint` are rounded correctly everywhere. Beyond them there are three ways to add:

    folded   a fixed tree, for sums over features and parameters, which have an order
    exact    integers: a number `|t| <= 1` is cut into slices of so few bits that float64 adds them, or products of two
             of them, without rounding, whatever the order (Ozaki, Ogita, Oishi and Rump, "Error-free transformations
             of matrix multiplication by using fast routines of matrix multiplication and its applications", Numerical
             Algorithms 59, 2012); so any BLAS may do it, and rows have no order
    chain    from left to right, for the prediction of one row

Legend: `k` rows, `d` features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Floats = np.ndarray | float

# Slices are integers of magnitude 2**20 at most, so that 2**13 products of two add up to 2**53 at most.
SLICE_BITS = 21
SLICE_ROWS = 2**13
_FIRST_SLICE = 2.0**20
# A sum of 2**14 terms in two slices of 39 bits each.
_TERM_BITS = 39
_TERMS = 2**14
_HALF_BITS = 27

_SPLITTER = 2.0**27 + 1.0


def two_sum(a: Floats, b: Floats) -> tuple[Any, Any]:
    """`(s, e)` with `s = fl(a + b)` and `s + e = a + b` exactly."""
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


def two_product(a: Floats, b: Floats) -> tuple[Any, Any]:
    """`(p, e)` with `p = fl(a * b)` and `p + e = a * b` exactly, for magnitudes between about 1e-140 and 1e+140."""
    product = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: Floats) -> tuple[Any, Any]:
    scaled = _SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high


def exponent_above(values: Floats) -> np.ndarray:
    """The least `e` with `2**e >= |values|`, int64; 0 for 0."""
    mantissas, exponents = np.frexp(np.abs(values))
    return exponents.astype(np.int64) - (mantissas == 0.5)


def scaled(values: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """`values * 2**exponents`, by a product where the power of two is a float64."""
    if (np.abs(exponents) <= 1000).all():
        return values * np.ldexp(1.0, exponents)
    return np.ldexp(values, exponents)


def folded(terms: np.ndarray, axis: int = -1) -> Any:
    """Sum along an axis: padded with zeros to a power of two, the second half is added to the first until one is left.

    Args:
        terms: float64.
        axis: of the sum.
    """
    terms = np.moveaxis(np.asarray(terms, np.float64), axis, -1)
    size = terms.shape[-1]
    if size < 2:
        return terms[..., 0] if size else np.zeros(terms.shape[:-1])
    half = 1 << ((size - 1).bit_length() - 1)
    total = terms[..., :half] + 0.0
    total[..., : size - half] += terms[..., half:]
    while half > 1:
        half //= 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def chain(x: np.ndarray, weights: np.ndarray, start: float = 0.0) -> np.ndarray:
    """`start + x_0 * weights_0 + x_1 * weights_1 + ...` from left to right, `[k]` for rows `x [k, d]`."""
    total = np.full(len(x), start)
    for column, weight in zip(np.ascontiguousarray(x.T), weights.tolist(), strict=True):
        total += column * weight
    return total


def outer_sum(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`left @ right.T` of `[p, r]` and `[q, r]`, added from left to right."""
    total = np.zeros([len(left), len(right)])
    for a, b in zip(left.T, right.T, strict=True):
        total += np.multiply.outer(a, b)
    return total


def slices(high: np.ndarray, low: np.ndarray | None, count: int) -> Iterator[np.ndarray]:
    """Cuts numbers `high + low` of magnitude 1 at most into integers, slice `a` in units of `2**-(20 + 21 a)`.

    Args:
        high: float64, the numbers rounded.
        low: what the rounding left; None for nothing.
        count: slices at most. Those after the last that is not zero are not made.
    """
    high = high * _FIRST_SLICE
    low = low * _FIRST_SLICE if low is not None and low.any() else None
    for number in range(1, count + 1):
        whole = np.rint(high)
        yield whole
        if number == count:
            return
        high -= whole
        if low is not None:
            high, low = two_sum(high, low)
        if not high.any():
            return
        high *= 2.0**SLICE_BITS
        if low is not None:
            low *= 2.0**SLICE_BITS


class IntegerSums:
    """Sums of integers below 2**60 in arrays of one shape, in halves that do not overflow before 2**35 of them.

    Args:
        shape: of the arrays.
    """

    def __init__(self, *shape: int):
        self._high, self._low = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    def add(self, key: Any, integers: np.ndarray) -> None:
        """Adds int64 numbers to the part `key`."""
        self._high[key] += integers >> _HALF_BITS
        self._low[key] += integers & (2**_HALF_BITS - 1)

    def values(self) -> np.ndarray:
        """Python's integers, in an array of objects."""
        return (self._high.astype(object) << _HALF_BITS) + self._low.astype(object)

    def of_levels(self, bits: int) -> np.ndarray:
        """The levels along the first axis as one number each: a level counts `2**bits` of the next."""
        levels = self.values()
        total = levels[0]
        for level in levels[1:]:
            total = (total << bits) + level
        return total


class ExactSums:
    """Sums of terms that are bounded: the same bits in any order. A term is off by `2**-79` of its bound at most.

    Args:
        bounds: float64 `[c]`, of the terms' magnitudes, one for each sum.
    """

    def __init__(self, bounds: np.ndarray):
        self._exponents = exponent_above(bounds)
        self._sums = IntegerSums(2, len(self._exponents))

    def add(self, terms: np.ndarray) -> None:
        """Adds `[c, k]` terms."""
        for first in range(0, terms.shape[1], _TERMS):
            part = np.ldexp(terms[:, first : first + _TERMS], (_TERM_BITS - self._exponents)[:, np.newaxis])
            for level in range(2):
                whole = np.rint(part)
                self._sums.add(level, whole.sum(axis=1).astype(np.int64))
                part = (part - whole) * 2.0**_TERM_BITS

    def values(self) -> np.ndarray:
        """Float64 `[c]`, each rounded once."""
        totals = (total / 1 for total in self._sums.of_levels(_TERM_BITS))
        return np.ldexp(np.array([*totals], np.float64), self._exponents - 2 * _TERM_BITS)


def rounded(numerators: np.ndarray, denominator: int, exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """`numerators / denominator * 2**exponent` as `(high, low)`: rounded to float64, and what that left, rounded.

    Args:
        numerators: Python's integers.
        denominator: positive.
        exponent: of the unit.
    """
    # As integers beyond 2**53: nothing that is not 0 has a fraction in float64.
    extra = 53 + denominator.bit_length()
    enlarged = numerators << extra
    high = enlarged / denominator
    low = (enlarged - np.frompyfunc(int, 1, 1)(high) * denominator) / denominator
    pair = (np.ldexp(np.asarray(part, np.float64), exponent - extra) for part in (high, low))
    return next(pair), next(pair)


def sliced_product(x: np.ndarray, matrix: np.ndarray, bounds: np.ndarray, count: int = 3) -> np.ndarray:
    """`x @ matrix` of `[k, d]` and `[d, r]`, `d` up to 2**13, to about 63 bits of the largest terms.

    Args:
        x: float64.
        matrix: float64.
        bounds: float64 `[d]`, of the magnitudes in the columns of `x`, whatever rows are in it.
        count: slices.
    """
    exponents = exponent_above(bounds)
    right_side = scaled(matrix, exponents[:, np.newaxis])
    columns = exponent_above(np.abs(right_side).max(axis=0, initial=0.0))
    left = [*slices(scaled(x, -exponents), None, count)]
    right = [*slices(scaled(right_side, -columns), None, count)]
    total = np.zeros([len(x), matrix.shape[1]])
    for level in reversed(range(count)):
        total *= 2.0**-SLICE_BITS
        for a in range(level + 1):
            if a < len(left) and level - a < len(right):
                total += left[a] @ right[level - a]
    return scaled(total, columns - 40)


def eliminated(matrix: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solves `matrix @ x = right` by Gauss and Jordan's elimination without exchanges, elementwise.

    Args:
        matrix: float64 `[p, p]`, similar to a positive definite one by a diagonal matrix, so that it needs no exchange.
        right: float64 `[p, q]`.

    Returns:
        `x [p, q]`, and the pivots `[p]`.
    """
    count = len(matrix)
    table, pivots = np.concatenate([matrix, right], axis=1), np.zeros(count)
    for k in range(count):
        pivots[k] = table[k, k]
        table[k, k:] /= pivots[k]
        factors = table[:, k].copy()
        factors[k] = 0.0
        table[:, k:] -= np.multiply.outer(factors, table[k, k:])
    return table[:, count:], pivots
