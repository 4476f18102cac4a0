"""Exact second moments of the rows, from sums that have no order.

Legend: `d` features, `D = d + 1` columns (the features, then the target).

A column less its shift is cut into three slices of 21 bits each, whole numbers of at most `2**20` in units of their
own; a product of two has 41 bits, so that `2**13` of them add up without rounding, whoever multiplies the matrices
(Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication by using fast routines of matrix
multiplication and its applications", 2012). Products of slices below the third rank are left out: less than `2**-61`
of the largest. Without weights

    K_ab = sum of slice_a slice_b'      N = 2**42 K_00 + 2**21 (K_01 + K_10) + (K_02 + K_20 + K_11)

and with weights the first factor are the slices of `w * z`, rounded once. From the integers, the means and the centred
products

    W = sum w        m = shift + sum w*z / W        C = sum w * z * z' - (sum w*z)(sum w*z)' / W

are rational numbers, rounded once.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np

from tapedist.data.exact_arithmetic import SLICE_BITS
from tapedist.data.ranges import Bounds, pow2
from tapedist.regression.least_squares import Moments
from tapedist.training import exact
from tapedist.training.host_moments import SLICES, pairs


@dataclasses.dataclass(frozen=True, eq=False)
class MomentUnits:
    """Shifts of columns, and the units of their products.

    Attributes:
        shifts: float64 `[D]`.
        tops: powers of two `[D]` that no shifted column exceeds.
        weighted_tops: those of `w * z`, and last of `w`: `[D + 1]`.
    """

    shifts: np.ndarray
    tops: np.ndarray
    weighted_tops: np.ndarray

    @classmethod
    def of(cls, bounds: Bounds) -> MomentUnits:
        tops = bounds.tops()
        # The last one is that of the weights alone, whose column of `z` is ones, of top 1.
        return cls(bounds.shifts(), tops, pow2(bounds.weight * np.append(tops, 1.0)))

    def moments(self, sums: np.ndarray, *, weighted: bool) -> Moments:
        """Converts the integers `[2, M]` of `moment_steps.py` to moments."""
        count = len(self.tops)
        # Python's integers: the products of all rows have more than 64 bits.
        numbers = np.array(exact.value_of(sums), object)
        multiplied = pairs(weighted)
        products, columns, rows = np.split(numbers, [len(multiplied) * count * count, len(numbers) - 1])
        columns = columns.reshape(SLICES, -1)
        total: Any = 0
        for (a, b), product in zip(multiplied, products.reshape(-1, count, count), strict=True):
            # Without weights only one of `(a, b)` and `(b, a)` was summed: the other one is its transpose.
            both = product if weighted or a == b else product + product.T
            total = total + both * (1 << SLICE_BITS * (2 - a - b))
        of_column: Any = sum(part * (1 << SLICE_BITS * (2 - a)) for a, part in enumerate(columns))
        # A power of two has the mantissa 1/2 in `frexp`, so that its own exponent is one less.
        exponents = np.frexp(self.tops)[1].astype(object) - 1
        if not weighted:
            return _moments(total, of_column, rows[0], 0, exponents, exponents, self.shifts)
        left = np.frexp(self.weighted_tops)[1].astype(object) - 1
        return _moments(total, of_column[:-1], of_column[-1], left[-1] - 62, left[:-1], exponents, self.shifts)


def _moments(
    products: np.ndarray,
    columns: np.ndarray,
    weight: int,
    weight_exponent: int,
    left: np.ndarray,
    right: np.ndarray,
    shifts: np.ndarray,
) -> Moments:
    """Means and centred products, each an exact quotient of integers that is rounded once.

    All but the shifts are Python integers.

    Args:
        products: `[D, D]`, of which those on and above the diagonal count, in units of `2**(left[i] + right[j] - 82)`.
        columns: `[D]`, sums of columns, in units of `2**(left[i] - 62)`.
        weight: the sum of weights, in units of `2**weight_exponent`.
        weight_exponent: see `weight`.
        left: `[D]`.
        right: `[D]`.
        shifts: float64 `[D]`.
    """
    count = len(columns)
    means, centred = np.zeros(count), np.zeros((count, count))
    # All rows have weight 0: there are no moments, and no quotient is possible.
    if weight == 0:
        return Moments(0.0, means, centred)
    for i, shift in enumerate(shifts.tolist()):
        gap = Fraction(columns[i], weight) * Fraction(2) ** (left[i] - 62 - weight_exponent)
        # Shift and gap are added before they are rounded: one rounding, however far the shift is from 0.
        means[i] = float(Fraction(shift) + gap)
    for j in range(count):
        # Exponents of the units of `N_ij * W` and of `S_i * S_j`, without the left column's, which both share. Both are
        # brought to the finer one as integers, so that their difference is exact: it may cancel nearly all digits.
        units = right[j] - 82, left[j] - 124 - weight_exponent
        unit = min(units)
        both = products[: j + 1, j] * weight * (1 << units[0] - unit)
        both = both - columns[: j + 1] * columns[j] * (1 << units[1] - unit)
        for i, numerator in enumerate(both):
            centred[i, j] = centred[j, i] = _quotient(numerator, weight, left[i] + unit)
    return Moments(_quotient(weight, 1, weight_exponent), means, centred)


def _quotient(numerator: int, denominator: int, exponent: int) -> float:
    """`numerator / denominator * 2**exponent`, rounded once; infinite beyond the range of float64."""
    try:
        return (numerator << exponent) / denominator if exponent >= 0 else numerator / (denominator << -exponent)
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf
