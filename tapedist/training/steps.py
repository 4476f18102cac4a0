"""The compiled step: sums over rows, then the update that they make.

Legend: `P` parameters, `R` replicas, `s` optimizer slots.

The state is one flat float64 vector: the parameters `[P]`, then the optimizer's slots `[s * P]`. A step is

    sums      = of each replica's rows, at the parameters        (`row_sums.py`)
    totals    = added over the replicas                          (integers: the same numbers in any order)
    new state = divide, add the penalty, apply the update rule   (every replica, the same compiled function)

A compiled program serves all runs of one kind, whatever their rows. Whatever differs between them is an argument of
each call, one float64 vector, the settings: the limit of the loss, a zero that pins products, the bounds of the rows,
the weights of the penalty and the constants of the rule.

Each step has a record for the log: `(sum w*loss, sum w, penalty, rows, parameters...)`, all at the parameters before
its update; the parameters are there only if they are few.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.errors import MissingRowsError
from tapedist.training import exact
from tapedist.training.linear_sums import LinearSums
from tapedist.training.losses import Loss, is_custom
from tapedist.training.model import LinearModel, ModuleModel
from tapedist.training.optimizers import Optimizer
from tapedist.training.replicas import Replicas, all_added
from tapedist.training.row_sums import RowSums, Totals
from tapedist.training.tape_sums import ModuleSums, PlainSums

_PACKAGE = __name__.partition(".")[0] + "."
_MAX_RECORDED_PARAMETERS = 16  # More would make the records of a call large.
_RECORD_HEAD = 4


@dataclasses.dataclass(frozen=True)
class CallResult:
    """The result of one compiled call.

    Attributes:
        state: float64 `[P + s * P]` after the applied updates.
        records: float64 `[steps, columns]`, one per step begun; see the module's docstring.
        applied: updates applied; fewer than the records only if the last one would not have been finite.
        rough: which records have a loss on its first grid alone, boolean `[steps]`, or whether all have.
    """

    state: np.ndarray
    records: np.ndarray
    applied: int
    rough: np.ndarray | bool = False

    @property
    def losses(self) -> np.ndarray:
        """Weighted means over the rows of each step; NaN where they are rough and the step was applied."""
        # A rough loss is good enough for the error message of a step that diverged, but not for a log.
        means = self.records[:, 0] / np.where(self.records[:, 1] == 0, 1.0, self.records[:, 1])
        return np.where(self.rough & (np.arange(len(means)) < self.applied), math.nan, means)

    def complete(self, wanted: int | np.ndarray, split: str) -> CallResult:
        """Returns this result after checking that every step has summed each of its rows once.

        Args:
            wanted: the rows of every step, or int64 `[steps or more]`, those of each.
            split: "train" or "test".

        Raises:
            MissingRowsError: if not; the state must not be used.
        """
        check_rows(self.records[:, 3], wanted, split)
        return self

    @property
    def paths(self) -> np.ndarray:
        """The parameters before each step, float64 `[steps, P]`, or `[steps, 0]` where they are many."""
        return self.records[:, _RECORD_HEAD:]


def check_rows(found: np.ndarray, wanted: int | np.ndarray, split: str) -> None:
    """Raises if sums are not over all rows, as after an exchange that lost or repeated some.

    Args:
        found: `[k]`, rows that were summed.
        wanted: rows that each sum should have, or int64 `[k or more]`.
        split: "train" or "test".

    Raises:
        MissingRowsError: if they differ.
    """
    wanted = np.full(len(found), wanted) if np.ndim(wanted) == 0 else np.asarray(wanted)[: len(found)]
    wrong = np.flatnonzero(~(found == wanted))
    if len(wrong):
        raise MissingRowsError(
            f"{found[wrong[0]]:.17g} rows were summed where the {split} split has {wanted[wrong[0]]:d} to sum; nothing "
            "of this pass was applied, what the run has saved stays; this is a bug in tapedist or TensorFlow, please "
            "report it"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """The computation of a step: model, loss, update rule and arithmetic.

    Attributes:
        model: the model to fit.
        loss: per-example loss.
        optimizer: the update rule.
        dtype: compute type of the rows.
        l2: weight of the penalty on `model.penalized` parameters.
        arithmetic: "exact"; "fast", which is exact sums where they are fast and the known-answer test passes, else
            plain ones; or "plain" for floating-point sums in any order, which need neither float64 nor int64.
    """

    model: LinearModel | ModuleModel
    loss: Loss
    optimizer: Optimizer
    dtype: tf.DType
    l2: float = 0.0
    arithmetic: str = "exact"

    @property
    def row_sums_kind(self) -> type:
        """The class of `row_sums`."""
        linear = isinstance(self.model, LinearModel)
        if self.arithmetic == "plain" or (self.arithmetic == "fast" and not (linear and not is_custom(self.loss))):
            return PlainSums
        return LinearSums if linear else ModuleSums

    @property
    def row_major(self) -> bool:
        """Returns whether the sums need tiles `[T, d]` rather than `[d, T]`."""
        return self.row_sums_kind is not LinearSums

    def row_sums(self, *, weighted: bool, even: bool, on_cpu: bool) -> RowSums:
        """The object that sums rows.

        Args:
            weighted: whether the rows have weights.
            even: whether every call sums whole tiles.
            on_cpu: whether the replicas are CPUs.
        """
        kind = self.row_sums_kind
        if kind is not LinearSums:
            return kind(self.model, self.loss, self.dtype, weighted=weighted, on_cpu=on_cpu)
        model = self.model
        assert isinstance(model, LinearModel)
        return LinearSums(model.num_features, model.fit_intercept, self.loss, self.dtype, weighted=weighted, even=even)


class StepPrograms(Replicas):
    """The update from given sums; the base of the loops over steps.

    Args:
        strategy: of the replicas.
        problem: the step's computation.
        bounds: float64 `[d + 2]` of the rows, `Bounds.largest`; none where no rows are summed.
    """

    def __init__(self, *, strategy: tf.distribute.Strategy, problem: Problem, bounds: np.ndarray | None = None):
        super().__init__(strategy=strategy)
        self.problem = problem
        self.num_parameters = problem.model.num_parameters
        self.records_parameters = self.num_parameters <= _MAX_RECORDED_PARAMETERS
        self.record_width = _RECORD_HEAD + self.records_parameters * self.num_parameters
        self.bounds = np.zeros(0) if bounds is None else bounds
        # All constants in one flat vector: they are arguments of the program rather than part of it, so that runs with
        # other rates share one trace, and one argument costs less per call than several.
        penalty = (problem.l2, problem.model.penalized) if problem.l2 else ()
        constants = [np.asarray(value, np.float64) for value in (*penalty, *problem.optimizer.constants)]
        self._shapes = tuple(value.shape for value in constants)
        self._constants = np.concatenate([np.zeros(0), *(value.ravel() for value in constants)])

    def trace_once(self, *more: Hashable) -> None:
        """Shares the traces with other runs of the same kind; see `Replicas.share_traces`.

        Args:
            *more: whatever the traces depend on besides the arguments of this class.
        """
        problem = self.problem
        rule, model = problem.optimizer.rule, problem.model
        # A custom loss, model or rule may read variables outside of its arguments, so that its trace is not shared.
        if model.key is not None and not is_custom(problem.loss) and _is_plain(rule):
            kind = (bool(problem.l2), self._shapes, problem.optimizer.num_slots, problem.dtype, problem.arithmetic)
            self.share_traces((type(model), model.key, problem.loss, rule, kind, len(self.bounds), more))

    def settings(self, limit: float) -> np.ndarray:
        """The argument of a program that is specific to a run, float64 `[2 + d + 2 + c]`.

        Args:
            limit: a loss above it, or not finite, means divergence.
        """
        # The 0.0 is the zero that pins products: XLA cannot fold away what is an argument.
        return np.concatenate([[limit, 0.0], self.bounds, self._constants])

    @property
    def num_settings(self) -> int:
        return len(self.settings(0.0))

    def pinned(self, settings: tf.Tensor) -> Any:
        """The context in which a program of these `settings` is traced; see `exact.pinning`."""
        return exact.pinning(tf.bitcast(settings[1], tf.int64))

    def bounds_in(self, settings: tf.Tensor) -> tf.Tensor:
        return settings[2 : 2 + len(self.bounds)]

    def _constants_in(self, settings: tf.Tensor) -> tuple[list[Any], list[Any]]:
        """The penalty's weight and factors `[P]`, or nothing without a penalty; and the rule's constants."""
        sizes = [math.prod(shape) for shape in self._shapes]
        # `tf.split` refuses an empty list of sizes, which a custom rule without constants has.
        flat = tf.split(settings[2 + len(self.bounds) :], sizes) if sizes else []
        arrays = [tf.reshape(piece, shape) for piece, shape in zip(flat, self._shapes, strict=True)]
        first = len(arrays) - len(self.problem.optimizer.constants)
        return arrays[:first], arrays[first:]

    def apply(
        self, state: tf.Tensor, totals: Totals, step: tf.Tensor, settings: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Divides the sums, adds the penalty and applies the update rule: `(new state, record, ok)`.

        Args:
            state: float64 `[P + s * P]`.
            totals: over all rows of the step.
            step: int64, updates applied before this one.
            settings: float64, see `settings`; where the run has diverged, the state comes back as it was.
        """
        count, optimizer = self.num_parameters, self.problem.optimizer
        weights, constants = self._constants_in(settings)
        # A batch whose weights are all zero has a loss and a gradient of 0 rather than NaN.
        weight = tf.where(tf.equal(totals.weight, 0.0), tf.ones_like(totals.weight), totals.weight)
        theta, slots = state[:count], tf.reshape(state[count:], [optimizer.num_slots, count])
        # One scalar quotient, then products: XLA may rewrite `vector / scalar` as a product with a reciprocal, which
        # differs in the last bit.
        gradient = exact.pin(totals.gradient * exact.pin(tf.ones_like(weight) / weight))
        penalty = tf.zeros([], tf.float64)
        if weights:
            l2, penalized = weights
            penalty = exact.pin(l2 * exact.folded(exact.pin(exact.pin(penalized * theta) * theta)))
            gradient += exact.pin(exact.pin((l2 + l2) * penalized) * theta)
        number = tf.cast(step + 1, tf.float64)  # Updates are counted from 1 here, as Adam's paper does.
        new_theta, new_slots = optimizer.rule(theta, slots, gradient, number, *constants)
        new_state = tf.concat([new_theta, tf.reshape(new_slots, [-1])], 0)
        # Multiplied rather than divided, and `<=`, so that NaN is not ok. A step that is not ok leaves the state as it
        # was.
        ok = totals.ok & (totals.loss <= settings[0] * weight) & tf.math.is_finite(totals.loss)
        ok &= _all(tf.math.is_finite(new_state))
        record = tf.stack([totals.loss, totals.weight, penalty, totals.rows])
        if self.records_parameters:
            record = tf.concat([record, theta], 0)
        return tf.where(ok, new_state, state), record, ok

    def apply_sums(
        self, row_sums: RowSums, state: tf.Tensor, sums: tf.Tensor, step: tf.Tensor, settings: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Calls `apply` with the totals that the sums of all rows represent."""
        totals = row_sums.total(state[: self.num_parameters], self.bounds_in(settings), sums)
        return self.apply(state, totals, step, settings)

    def repeat(self, one_step: Callable[..., Any], state: tf.Tensor, num_steps: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Runs `one_step(i, state) -> per-replica (state, record, ok)` until done or not ok, as graph operations.

        Returns:
            `(state, records [num_steps, columns], begun, applied)`.
        """

        def body(i, state, records, applied, _):  # type: ignore[no-untyped-def]
            # All replicas compute the same numbers, so that the first local one's do.
            state, record, ok = (self.strategy.experimental_local_results(v)[0] for v in one_step(i, state))
            return i + 1, state, records.write(i, record), applied + tf.cast(ok, tf.int32), ok

        # A loop around `strategy.run`, not in it: a collective must not stand in control flow inside a replica
        # function. Steps depend on each other, so that none may begin before the last one ends:
        # `parallel_iterations=1`.
        records = tf.TensorArray(tf.float64, num_steps, element_shape=[self.record_width])
        start = (tf.constant(0), state, records, tf.constant(0), tf.constant(True))
        begun, state, records, applied, _ = tf.while_loop(
            lambda i, *rest: (i < num_steps) & rest[-1], body, start, parallel_iterations=1
        )
        return state, records.stack(), begun, applied

    def result(self, state: tf.Tensor, records: tf.Tensor, begun: tf.Tensor, applied: tf.Tensor) -> CallResult:
        """A compiled loop's results on the host."""
        # Records have the fixed length of a program; those of steps that were not begun are zeros.
        return CallResult(state.numpy(), records.numpy()[: int(begun)], int(applied))


class RowPrograms(StepPrograms):
    """Steps that sum rows.

    Args:
        weighted: whether the rows have weights.
        even: whether every call sums whole tiles.
        parallel: tiles or blocks that a replica sums at the same time.
        **programs: see `StepPrograms`.
    """

    def __init__(self, *, weighted: bool, even: bool, parallel: int, **programs: Any):
        super().__init__(**programs)
        self.weighted, self.even, self.parallel = weighted, even, parallel
        self.row_sums = self.problem.row_sums(weighted=weighted, even=even, on_cpu=self.on_cpu)

    def trace_once(self, *more: Hashable) -> None:
        super().trace_once(self.weighted, self.even, self.parallel, *more)

    @functools.cached_property
    def compiled_sums(self) -> Any:
        """`(theta, settings, rows, count) -> sums` of all tiles of `rows`."""

        def sums(theta, settings, rows, count):  # type: ignore[no-untyped-def]
            with self.pinned(settings):
                return self.row_sums.of_tiles(theta, self.bounds_in(settings), rows, count)

        compiled = tf.function(sums, jit_compile=True, autograph=False)
        if self.row_sums.whole:
            return compiled

        def tile_by_tile(theta, settings, rows, count):  # type: ignore[no-untyped-def]
            # A tile's program is compiled alone, so that its bits do not depend on the program around it; its calls run
            # side by side on the cores, as their integer sums have no order.
            tiles, length = rows[1].shape

            def trip(k, sums):  # type: ignore[no-untyped-def]
                tile = tuple(column[k : k + 1] for column in rows)
                tile = tuple(tf.ensure_shape(t, [1, *c.shape[1:]]) for t, c in zip(tile, rows, strict=True))
                left = tf.clip_by_value(count - k * length, 0, length)
                return k + 1, sums + compiled(theta, settings, tile, left)

            needed = tf.minimum(-(-count // length), tiles)
            start = (tf.constant(0), self.row_sums.zero)
            return tf.while_loop(lambda k, _: k < needed, trip, start, parallel_iterations=self.parallel)[1]

        return tile_by_tile

    @functools.cached_property
    def compiled_apply(self) -> Any:
        """`(state, sums of all rows, step, settings) -> (new state, record, ok)`."""

        def apply(state, sums, step, settings):  # type: ignore[no-untyped-def]
            with self.pinned(settings):
                return self.apply_sums(self.row_sums, state, sums, step, settings)

        return tf.function(apply, jit_compile=True, autograph=False)

    def add_and_apply(self, state: tf.Tensor, sums: tf.Tensor, step: tf.Tensor, settings: tf.Tensor) -> Any:
        """`apply` on all replicas' sums; called on each replica with its own."""
        return self.compiled_apply(state, all_added(sums), step, settings)


def _all(truths: tf.Tensor) -> tf.Tensor:
    """Returns whether all of `[k]` are true."""
    # A few one by one, which XLA fuses with what is around them; a reduction would be a kernel of its own.
    if truths.shape[0] > _MAX_RECORDED_PARAMETERS:
        return tf.reduce_all(truths)
    return functools.reduce(tf.logical_and, tf.unstack(truths))


def _is_plain(function: Callable[..., Any]) -> bool:
    """Returns whether a function depends on its arguments alone: it is one of this package, and no closure."""
    return inspect.isfunction(function) and not function.__closure__ and function.__module__.startswith(_PACKAGE)


def empty(steps: int, *, width: int) -> tf.Tensor:
    """Records of up to `steps` steps, float64 `[width]` each."""
    # Of a fixed size, so that XLA makes one buffer of the list, which a loop updates in place.
    return tf.raw_ops.TensorListReserve(element_shape=[width], num_elements=steps, element_dtype=tf.float64)


def with_row(records: tf.Tensor, step: tf.Tensor, record: tf.Tensor) -> tf.Tensor:
    """`records` with `record` `[width]` at `step`."""
    return tf.raw_ops.TensorListSetItem(input_handle=records, index=step, item=record)


def stacked(records: tf.Tensor, steps: int, *, width: int) -> tf.Tensor:
    """All records as one float64 tensor `[steps, width]`; those never set are zeros."""
    return tf.raw_ops.TensorListStack(
        input_handle=records, element_shape=[width], element_dtype=tf.float64, num_elements=steps
    )
