"""The loss about its optimum: `L(theta) - L(optimum)`, and the matrix behind standard errors.

Legend: `d` features, `r` of them kept, `a` aliased. Columns of products are in scaled units, all results in raw units.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tapedist.regression.double_double import Extended
from tapedist.regression.factor import Factor

# Error of sums and factors in double-double arithmetic, relative to a column's length: the root of a few roundings.
_ARITHMETIC = 2.0**-51


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CentredMoments:
    """Second moments in scaled units, the input of the factorisation.

    Attributes:
        num_rows: rows of positive weight.
        total: sum of weights, divided by `weight_scale`.
        weight_scale: a power of two.
        means: `[d + 1]`, raw units; zero without an intercept.
        products: `[d + 1, d + 1]`, of centred columns divided by `scale`.
        target_about_mean: the target's sum of squares about its mean, intercept or not.
        scale: float64 `[d + 1]`, powers of two.
        exact: bool `[d + 1]`, whether a column's numbers are rounded at all.
        fit_intercept: whether there is an intercept.
    """

    num_rows: int
    total: Extended
    weight_scale: float
    means: Extended
    products: Extended
    target_about_mean: float
    scale: np.ndarray
    exact: np.ndarray
    fit_intercept: bool

    def rounding(self, precision: float) -> np.ndarray:
        """`[d + 1]`: the root of the sum of squares that rounding of the raw numbers by `precision`, and the arithmetic
        on them, can make.
        """
        squares = np.maximum(np.diag(self.products.hi), 0.0)
        # Rounding is relative to the raw numbers, so a column far from 0 has more of it than its spread shows.
        means = self.means.hi / self.scale if self.fit_intercept else np.zeros(len(self.scale))
        raw = np.where(self.exact, 0.0, precision**2 * (squares + float(self.total.hi) * means**2))
        return np.sqrt(raw + _ARITHMETIC**2 * squares)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LossAboutOptimum:
    """`L(theta) - L(optimum)` about the optimum, in extended precision.

    Attributes:
        factor: of the products of the scaled columns.
        scale: float64 `[d + 1]`, the divisor of each column.
        total: sum of weights, in the units of the products.
        means: `[d]`, of the features; zero without an intercept.
        weights: `[d]`, the optimum, raw units; 0 for aliased features.
        bias: its intercept.
        inverse: `[d, r]` with `(X' W X)**-1 = inverse @ inverse' / weight_scale` of the centred rows, raw units; rows
            of aliased features are 0.
        weight_scale: the divisor of the weights.
        fit_intercept: whether there is an intercept.
    """

    factor: Factor
    scale: np.ndarray
    total: Extended
    means: Extended
    weights: Extended
    bias: Extended
    inverse: Extended
    weight_scale: float
    fit_intercept: bool

    def excess(self, weights: np.ndarray, bias: float | Extended) -> float:
        """`L(weights, bias) - L(optimum)`; below 0 only where the weight of an aliased feature lowers the loss."""
        # A sum of squares of a triangular factor times the offset: nothing is subtracted, so it keeps its digits near
        # the optimum, where the difference of two losses would lose them.
        offset = Extended.of(weights) - self.weights
        scaled = offset.scaled(self.scale[:-1] / self.scale[-1])
        slope_part = self.factor.upper.matmul(scaled)
        total = float((slope_part * slope_part).sum().hi) + self._of_aliased(scaled[self.factor.aliased])
        # Without an intercept the products are about 0 and contain the whole loss; the means are 0 then.
        mean_part = (offset * self.means).sum() + bias - self.bias
        return float(total / float(self.total.hi) * self.scale[-1] ** 2 + mean_part.hi**2)

    def _of_aliased(self, offset: Extended) -> float:
        """The part of the excess that weights of aliased features `[a]` add beyond the kept ones' part."""
        if not offset.hi.any():
            return 0.0
        own = (offset * self.factor.left[1:, 1:].matmul(offset)).sum()
        return float((own - 2 * (offset * self.factor.left[0, 1:]).sum()).hi)

    def leverage(self, x: np.ndarray) -> np.ndarray:
        """Variances of the mean response at `x [k, d]`, in units of the residual variance of a row of `weight_scale`.

        Aliased features do not count: nothing is known of them where `x` differs from the rows' combination.
        """
        return (((x - self.means.hi) @ self.inverse.hi) ** 2).sum(axis=1) + self.intercept_at_means

    @property
    def intercept_at_means(self) -> float:
        return 1 / float(self.total.hi) if self.fit_intercept else 0.0

    def unit_errors(self) -> np.ndarray:
        """Standard errors `[d + 1]`, in units of the residual standard deviation of a row of `weight_scale`.

        Of the weights and the intercept.
        """
        at_zero = self.inverse.T.matmul(self.means)
        bias = float((at_zero * at_zero).sum().hi) + self.intercept_at_means
        # In units of their own, powers of two: the square of a weight's error may overflow where the error does not.
        largest = np.abs(self.inverse.hi).max(axis=1, initial=0.0)
        units = np.ldexp(1.0, np.frexp(largest)[1] - 1)
        rows = self.inverse.scaled(1 / units[:, None])
        squares = (rows * rows).sum(axis=1).hi
        return np.sqrt(np.append(squares, bias)) * np.append(units, 1.0)


def loss_about_optimum(moments: CentredMoments, factor: Factor) -> LossAboutOptimum:
    """Makes the loss about the optimum from a factorisation; aliased features have weight 0 there."""
    count, scale = len(moments.scale) - 1, moments.scale
    weights = Extended.zeros(count)
    weights[factor.kept] = factor.coefficients()
    weights = weights.scaled(scale[-1] / scale[:-1])
    inverse = Extended.zeros(count, len(factor.kept))
    inverse[factor.kept] = factor.inverse
    bias = moments.means[count] - (weights * moments.means[:count]).sum()
    return LossAboutOptimum(
        factor=factor,
        scale=scale,
        total=moments.total,
        means=moments.means[:count],
        weights=weights,
        bias=bias,
        inverse=inverse.scaled(1 / scale[:-1, None]),
        weight_scale=moments.weight_scale,
        fit_intercept=moments.fit_intercept,
    )
