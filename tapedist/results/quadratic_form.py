"""The loss about its optimum: `L(theta) - L(optimum)` and the shape that standard errors come from.

Legend: `d` features, `r` the rank. Columns of products are in scaled units, everything that leaves is in raw units.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tapedist.results.extended import Extended
from tapedist.results.factor import Factor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CentredMoments:
    """Second moments on the way to the solution: `products [d + 1, d + 1]` of centred columns divided by `scale`."""

    num_rows: int
    total: Extended
    weight_scale: float
    means: Extended
    products: Extended
    scale: np.ndarray
    fit_intercept: bool

    def rounding(self, precision: float) -> np.ndarray:
        """`[d + 1]`: the sum of squares that rounding the raw numbers relatively by `precision` can make."""
        means = self.means.hi / self.scale if self.fit_intercept else np.zeros(len(self.scale))
        return precision**2 * (np.diag(self.products.hi) + float(self.total.hi) * means**2)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QuadraticForm:
    """`L(theta) - L(optimum)` about one optimum, in extended precision.

    Attributes:
        factor: of the products of the scaled columns.
        scale: float64 `[d + 1]`, what each column was divided by.
        total: sum of weights, in the units of the products.
        means: `[d]`, of the features; zero without an intercept.
        weights: `[d]`, an optimum, raw units.
        bias: its intercept.
        inverse: `[d, r]` with `(X' W X)**-1 = inverse @ inverse' / weight_scale` of the centred rows, raw units.
        weight_scale: what weights were divided by.
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
        """`L(weights, bias) - L(optimum)`."""
        offset = Extended.of(weights) - self.weights
        scaled = (offset * (self.scale[:-1] / self.scale[-1]))[self.factor.order]
        slope_part = self.factor.upper.matmul(scaled)
        total = float((slope_part * slope_part).sum().hi) / float(self.total.hi)
        # Without an intercept the products are about 0 and hold the whole loss.
        mean_part = (offset * self.means).sum() + bias - self.bias
        return float(total * self.scale[-1] ** 2 + mean_part.hi**2)

    def leverage(self, x: np.ndarray) -> np.ndarray:
        """Variances of the mean response at `x [k, d]`, in units of the residual variance."""
        spread = (((x - self.means.hi) @ self.inverse.hi) ** 2).sum(axis=1)
        return (spread + self.intercept_at_means) / self.weight_scale

    @property
    def intercept_at_means(self) -> float:
        return 1 / float(self.total.hi) if self.fit_intercept else 0.0

    def unit_errors(self) -> np.ndarray:
        """Standard errors of the weights and the intercept, `[d + 1]`, in units of the residual standard deviation."""
        at_zero = self.inverse.T.matmul(self.means)
        bias = float((at_zero * at_zero).sum().hi) + self.intercept_at_means
        # In units of their own: squares of a weight's error may not fit where the error does.
        largest = np.abs(self.inverse.hi).max(axis=1, initial=0.0)
        units = np.ldexp(1.0, np.frexp(largest)[1] - 1)
        rows = self.inverse / units[:, None]
        squares = (rows * rows).sum(axis=1).hi
        return np.sqrt(np.append(squares, bias) / self.weight_scale) * np.append(units, 1.0)


def quadratic_form(moments: CentredMoments, factor: Factor) -> QuadraticForm:
    """The form about the optimum that a factorisation gives; dependent features have weight 0 there."""
    count, scale = len(moments.scale) - 1, moments.scale
    weights = Extended.zeros(count)
    weights[factor.independent] = factor.coefficients()
    weights = weights * (scale[-1] / scale[:-1])
    inverse = Extended.zeros(count, factor.rank)
    inverse[factor.independent] = factor.inverse()
    bias = moments.means[count] - (weights * moments.means[:count]).sum()
    return QuadraticForm(
        factor=factor,
        scale=scale,
        total=moments.total,
        means=moments.means[:count],
        weights=weights,
        bias=bias,
        inverse=inverse / scale[:-1, None],
        weight_scale=moments.weight_scale,
        fit_intercept=moments.fit_intercept,
    )
