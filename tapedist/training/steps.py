"""The compiled step: sums over rows, then the update that they make.

Legend: `P` parameters, `R` replicas, `s` optimizer slots.

The state is one flat float64 vector: the parameters `[P]`, then the optimizer's slots `[s * P]`. A step is

    sums      = of each replica's rows, at the parameters        (`row_sums.py`)
    totals    = added over the replicas                          (integers: the same numbers in any order)
    new state = divide, add the penalty, apply the update rule   (every replica, the same compiled function)

A compiled program serves all runs of one kind, whatever their rows. What differs between them is handed over with each
call, as one float64 vector, the settings: the limit of the loss, a zero that pins products, the bounds of the rows, the
weights of the penalty and the constants of the rule.

A record is what a step leaves for the log: `(sum w*loss, sum w, penalty, rows, parameters...)`, all at the parameters
before its update; the parameters are there only if they are few.
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
_MAX_RECORDED_PARAMETERS = 16
_RECORD_HEAD = 4


@dataclasses.dataclass(frozen=True)
class CallResult:
    """What one compiled call did.

    Attributes:
        state: float64 `[P + s * P]` after the applied updates.
        records: float64 `[steps, columns]`, one per step begun; see the module's docstring.
        applied: updates applied; fewer than the records only if the last one would not have been finite.
        rough: which records have a loss that is rounded more, boolean `[steps]`, or whether all have.
    """

    state: np.ndarray
    records: np.ndarray
    applied: int
    rough: np.ndarray | bool = False

    @property
    def losses(self) -> np.ndarray:
        """Weighted means over the rows of each step; NaN where they are rough and the step was applied."""
        means = self.records[:, 0] / np.where(self.records[:, 1] == 0, 1.0, self.records[:, 1])
        return np.where(self.rough & (np.arange(len(means)) < self.applied), math.nan, means)

    def complete(self, wanted: int | np.ndarray, split: str) -> CallResult:
        """Itself, if every step has summed each of its rows once.

        Args:
            wanted: the rows of every step, or int64 `[steps or more]`, those of each.
            split: "train" or "test".

        Raises:
            MissingRowsError: if not; whoever asked must not use the state.
        """
        check_rows(self.records[:, 3], wanted, split)
        return self

    @property
    def paths(self) -> np.ndarray:
        """The parameters before each step, float64 `[steps, P]`, or `[steps, 0]` where they are many."""
        return self.records[:, _RECORD_HEAD:]


def check_rows(found: np.ndarray, wanted: int | np.ndarray, split: str) -> None:
    """Refuses sums over other rows than there are, such as an exchange leaves that lost or repeated some.

    Args:
        found: `[k]`, rows that were summed.
        wanted: rows that there were, in each sum, or int64 `[k or more]`.
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
    """What a step computes, whatever the rows.

    Attributes:
        model: what is fitted.
        loss: per-example loss.
        optimizer: the update rule.
        dtype: compute type of the rows.
        l2: weight of the penalty on `model.penalized` parameters.
        arithmetic: "exact"; "fast" for what is the fastest here and shown to be right; or "plain" for sums as the
            hardware makes them, which need neither float64 nor whole numbers of 64 bits.
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
        """Whether sums want tiles of rows rather than of columns."""
        return self.row_sums_kind is not LinearSums

    def row_sums(self, *, weighted: bool, even: bool, on_cpu: bool) -> RowSums:
        """How rows are summed.

        Args:
            weighted: whether they have weights.
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
    """The update that sums make; the loops over steps build on it.

    Args:
        strategy: where replicas live.
        problem: what a step computes.
        bounds: float64 `[d + 2]` of the rows, `Bounds.largest`; none where no rows are summed.
    """

    def __init__(self, *, strategy: tf.distribute.Strategy, problem: Problem, bounds: np.ndarray | None = None):
        super().__init__(strategy=strategy)
        self.problem = problem
        self.num_parameters = problem.model.num_parameters
        self.records_parameters = self.num_parameters <= _MAX_RECORDED_PARAMETERS
        self.record_width = _RECORD_HEAD + self.records_parameters * self.num_parameters
        self.bounds = np.zeros(0) if bounds is None else bounds
        penalty = (problem.l2, problem.model.penalized) if problem.l2 else ()
        constants = [np.asarray(value, np.float64) for value in (*penalty, *problem.optimizer.constants)]
        self._shapes = tuple(value.shape for value in constants)
        self._constants = np.concatenate([np.zeros(0), *(value.ravel() for value in constants)])

    def trace_once(self, *own: Hashable) -> None:
        """Shares the traces with other runs of the same kind; see `Replicas.share_traces`.

        Args:
            *own: what they depend on beside the arguments of this class.
        """
        problem = self.problem
        rule, model = problem.optimizer.rule, problem.model
        # What the caller wrote may look at anything else, and change with it.
        if model.key is not None and not is_custom(problem.loss) and _is_plain(rule):
            kind = (bool(problem.l2), self._shapes, problem.optimizer.num_slots, problem.dtype, problem.arithmetic)
            self.share_traces((type(model), model.key, problem.loss, rule, kind, len(self.bounds), own))

    def settings(self, limit: float) -> np.ndarray:
        """What a program is told of its run, float64 `[2 + d + 2 + c]`.

        Args:
            limit: a loss above it, or not finite, means divergence.
        """
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
        """The penalty's weight and what it weighs `[P]`, if there is one; the rule's constants."""
        sizes = [math.prod(shape) for shape in self._shapes]
        flat = tf.split(settings[2 + len(self.bounds) :], sizes) if sizes else []  # Into one at least.
        told = [tf.reshape(piece, shape) for piece, shape in zip(flat, self._shapes, strict=True)]
        first = len(told) - len(self.problem.optimizer.constants)
        return told[:first], told[first:]

    def apply(
        self, state: tf.Tensor, totals: Totals, step: tf.Tensor, settings: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Divide, penalise, update: `(new state, record, ok)`.

        Args:
            state: float64 `[P + s * P]`.
            totals: over all rows of the step.
            step: int64, updates applied before this one.
            settings: float64, see `settings`; where the run has diverged, the state comes back as it was.
        """
        count, optimizer = self.num_parameters, self.problem.optimizer
        weights, constants = self._constants_in(settings)
        # A batch whose weights are all zero has no loss, and moves nothing by itself.
        weight = tf.where(tf.equal(totals.weight, 0.0), tf.ones_like(totals.weight), totals.weight)
        theta, slots = state[:count], tf.reshape(state[count:], [optimizer.num_slots, count])
        # Not a quotient of vectors, for which compilers multiply by a reciprocal of their own.
        gradient = exact.pin(totals.gradient * exact.pin(tf.ones_like(weight) / weight))
        penalty = tf.zeros([], tf.float64)
        if weights:
            l2, penalized = weights
            penalty = exact.pin(l2 * exact.folded(exact.pin(exact.pin(penalized * theta) * theta)))
            gradient += exact.pin(exact.pin((l2 + l2) * penalized) * theta)
        number = tf.cast(step + 1, tf.float64)
        new_theta, new_slots = optimizer.rule(theta, slots, gradient, number, *constants)
        new_state = tf.concat([new_theta, tf.reshape(new_slots, [-1])], 0)
        ok = totals.ok & (totals.loss <= settings[0] * weight) & tf.math.is_finite(totals.loss)
        ok &= _all(tf.math.is_finite(new_state))
        record = tf.stack([totals.loss, totals.weight, penalty, totals.rows])
        if self.records_parameters:
            record = tf.concat([record, theta], 0)
        return tf.where(ok, new_state, state), record, ok

    def apply_sums(
        self, row_sums: RowSums, state: tf.Tensor, sums: tf.Tensor, step: tf.Tensor, settings: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """`apply` of what the sums of all rows stand for."""
        totals = row_sums.total(state[: self.num_parameters], self.bounds_in(settings), sums)
        return self.apply(state, totals, step, settings)

    def repeat(self, one_step: Callable[..., Any], state: tf.Tensor, num_steps: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Runs `one_step(i, state) -> per-replica (state, record, ok)` until done or not ok, as graph operations.

        Returns:
            `(state, records [num_steps, columns], begun, applied)`.
        """

        def body(i, state, records, applied, _):  # type: ignore[no-untyped-def]
            # All replicas hold the same numbers; the first local one speaks for them.
            state, record, ok = (self.strategy.experimental_local_results(v)[0] for v in one_step(i, state))
            return i + 1, state, records.write(i, record), applied + tf.cast(ok, tf.int32), ok

        records = tf.TensorArray(tf.float64, num_steps, element_shape=[self.record_width])
        start = (tf.constant(0), state, records, tf.constant(0), tf.constant(True))
        begun, state, records, applied, _ = tf.while_loop(
            lambda i, *rest: (i < num_steps) & rest[-1], body, start, parallel_iterations=1
        )
        return state, records.stack(), begun, applied

    def result(self, state: tf.Tensor, records: tf.Tensor, begun: tf.Tensor, applied: tf.Tensor) -> CallResult:
        """A compiled loop's results on the host."""
        return CallResult(state.numpy(), records.numpy()[: int(begun)], int(applied))


class RowPrograms(StepPrograms):
    """Steps that sum rows.

    Args:
        weighted: whether the rows have weights.
        even: whether every call sums whole tiles.
        parallel: tiles or blocks under way at once on a replica.
        **programs: see `StepPrograms`.
    """

    def __init__(self, *, weighted: bool, even: bool, parallel: int, **programs: Any):
        super().__init__(**programs)
        self.weighted, self.even, self.parallel = weighted, even, parallel
        self.row_sums = self.problem.row_sums(weighted=weighted, even=even, on_cpu=self.on_cpu)

    def trace_once(self, *own: Hashable) -> None:
        super().trace_once(self.weighted, self.even, self.parallel, *own)

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
    """Whether all of `[k]` are true; of a few one by one, which needs no loop of its own."""
    if truths.shape[0] > _MAX_RECORDED_PARAMETERS:
        return tf.reduce_all(truths)
    return functools.reduce(tf.logical_and, tf.unstack(truths))


def _is_plain(function: Callable[..., Any]) -> bool:
    """Whether all that a function looks at are its arguments, as far as this package can promise."""
    return inspect.isfunction(function) and not function.__closure__ and function.__module__.startswith(_PACKAGE)


def empty(steps: int, *, width: int) -> tf.Tensor:
    """Records of up to `steps` steps, float64 `[width]` each."""
    return tf.raw_ops.TensorListReserve(element_shape=[width], num_elements=steps, element_dtype=tf.float64)


def with_row(records: tf.Tensor, step: tf.Tensor, record: tf.Tensor) -> tf.Tensor:
    """`records` with `record` `[width]` at `step`."""
    return tf.raw_ops.TensorListSetItem(input_handle=records, index=step, item=record)


def stacked(records: tf.Tensor, steps: int, *, width: int) -> tf.Tensor:
    """All records as one float64 tensor `[steps, width]`; those never set are zeros."""
    return tf.raw_ops.TensorListStack(
        input_handle=records, element_shape=[width], element_dtype=tf.float64, num_elements=steps
    )
