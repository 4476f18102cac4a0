"""The metric of training steps and of the distance to the optimum: the curvature of squared error, and its adaptations
to a run's rows and loss.

Legend: `n` rows, `d` features, `P` parameters in the units of training (the weights, then the bias if there is one).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tapedist.data.exact_arithmetic import ExactSums, chain, eliminated, folded, outer_sum, sliced_product
from tapedist.data.exact_moments import ExactMoments, as_columns
from tapedist.data.ranges import ranges
from tapedist.data.source import Ranges, Source, row_blocks
from tapedist.data.standardize import RawUnits, StandardUnits
from tapedist.regression.curvature import inverse_hessian
from tapedist.regression.least_squares import LeastSquares

# The residuals' density at 0 is that of rows within this share of their deviation.
_WINDOW = 0.25
_DEPENDENT = 1e-13  # Share of a column's squares that is left where it depends on others.


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
    """The squared loss about its optimum, in the units of training.

    Attributes:
        fit: the optimum of the same rows, raw.
        units: those of training.
    """

    fit: LeastSquares
    units: RawUnits | StandardUnits

    @functools.cached_property
    def _factor(self) -> np.ndarray:
        return self.units.factor if isinstance(self.units, StandardUnits) else np.ones(len(self.fit.names))

    @functools.cached_property
    def _center(self) -> np.ndarray:
        return self.units.center if isinstance(self.units, StandardUnits) else np.zeros(len(self.fit.names))

    def inverse_hessian(self, l2: float | np.ndarray = 0.0) -> np.ndarray:
        """Of squared error with a penalty, float64 `[P, P]`; zeros for features that are left out."""
        form = self.fit.form
        with np.errstate(divide="ignore", invalid="ignore"):
            root = form.inverse.hi / np.where(self._factor > 0, self._factor, np.inf)[:, np.newaxis]
        inverse = float(form.total.hi) * outer_sum(root, root)
        means = (form.means.hi - self._center) * self._factor
        return inverse_hessian(inverse, means=means, fit_intercept=self.fit.fit_intercept, l2=l2)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Returns whether each feature is trained and not left out by the optimum, bool `[d]`."""
        return (self._factor > 0) & (np.abs(self.fit.form.inverse.hi).max(axis=1, initial=0.0) > 0)

    def length(self, move: np.ndarray) -> float:
        """The root mean square of the change of the predictions by a move `[P]`."""
        form, weights = self.fit.form, move[: len(self._factor)] * self._factor
        slopes = folded(form.factor.upper.hi * (weights * (form.scale[:-1] / form.scale[-1])))
        squares = float(folded(slopes * slopes)) / float(form.total.hi)
        if self.fit.fit_intercept:  # Else the products are about 0 and hold the whole length.
            at_means = (float(folded(weights * (form.means.hi - self._center))) + float(move[-1])) / form.scale[-1]
            squares += float(at_means * at_means)
        return math.sqrt(squares) * float(form.scale[-1])

    @functools.cached_property
    def target_deviation(self) -> float:
        """The target's deviation about its mean; without an intercept about 0."""
        at = self.optimum()
        if self.fit.fit_intercept:
            at[-1] = 0.0
        return math.sqrt(self.length(at) ** 2 + self.fit.loss)

    @property
    def standard_error(self) -> float | None:
        """The length of a move that is a standard error of least squares in its direction; None or 0 if there is none.

        No parameter moves by more of its own standard errors than the whole does (Scheffe's bound).
        """
        df = self.fit.degrees_of_freedom
        return math.sqrt(self.fit.loss / df) if df > 0 else None

    def rows(self, source: Source) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The training rows in the units of training: `(z [k, d], y [k], w [k])`, those of weight 0 left out."""
        for x, y, w in row_blocks(source, "train"):
            w = np.ones(len(y)) if w is None else np.ldexp(w, -source.weight_exponent)
            x, y, w = x[w > 0], y[w > 0], w[w > 0]
            yield (x - self._center) * self._factor, y - self._target_center, w

    def in_units(self, known: Ranges) -> Ranges:
        """Converts ranges of the source to those of `rows`."""
        # Each step is monotone even when rounded, so that extremes stay extremes.
        center, factor = np.append(self._center, self._target_center), np.append(self._factor, 1.0)
        return Ranges((known.low - center) * factor, (known.high - center) * factor, known.weight)

    def predictions(self, z: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Predictions of rows `z [k, d]`, in the units of training."""
        count = len(self._factor)
        return chain(z, parameters[:count], float(parameters[count]) if self.fit.fit_intercept else 0.0)

    @property
    def _target_center(self) -> float:
        return self.units.target_center if isinstance(self.units, StandardUnits) else 0.0

    def optimum(self) -> np.ndarray:
        """The least-squares optimum, float64 `[P]`."""
        form = self.fit.form
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = np.where(self._factor > 0, form.weights.hi / self._factor, 0.0)
        if not self.fit.fit_intercept:
            return weights
        at_center = (form.weights * self._center).sum() + form.bias - self._target_center
        return np.append(weights, float(at_center.hi))


def largest_leverage(source: Source, fit: LeastSquares) -> float:
    """The largest of `w / mean(w) * z' C**-1 z` over the training rows, with `C` the mean of `w z z' / mean(w)`."""
    form, known, largest = fit.form, ranges(source, "train"), 0.0
    means = form.means.hi
    bounds = np.maximum(np.abs(known.low[:-1] - means), np.abs(known.high[:-1] - means))
    for x, _, w in row_blocks(source, "train"):
        used = slice(None) if w is None else w > 0
        roots = sliced_product(x[used] - means, form.inverse.hi, bounds)
        leverage = folded(roots * roots) + form.intercept_at_means
        # Weights as the form has them, in units of a power of two.
        leverage = leverage * (1.0 if w is None else w[used] / form.weight_scale)
        largest = max(largest, float(leverage.max(initial=0.0)))
    return largest * fit.num_rows


