"""The triangular factor of centred second moments, and the columns that are linearly dependent on others.

Cholesky's factorisation (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., 10.1) in double-double
arithmetic. Its factor is the `R` of a QR factorisation of the centred rows whose columns are taken strictly from left
to right: a column that is a linear combination of those before it is aliased, and left out, as by R's `lm`. This is the
only place where that is decided.

Legend: `d` features, `r` of them kept. Columns are in scaled units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tapedist.data.exact_arithmetic import folded
from tapedist.regression.curvature import condition
from tapedist.regression.double_double import Extended

# The tolerance of R's `lm`: the share of a column's length that is left.
ALIASED_BELOW = 1e-7
# Columns that were computed from others were rounded more than once.
_ROUNDINGS = 4.0
# Of the target's length: only a residual below it is taken for rounding.
_EXACT = 1e-12
# Parts of a combination below this share of a column are rounding.
_NEGLIGIBLE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """`products = upper' @ upper + (what is left)`, where little is left of the aliased columns.

    Attributes:
        kept: feature numbers in their order, `r` of them.
        aliased: the other feature numbers in their order.
        combinations: for each aliased feature, the kept ones before it that it is a combination of; empty if it does
            not vary.
        upper: `[r, d]`, row `k` zero before column `kept[k]` but for aliased columns.
        target: `[r]`, the target's part: `upper' @ target` are its products with the features.
        inverse: `[r, r]`, of the columns of `upper` that are kept.
        residual: the target's sum of squares that the features leave; 0 where it is minute and may be rounding alone.
        left: `[a + 1, a + 1]`, what is left of the products of the target, first, and the `a` aliased columns.
    """

    kept: list[int]
    aliased: list[int]
    combinations: list[tuple[int, ...]]
    upper: Extended
    target: Extended
    inverse: Extended
    residual: float
    left: Extended

    def condition_number(self) -> float | None:
        """2-norm condition of the kept columns at unit length; None if there are none."""
        if not self.kept:
            return None
        square = self.upper.hi[:, self.kept]  # At unit length: units of the features are not ill conditioning.
        return condition(square / np.sqrt(folded(square * square, axis=0)))

    def coefficients(self) -> Extended:
        """`[r]`: the optimum's weights of the kept features, the others being 0."""
        return self.inverse.matmul(self.target)


def factorise(
    products: Extended,
    *,
    rounding: np.ndarray,
    most: int,
    tolerance: float = ALIASED_BELOW,
    aliased: Sequence[int] | None = None,
) -> Factor:
    """Factorises `[d + 1, d + 1]` products, the target last.

    Args:
        products: weighted sums of products of the centred columns.
        rounding: float64 `[d + 1]`, the root of the sum of squares that one rounding of each column's raw numbers, or
            the arithmetic behind `products`, can make.
        most: columns that the rows can determine; those to the right are aliased, as by `lm`.
        tolerance: a column is aliased where at most this share of its length is left. The length is that of the
            centred column: R measures the raw one, and would drop a column of microseconds since 1970.
        aliased: the decision, if it was made before. Others are kept as far as anything is left of them.
    """
    count = products.shape[0] - 1
    lengths = np.sqrt(np.maximum(np.diag(products.hi), 0.0))
    work = _Elimination(products)
    inverse = np.zeros((count, count))
    combinations = []
    for column in range(count):
        r = len(work.kept)
        # Float64 is enough: these coefficients only name the combination and bound its rounding. `folded` rather than a
        # BLAS, whose last bits could decide.
        parts = folded(inverse[:r, :r] * work.rows.hi[:r, column])
        left = float(work.rest.hi[0, 0])
        could_be = _ROUNDINGS * (rounding[column] + folded(np.abs(parts) * rounding[work.kept]))
        if aliased is not None:
            leave = column in aliased or not left > 0
        else:
            # `left` is a sum of squares. A column that is made of others carries their rounding as well as its own.
            leave = left <= max(tolerance * lengths[column], could_be) ** 2
        if leave or r >= most:
            large = np.abs(parts) * lengths[work.kept] > _NEGLIGIBLE * lengths[column]
            varies = lengths[column] > _ROUNDINGS * rounding[column]
            combinations.append(tuple(np.array(work.kept, int)[large].tolist()) if varies else ())
            work.leave(column)
        else:
            work.keep(column)
            root = work.rows.hi[r, column]
            inverse[:r, r], inverse[r, r] = -parts / root, 1 / root
    return _finished(work, combinations, rounding, most)


class _Elimination:
    """Elimination of the features from left to right; each is kept or left out.

    Attributes:
        kept: feature numbers.
        aliased: feature numbers.
        rows: `[d, d + 1]`, of the factor.
        rest: what is left of the products of the features to come, the target and the aliased features, in this order.
    """

    def __init__(self, products: Extended):
        count = products.shape[0] - 1
        self.kept: list[int] = []
        self.aliased: list[int] = []
        self.rows = Extended.zeros(count, count + 1)
        self.rest = products

    def leave(self, column: int) -> None:
        # To the end, not out: the products of aliased columns that are left belong to the loss about the optimum.
        last = [*range(1, self.rest.shape[0]), 0]
        self.rest = self.rest[np.ix_(last, last)]
        self.aliased.append(column)

    def keep(self, column: int) -> None:
        root = self.rest[0, 0].sqrt()
        row = self.rest[0, 1:] / root
        r, count = len(self.kept), self.rows.shape[0]
        self.rows[r, column] = root
        self.rows[r, [*range(column + 1, count + 1), *self.aliased]] = row
        self.rest = self.rest[1:, 1:] - row[:, None] * row[None, :]
        self.kept.append(column)


def _finished(work: _Elimination, combinations: list[tuple[int, ...]], rounding: np.ndarray, most: int) -> Factor:
    kept, r = work.kept, len(work.kept)
    upper, target = work.rows[:r, :-1], work.rows[:r, -1]
    inverse = _inverse(upper[:, kept])
    weights = np.abs(inverse.matmul(target).hi)
    residual = float(work.rest.hi[0, 0])
    # Each number may be off by its own rounding, all in the same direction. But a residual that could be rounding need
    # not be: above `_EXACT` of the target's length it stays, as by `lm`.
    length = np.sqrt(max(residual, 0.0) + float(folded(target.hi * target.hi)))
    noise = min(rounding[-1] + float(folded(weights * rounding[kept])), _EXACT * length) ** 2
    return Factor(
        kept=kept,
        aliased=work.aliased,
        combinations=combinations,
        upper=upper,
        target=target,
        inverse=inverse,
        residual=residual if residual > noise and r < most else 0.0,
        left=work.rest,
    )


def _inverse(upper: Extended) -> Extended:
    """The inverse of an upper triangular matrix `[r, r]`, by back substitution."""
    r = upper.shape[0]
    rest, inverse = Extended.of(np.eye(r)), Extended.zeros(r, r)
    for k in reversed(range(r)):
        inverse[k] = rest[k] / upper[k, k]
        rest[:k] = rest[:k] - upper[:k, k, None] * inverse[None, k, :]
    return inverse
