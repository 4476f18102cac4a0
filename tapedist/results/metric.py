"""The metric in which training steps, and in which its distance to the optimum is measured: the curvature of squared
error, and what a run's rows and loss make of it.

Legend: `n` rows, `d` features, `P` parameters in the units of training (the weights, then the bias if there is one).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tapedist.data.blocks import Source
from tapedist.data.row_arrays import row_blocks
from tapedist.data.standardize import RawUnits, StandardUnits
from tapedist.results.least_squares import LeastSquares
from tapedist.training.stability import inverse_hessian

Heed = Callable[[], object]
# Rows that the residual's density at 0 is taken from: those within this share of its deviation.
_WINDOW = 0.25


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
        inverse = float(form.total.hi) * (root @ root.T)
        means = (form.means.hi - self._center) * self._factor
        return inverse_hessian(inverse, means=means, fit_intercept=self.fit.fit_intercept, l2=l2)

    @functools.cached_property
    def _hessian(self) -> np.ndarray:
        return np.linalg.pinv(self.inverse_hessian(), hermitian=True)

    def length(self, move: np.ndarray) -> float:
        """Root mean square `sqrt(move' H move / 2)` by which a move `[P]` changes the predictions."""
        return math.sqrt(max(0.0, float(move @ self._hessian @ move) / 2))

    @functools.cached_property
    def target_deviation(self) -> float:
        """Of the target, about its mean; without an intercept about 0."""
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

    def rows(self, source: Source, heed: Heed) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The training rows in the units of training: `(z [k, P], y [k], w [k])`, those of weight 0 left out."""
        target_center = self.units.target_center if isinstance(self.units, StandardUnits) else 0.0
        for x, y, w in row_blocks(source, "train", heed=heed):
            w = np.ones(len(y)) if w is None else np.ldexp(w, -getattr(source, "weight_exponent", 0))
            x, y, w = x[w > 0], y[w > 0], w[w > 0]
            z = (x - self._center) * self._factor
            z = np.column_stack([z, np.ones(len(y))]) if self.fit.fit_intercept else z
            yield z, y - target_center, w

    def optimum(self) -> np.ndarray:
        """The least-squares optimum, float64 `[P]`."""
        form = self.fit.form
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = np.where(self._factor > 0, form.weights.hi / self._factor, 0.0)
        if not self.fit.fit_intercept:
            return weights
        target_center = self.units.target_center if isinstance(self.units, StandardUnits) else 0.0
        at_center = (form.weights * self._center).sum() + form.bias - target_center
        return np.append(weights, float(at_center.hi))


def largest_leverage(source: Source, fit: LeastSquares, heed: Heed) -> float:
    """The largest of `w / mean(w) * z' C**-1 z` over the training rows, with `C` the mean of `w z z' / mean(w)`."""
    largest = 0.0
    for x, _, w in row_blocks(source, "train", heed=heed):
        used = slice(None) if w is None else w > 0
        # Weights as the form has them, in units of a power of two.
        leverage = fit.form.leverage(x[used]) * (1.0 if w is None else w[used] / fit.form.weight_scale)
        largest = max(largest, float(leverage.max(initial=0.0)))
    return largest * fit.num_rows


def share_of_small_residuals(source: Source, metric: Metric, delta: float, heed: Heed) -> float:
    """About the share of rows whose residual at the least-squares optimum is within `delta`, above 0.

    Where `delta` is small against the residuals, few rows or none would tell; then it is `delta` times the density
    around 0.
    """
    window = max(delta, _WINDOW * (metric.fit.residual_std or 0.0))
    at, inside, total = metric.optimum(), 0.0, 0.0
    for z, y, w in metric.rows(source, heed):
        inside += float(w[np.abs(z @ at - y) <= window].sum())
        total += float(w.sum())
    return max(inside / total, 1 / metric.fit.num_rows) * delta / window


class Gap(NamedTuple):
    """How far parameters are from the optimum of their own objective.

    Attributes:
        standard_errors: in standard errors, at most; None where there are none, or where the rows do not tell.
        excess: how much the loss, with its penalty, is above the least possible; None where the rows do not tell.
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
        heed: called now and then while rows are read; may raise to break it off.
    """

    def __init__(self, metric: Metric, source: Source, *, delta: float, l2: np.ndarray, heed: Heed):
        self._metric, self._source, self._delta, self._l2, self._heed = metric, source, delta, l2, heed

    def __call__(self, parameters: np.ndarray) -> Gap:
        """The gap of `parameters` `[P]`, in units of training."""
        hessian, gradient, inside, squares = self._sums(parameters)
        free = np.flatnonzero(np.diag(self._metric.inverse_hessian()) > 0)
        curved = hessian[np.ix_(free, free)]
        if not inside or not np.isfinite(gradient).all() or np.linalg.matrix_rank(curved, hermitian=True) < len(free):
            return Gap(None, None)
        move = np.zeros(len(parameters))
        move[free] = np.linalg.solve(curved, gradient[free])
        # Standard errors of the estimate itself (Huber, "Robust statistics", 1981, 7.6), or those of least squares if
        # they are smaller.
        own = math.sqrt(squares) / inside / math.sqrt(self._metric.fit.num_rows)
        errors = [e for e in (own, self._metric.standard_error) if e]
        return Gap(self._metric.length(move) / min(errors) if errors else None, float(gradient @ move) / 2)

    def _sums(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Hessian `[P, P]`, gradient `[P]`, the share of residuals within `delta`, and their mean square, cut there."""
        curvature, slope = np.zeros((len(parameters), len(parameters))), np.zeros(len(parameters))
        inside, squares, total = 0.0, 0.0, 0.0
        for z, y, w in self._metric.rows(self._source, self._heed):
            residuals = z @ parameters - y
            near = np.abs(residuals) <= self._delta
            bounded = np.clip(residuals, -self._delta, self._delta)
            curvature += (z[near] * w[near, np.newaxis]).T @ z[near]
            slope += (w * bounded) @ z
            inside, squares, total = inside + w[near].sum(), squares + w @ bounded**2, total + w.sum()
        hessian = curvature / total + 2 * np.diag(self._l2)
        return hessian, slope / total + 2 * self._l2 * parameters, inside / total, squares / total
