"""The squared loss of a linear model as the quadratic form of the rows' second moments.

Legend: `d` features, `P` parameters, `W` the sum of weights, `C` centred products, `m` means (`moments.py`).

With `S = Cxx / W` and an optimum `(w*, b*)`, for any parameters `(w, b)`, without a division of large numbers or a
difference of nearly equal ones:

    L(w, b) = L* + dw' S dw + (db + dw . mx)**2        dw = w - w*, db = b - b*

Without an intercept the last term is `(dw . mx)**2` and `w*` solves `(Cxx / W + mx mx') w = Cxy / W + mx my`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.regression.least_squares import Moments
from tapedist.training import exact
from tapedist.training import steps as step_records
from tapedist.training.row_sums import Totals, value_and_gradient
from tapedist.training.schedule import MAX_STEPS_PER_CALL
from tapedist.training.steps import CallResult, StepPrograms

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
            optimum = np.append(weights, my - _ordered_dot(weights, mx))
        else:
            optimum, residual = _solved(spread + np.multiply.outer(mx, mx), cross + mx * my, target + my * my)
        return cls(optimum, max(0.0, residual), spread, mx, fit_intercept)

    @property
    def parts(self) -> list[np.ndarray]:
        """The form as vectors for the programs: the optimum `[P]`, the loss there `[1]`, `S` `[d * d]`, means `[d]`."""
        return [self.optimum, np.array([self.least]), self.spread.ravel(), self.means]


def _ordered_dot(a: np.ndarray, b: np.ndarray) -> float:
    """A dot product added from left to right, with the same bits under any BLAS."""
    # `accumulate` adds in order by definition; `sum` and `dot` add pairwise, by vectors or by threads.
    return float(np.add.accumulate(a * b)[-1])


def _solved(matrix: np.ndarray, right: np.ndarray, target: float) -> tuple[np.ndarray, float]:
    """Least squares from products: the solution, with 0 for dependent columns, and the residual of `target`.

    Gaussian elimination of the bordered matrix at unit diagonal, by elementwise operations only, so that the bits do
    not depend on a BLAS library or its threads.
    """
    count = len(right)
    scale = np.sqrt(np.maximum(np.diag(matrix), 0.0))  # Rounding may leave slightly negative numbers.
    scale = np.where(scale > 0, scale, 1.0)
    table = np.empty([count + 1, count + 1])
    table[:count, :count] = matrix / np.multiply.outer(scale, scale)
    table[:count, count] = table[count, :count] = right / scale
    table[count, count] = target
    pivots = []
    for k in range(count):
        # The diagonal was 1, so this is the share of a column that those before it leave. Rows of columns that are
        # skipped stay in the table, and the back substitution passes them by.
        if table[k, k] > _DEPENDENT:
            pivots.append(k)
            factors = table[k + 1 :, k] / table[k, k]
            table[k + 1 :, k + 1 :] -= np.multiply.outer(factors, table[k, k + 1 :])
    solution = np.zeros(count)
    for k in reversed(pivots):
        above = _ordered_dot(table[k, k + 1 : count], solution[k + 1 :]) if k + 1 < count else 0.0
        solution[k] = (table[k, count] - above) / table[k, k]
    return solution / scale, float(table[count, count])


class QuadraticSteps(StepPrograms):
    """Thousands of epochs on a quadratic form, as one XLA program; every worker computes all of it."""

    def __init__(self, **programs: Any):
        super().__init__(**programs)
        self.trace_once()

    @functools.cached_property
    def _loop(self) -> Any:
        return functools.cache(self._program)

    def _program(self, num_features: int) -> Any:
        """The program; its argument is `[*state, step, number of steps, *settings, *QuadraticForm.parts]`."""
        count, d = self.num_parameters, num_features
        sizes = [count + self.problem.optimizer.num_slots * count, 1, 1, self.num_settings, count, 1, d * d, d]

        def loop(numbers):  # type: ignore[no-untyped-def]
            state, step, num_steps, settings, optimum, least, spread, means = tf.split(numbers, sizes)
            step, num_steps = tf.cast(step[0], tf.int64), tf.cast(num_steps[0], tf.int32)
            least, spread = least[0], tf.reshape(spread, [d, d])

            def body(i, state, records, _):  # type: ignore[no-untyped-def]
                totals = self._totals(state[:count], optimum, least, spread, means)
                state, record, ok = self.apply(state, totals, step + tf.cast(i, tf.int64), settings)
                return i + 1, state, step_records.with_row(records, i, record), ok

            with self.pinned(settings):
                records = step_records.empty(MAX_STEPS_PER_CALL, width=self.record_width)
                start = (tf.constant(0), state, records, tf.constant(True))
                begun, state, records, ok = tf.while_loop(lambda i, *rest: (i < num_steps) & rest[-1], body, start)
            counts = tf.cast([begun, begun - tf.cast(~ok, tf.int32)], tf.float64)
            records = step_records.stacked(records, MAX_STEPS_PER_CALL, width=self.record_width)
            return tf.concat([state, counts], 0), records

        # A concrete function skips TensorFlow's look-up of a trace in each call.
        program = tf.function(loop, jit_compile=True, autograph=False)
        return program.get_concrete_function(tf.TensorSpec([sum(sizes)], tf.float64))

    def _totals(
        self, theta: tf.Tensor, optimum: tf.Tensor, least: tf.Tensor, spread: tf.Tensor, means: tf.Tensor
    ) -> Totals:
        """Totals as `apply` takes them, with the weight already divided out."""
        loss, gradient = value_and_gradient(lambda at: quadratic_loss(at - optimum, spread, means) + least, theta)
        # Rounding may leave S a negative eigenvalue, though a mean of squares is not negative. Not by `maximum`, which
        # may turn NaN into 0: a diverged run must stay NaN.
        loss = tf.where(loss < 0, tf.zeros_like(loss), loss)
        one = tf.ones([], tf.float64)
        return Totals(loss, one, gradient, one, tf.constant(True))

    def run(self, state: np.ndarray, form: QuadraticForm, *, step: int, num_steps: int, limit: float) -> CallResult:
        """Up to `num_steps` updates; arguments as in `SlotSteps.run`."""
        # Each tensor of a call costs more time than a hundred epochs, so there is one each way besides the records.
        # Steps and counts are float64 in it, exact up to 2**53.
        bounds = [step, min(num_steps, MAX_STEPS_PER_CALL), *self.settings(limit)]
        numbers, records = self._traced._loop(len(form.means))(
            tf.constant(np.concatenate([state, bounds, *form.parts]))
        )
        found = numbers.numpy()
        begun, applied = (int(number) for number in found[-2:])
        return CallResult(found[:-2], records.numpy()[:begun], applied)


def quadratic_loss(delta: tf.Tensor, spread: tf.Tensor, means: tf.Tensor) -> tf.Tensor:
    """`dw' S dw + (db + dw . mx)**2` at `delta` `[P]`; without a bias, `db = 0`."""
    d = means.shape[0]
    weights = delta[:d]
    offset = _dot(weights, means)
    square = _dot(weights, _times_matrix(spread, weights))
    if delta.shape[0] > d:
        offset += delta[d]
    return square + exact.times(offset, offset)


@tf.custom_gradient
def _dot(a: tf.Tensor, b: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], Any]]:
    """`a . b` by `folded`; with a custom gradient, so that the tape adds nothing in an order of its own."""

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return exact.pin(upstream * b), exact.pin(upstream * a)

    return exact.folded(exact.pin(a * b)), gradient


@tf.custom_gradient
def _times_matrix(matrix: tf.Tensor, vector: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], Any]]:
    """`matrix vector` of a symmetric matrix, by `folded`; without a gradient by the matrix."""

    # The gradient multiplies by the transpose, which is the same matrix. Sums run along the first axis in both.
    def product(vector: tf.Tensor) -> tf.Tensor:
        return exact.folded(exact.pin(matrix * vector[:, tf.newaxis]))

    return product(vector), lambda upstream: (None, product(upstream))
