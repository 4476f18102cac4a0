"""The squared loss of a linear model as the quadratic form that the rows' second moments define.

Legend: `d` features, `P` parameters, `W` the sum of weights, `C` centred products, `m` means (`moments.py`).

With `S = Cxx / W` and an optimum `(w*, b*)`, for any parameters `(w, b)`, without a division of large numbers or a
difference of nearly equal ones:

    L(w, b) = L* + dw' S dw + (db + dw . mx)**2        dw = w - w*, db = b - b*

Without an intercept the last term is `(dw . mx)**2` and `w*` solves `(Cxx / W + mx mx') w = Cxy / W + mx my`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.training.moments import Moments
from tapedist.training.steps import MAX_STEPS_PER_CALL, CallResult, StepPrograms, to_result, value_and_gradient

# Columns whose remaining sum of squares is below this share of their own are taken as dependent.
_DEPENDENT = 1e-13


@dataclasses.dataclass(frozen=True)
class QuadraticForm:
    """A squared loss around its optimum.

    Attributes:
        optimum: float64 `[P]`; if many are optimal, one of them.
        least: `L*`, the loss there.
        spread: float64 `[d, d]`: `S`.
        means: float64 `[d]`: `mx`.
        has_bias: whether the last parameter is a bias.
    """

    optimum: np.ndarray
    least: float
    spread: np.ndarray
    means: np.ndarray
    has_bias: bool

    @classmethod
    def of(cls, moments: Moments, *, fit_intercept: bool) -> QuadraticForm:
        """The form of a split's moments."""
        total = moments.sum_weights
        spread, cross = moments.centred[:-1, :-1] / total, moments.centred[:-1, -1] / total
        target = moments.centred[-1, -1] / total
        mx, my = moments.means[:-1], moments.means[-1]
        if fit_intercept:
            weights, residual = _solved(spread, cross, target)
            optimum = np.append(weights, my - _dot(weights, mx))
        else:
            optimum, residual = _solved(spread + np.multiply.outer(mx, mx), cross + mx * my, target + my * my)
        return cls(optimum, max(0.0, residual), spread, mx, fit_intercept)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """A dot product added in order, whatever library NumPy multiplies with."""
    return float(np.add.accumulate(a * b)[-1])


def _solved(matrix: np.ndarray, right: np.ndarray, target: float) -> tuple[np.ndarray, float]:
    """Least squares from products: the solution, with 0 for dependent columns, and what remains of `target`.

    Gaussian elimination of the bordered matrix at unit diagonal, by elementwise operations only, so that the bits do
    not depend on a BLAS library or its threads.
    """
    count = len(right)
    scale = np.sqrt(np.diag(matrix))
    scale = np.where(scale > 0, scale, 1.0)
    table = np.empty([count + 1, count + 1])
    table[:count, :count] = matrix / np.multiply.outer(scale, scale)
    table[:count, count] = table[count, :count] = right / scale
    table[count, count] = target
    pivots = []
    for k in range(count):
        if table[k, k] > _DEPENDENT:
            pivots.append(k)
            factors = table[k + 1 :, k] / table[k, k]
            table[k + 1 :, k + 1 :] -= np.multiply.outer(factors, table[k, k + 1 :])
    solution = np.zeros(count)
    for k in reversed(pivots):
        above = _dot(table[k, k + 1 : count], solution[k + 1 :]) if k + 1 < count else 0.0
        solution[k] = (table[k, count] - above) / table[k, k]
    return solution / scale, float(table[count, count])


class QuadraticSteps(StepPrograms):
    """Thousands of epochs on a quadratic form, as one XLA program; every worker runs the same one."""

    @functools.cached_property
    def _loop(self) -> Any:
        def loop(state, optimum, least, spread, means, step, num_steps, limit):  # type: ignore[no-untyped-def]
            def body(i, state, records, applied, _):  # type: ignore[no-untyped-def]
                total = self._total(state[: self.num_parameters], optimum, least, spread, means)
                state, record, ok = self.apply(state, total[tf.newaxis], step + tf.cast(i, tf.int64), limit)
                records = tf.tensor_scatter_nd_update(records, [[i]], record[tf.newaxis])
                return i + 1, state, records, applied + tf.cast(ok, tf.int32), ok

            records = tf.zeros([MAX_STEPS_PER_CALL, self.record_width], tf.float64)
            start = (tf.constant(0), state, records, tf.constant(0), tf.constant(True))
            begun, state, records, applied, _ = tf.while_loop(lambda i, *rest: (i < num_steps) & rest[-1], body, start)
            return state, records, begun, applied

        return tf.function(loop, jit_compile=True, autograph=False)

    def _total(
        self, theta: tf.Tensor, optimum: tf.Tensor, least: tf.Tensor, spread: tf.Tensor, means: tf.Tensor
    ) -> tf.Tensor:
        """`(loss, 1, gradient)` `[P + 2]`: a total as `apply` takes it, with the weight already divided out."""
        loss, gradient = value_and_gradient(lambda at: quadratic_loss(at - optimum, spread, means) + least, theta)
        return tf.concat([tf.stack([loss, tf.ones([], tf.float64)]), gradient], 0)

    def run(self, state: np.ndarray, form: QuadraticForm, *, step: int, num_steps: int, limit: float) -> CallResult:
        """Up to `num_steps` updates; arguments as in `SlotSteps.run`."""
        return to_result(
            *self._loop(
                tf.constant(state), tf.constant(form.optimum), tf.constant(form.least, tf.float64),
                tf.constant(form.spread), tf.constant(form.means), tf.constant(step, tf.int64),
                tf.constant(min(num_steps, MAX_STEPS_PER_CALL)), tf.constant(limit, tf.float64),
            )
        )  # fmt: skip


def quadratic_loss(delta: tf.Tensor, spread: tf.Tensor, means: tf.Tensor) -> tf.Tensor:
    """`dw' S dw + (db + dw . mx)**2` at `delta` `[P]`; without a bias, `db = 0`."""
    d = means.shape[0]
    weights = delta[:d]
    if d == 1:
        offset = weights[0] * means[0]
        square = weights[0] * weights[0] * spread[0, 0]
    else:
        offset = tf.reduce_sum(weights * means)
        square = tf.reduce_sum(weights * tf.linalg.matvec(spread, weights))
    if delta.shape[0] > d:
        offset += delta[d]
    return square + offset * offset