def share_of_small_residuals(source: Source, metric: Metric, delta: float) -> float:
    """Estimates the share of rows whose residual at the least-squares optimum is within `delta`, above 0.

    Where `delta` is small against the residuals, few rows or none are; then it is `delta` times the density around 0.
    """
    window = max(delta, _WINDOW * (metric.fit.residual_std or 0.0))
    at, sums = metric.optimum(), ExactSums(np.full(2, ranges(source, "train").weight))
    for z, y, w in metric.rows(source):
        near = np.abs(metric.predictions(z, at) - y) <= window
        sums.add(np.stack([w * near, w]))
    inside, total = sums.values().tolist()
    return max(inside / total, 1 / metric.fit.num_rows) * delta / window


class Gap(NamedTuple):
    """The distance of parameters from the optimum of their objective.

    Attributes:
        standard_errors: in standard errors, at most; None where there are none, or where it cannot be estimated.
        excess: of the loss, with its penalty, above the least possible; None where it cannot be estimated.
    """

    standard_errors: float | None
    excess: float | None


class NewtonGap:
    """The gap by the step that Newton's method would take, for the huber loss and for squared error.

    Both are quadratic as long as no residual passes `delta`; so near the optimum the step leads to it.

    Args:
        metric: of the rows.
        source: the rows, raw.
        delta: where the loss turns linear; infinite for (half of) squared error.
        l2: of the penalty on each parameter, `[P]`.
    """

    def __init__(self, metric: Metric, source: Source, *, delta: float, l2: np.ndarray):
        self._metric, self._source, self._delta, self._l2 = metric, source, delta, l2

    def __call__(self, parameters: np.ndarray) -> Gap:
        """The gap of `parameters` `[P]`, in units of training."""
        if not np.isfinite(parameters).all():
            return Gap(None, None)
        curved, total, sums = self._sums(parameters)
        if not curved.num_rows:
            return Gap(None, None)
        d, intercept, free = curved.num_features, self._metric.fit.fit_intercept, np.flatnonzero(self._metric.counts)
        squares, slope, l2 = sums[0] / total, sums[1:] / total + 2 * self._l2 * parameters, self._l2[:d]
        # The Newton system for the weights, with the intercept eliminated: its matrix has the moments about the means.
        share = 2.0**curved.weight_exponent / total
        inside = float(curved.total()[0]) * share
        exponents = curved.exponents[free]
        products = (curved.centred() if intercept else curved.about_zero())[0][np.ix_(free, free)] * share
        matrix = np.ldexp(products, np.add.outer(exponents, exponents)) + 2 * np.diag(l2[free])
        means = curved.means()[0][:d] if intercept else np.zeros(d)
        right = slope[:d] - means * (slope[d] if intercept else 0.0)
        # At unit diagonal, so that each pivot is the share of a column's square that is left; see `_DEPENDENT`.
        lengths = np.sqrt(np.where(np.diag(matrix) > 0, np.diag(matrix), 1.0))
        solved, pivots = eliminated(matrix / lengths / lengths[:, np.newaxis], (right[free] / lengths)[:, np.newaxis])
        if not (pivots > _DEPENDENT).all():
            return Gap(None, None)
        move = np.zeros(len(parameters))
        move[free] = solved[:, 0] / lengths
        if intercept:
            move[d] = slope[d] / inside - folded(means * move[:d])
        # Standard errors of the estimate itself (Huber, "Robust statistics", 1981, 7.6), or those of least squares if
        # they are smaller.
        own = math.sqrt(squares) / inside / math.sqrt(self._metric.fit.num_rows)
        errors = [e for e in (own, self._metric.standard_error) if e]
        excess = float(folded(slope * move)) / 2
        return Gap(self._metric.length(move) / min(errors) if errors else None, excess)

    def _sums(self, parameters: np.ndarray) -> tuple[ExactMoments, float, np.ndarray]:
        """Moments of the rows whose residual is within `delta`, the sum of all weights, and the sums over all rows of
        squares of residuals, cut there, and of the gradient `[1 + P]`.
        """
        metric, delta = self._metric, self._delta
        known, d, intercept = metric.in_units(self._ranges), len(metric.fit.names), metric.fit.fit_intercept
        curved = ExactMoments(known, names=metric.fit.names, num_slices=3)
        largest = np.maximum(np.abs(known.low), np.abs(known.high))
        most = (float(folded(largest[:d] * np.abs(parameters[:d]))) + largest[d] + abs(float(parameters[-1]))) * 2
        # Sums need a bound of their terms, as in training; a residual is cut at `delta` in all of them.
        most = min(most, delta)
        if not most * most < np.inf:
            return curved, 1.0, np.full(1 + len(parameters), np.nan)
        bounds = [1.0, most * most, *(most * largest[:d]), *([most] if intercept else [])]
        sums = ExactSums(known.weight * np.array(bounds) * (1 + 2.0**-20))
        for z, y, w in metric.rows(self._source):
            residuals = metric.predictions(z, parameters) - y
            near = np.abs(residuals) <= delta
            bounded = np.clip(residuals, -delta, delta)
            pull = w * bounded
            sums.add(np.stack([w, pull * bounded, *(pull * z.T), *([pull] if intercept else [])]))
            curved.add(as_columns(z[near], y[near]), w[near])
        total, *rest = sums.values().tolist()
        return curved, total, np.array(rest)

    @functools.cached_property
    def _ranges(self) -> Ranges:
        return ranges(self._source, "train")
