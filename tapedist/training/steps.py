"""The compiled programs that move the parameters: the only `GradientTape` and the only `strategy.run` in the package.

Legend: `P` parameters, `V` shards, `u` shards of one replica, `k` rows of one shard, `s` optimizer slots.

The state is one flat float64 vector: the parameters `[P]`, then the optimizer's slots `[s * P]`. A step is

    partials  = one compiled sum per shard                       (each replica, its own shards)
    total     = gather, then fold in shard order                 (every replica, the same numbers)
    new state = divide, add the penalty, apply the update rule   (every replica, the same compiled function)

A record is what a step leaves for the log: `(sum w*loss, sum w, penalty, parameters...)`, all at the parameters before
its update; the parameters are there only if they are few.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.training import partials as fixed_order
from tapedist.training.losses import Loss, checked, is_own
from tapedist.training.model import Model
from tapedist.training.optimizers import Optimizer

MAX_STEPS_PER_CALL = 4096
_MAX_RECORDED_PARAMETERS = 16
_SIDE_BY_SIDE_BYTES = 128 * 1024

# (x [rows, d], y [rows]) or (x, y, w [rows])
Rows = tuple[tf.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class CallResult:
    """What one compiled call did.

    Attributes:
        state: float64 `[P + s * P]` after the applied updates.
        records: float64 `[steps, columns]`, one per step begun; see the module's docstring.
        applied: updates applied; fewer than the records only if the last one would not have been finite.
    """

    state: np.ndarray
    records: np.ndarray
    applied: int


class Replicas:
    """What every replica does: the package's one `strategy.run`, and partials on their way between host and replicas.

    Args:
        strategy: where replicas live.
        num_shards: `V`.
        partial_width: numbers in a shard's partial.
    """

    def __init__(self, *, strategy: tf.distribute.Strategy, num_shards: int, partial_width: int):
        self.strategy = strategy
        self.num_shards = num_shards
        self.partial_width = partial_width

    def on_replicas(self, replica_fn: Callable[..., Any], *args: Any) -> Any:
        """Calls `replica_fn` on every replica with its share of `args`."""
        return self.strategy.run(replica_fn, args=args)

    @property
    def replica_width(self) -> int:
        """Shards of the fullest replica, `ceil(V / R)`."""
        return -(-self.num_shards // self.strategy.num_replicas_in_sync)

    def scattered(self, sums: np.ndarray) -> Any:
        """Each replica's shards of `sums`.

        Args:
            sums: float64 `[V, width]`.

        Returns:
            Per-replica float64 `[ceil(V / R), width]`; shards beyond `V` are zeros.
        """
        width = self.replica_width
        padded = np.zeros([width * self.strategy.num_replicas_in_sync, self.partial_width])
        padded[: self.num_shards] = sums

        def share(context: tf.distribute.ValueContext) -> tf.Tensor:
            return tf.constant(padded[context.replica_id_in_sync_group * width :][:width])

        return self.strategy.experimental_distribute_values_from_function(share)

    def gathered(self, sums: Any) -> np.ndarray:
        """The inverse of `scattered`."""
        return self.strategy.experimental_local_results(self._gather_sums(sums))[0].numpy()

    @functools.cached_property
    def _gather_sums(self) -> Any:
        gather = functools.partial(fixed_order.gather, num_shards=self.num_shards)
        return tf.function(lambda sums: self.on_replicas(gather, sums), autograph=False)


class StepPrograms(Replicas):
    """What is summed, and how the sum moves the parameters; the loops over steps build on it.

    Args:
        strategy: where replicas live.
        model: what is fitted.
        loss: per-example loss.
        optimizer: the update rule.
        num_shards: `V`.
        l2: weight of the penalty on `model.penalized` parameters.
        dtype: compute type of the rows.
    """

    def __init__(
        self,
        *,
        strategy: tf.distribute.Strategy,
        model: Model,
        loss: Loss,
        optimizer: Optimizer,
        num_shards: int,
        l2: float,
        dtype: tf.DType,
    ):
        super().__init__(strategy=strategy, num_shards=num_shards, partial_width=model.num_parameters + 2)
        self.num_parameters = model.num_parameters
        self.num_slots = optimizer.num_slots
        self.dtype = dtype
        self.fusable = model.pure and strategy.num_replicas_in_sync == 1
        self.records_parameters = model.num_parameters <= _MAX_RECORDED_PARAMETERS
        self.record_width = 3 + self.records_parameters * model.num_parameters
        self._model = model
        self._row_loss = loss
        self._loss = checked(loss)
        # Own models and losses need not be finite at rows of zeros, and zero times infinity is not zero.
        self._repeats = not model.pure or is_own(loss)
        self._optimizer = optimizer
        self._l2 = l2

    def rows_sum(self, masters: tf.Tensor, rows: Rows, count: tf.Tensor) -> tf.Tensor:
        """`(sum w*loss, sum w, sum w*gradient)` of the first `count` of `rows`: the tape.

        Args:
            masters: float64 `[P]`.
            rows: `(x [k, d], y [k][, w [k]])`; beyond `count`, and where the weight is 0, they must be zeros.
            count: int32.

        Returns:
            float64 `[P + 2]`.
        """
        real = tf.range(rows[1].shape[0]) < count
        if self._repeats:
            real = real & (rows[2] > 0) if len(rows) == 3 else real
            rows = _repeated(rows, real)
        x, y = rows[0], rows[1]
        zero = tf.zeros([], self.dtype)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            forward, targets = self._model.bind(masters, self.dtype)
            tape.watch(targets)
            losses = self._loss(forward(x), y)
            if len(rows) == 3:
                losses = rows[2] * losses
            total = tf.reduce_sum(tf.where(real, losses, zero))
        gradients = tape.gradient(total, targets, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        if self._repeats:  # A shard without rows has none to repeat.
            some = tf.reduce_any(real) if len(rows) == 3 else count > 0
            gradients = [tf.where(some, g, tf.zeros([], g.dtype)) for g in gradients]
        weight = tf.reduce_sum(tf.where(real, rows[2], zero)) if len(rows) == 3 else tf.cast(count, tf.float64)
        pieces = [tf.reshape(total, [1]), tf.reshape(weight, [1]), *(tf.reshape(g, [-1]) for g in gradients)]
        return tf.concat([tf.cast(piece, tf.float64) for piece in pieces], 0)

    def shards_sum(self, masters: tf.Tensor, rows: Rows, counts: tf.Tensor) -> tf.Tensor:
        """`rows_sum` of several shards of equal length at once, in one kernel.

        Args:
            masters: float64 `[P]`.
            rows: `(x [u * k, d], y [u * k][, w [u * k]])`.
            counts: int32 `[u]`.

        Returns:
            float64 `[u, P + 2]`.
        """
        shards = counts.shape[0]
        x, *others = (tf.reshape(column, [shards, -1, *column.shape[1:]]) for column in rows)
        y = others[0]
        real = tf.range(y.shape[1]) < counts[:, tf.newaxis]
        zero = tf.zeros([], self.dtype)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            forward, targets = self._model.bind_shards(masters, self.dtype, shards=shards)
            tape.watch(targets)
            losses = self._row_loss(forward(x), y)
            if len(rows) == 3:
                losses = others[1] * losses
            total = tf.reduce_sum(tf.where(real, losses, zero), 1)
        gradients = tape.gradient(total, targets)
        weight = tf.reduce_sum(others[1], 1) if len(rows) == 3 else counts
        pieces = [total, weight, *gradients]
        return tf.concat([tf.cast(tf.reshape(piece, [shards, -1]), tf.float64) for piece in pieces], 1)

    def apply(
        self, state: tf.Tensor, partials: tf.Tensor, step: tf.Tensor, limit: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Fold, divide, penalise, update: `(new state, record, ok)`.

        Args:
            state: float64 `[P + s * P]`.
            partials: float64 `[V, P + 2]`.
            step: int64, updates applied before this one.
            limit: float64; a loss above it, or not finite, means divergence: the state comes back as it was.
        """
        count = self.num_parameters
        total = fixed_order.fold(partials)
        # A batch whose weights are all zero has no loss, and moves nothing by itself.
        loss_sum, weight = total[0], tf.where(tf.equal(total[1], 0.0), tf.ones_like(total[1]), total[1])
        theta, slots = state[:count], tf.reshape(state[count:], [self.num_slots, count])
        gradient = total[2:] / weight
        penalty = tf.zeros([], tf.float64)
        if self._l2:
            penalized = tf.constant(self._model.penalized) * theta
            penalty = self._l2 * tf.reduce_sum(penalized * theta)
            gradient += 2 * self._l2 * penalized
        new_theta, new_slots = self._optimizer.update(theta, slots, gradient, tf.cast(step + 1, tf.float64))
        new_state = tf.concat([new_theta, tf.reshape(new_slots, [-1])], 0)
        ok = (loss_sum <= limit * weight) & tf.math.is_finite(loss_sum) & tf.reduce_all(tf.math.is_finite(new_state))
        record = tf.stack([loss_sum, total[1], penalty])
        if self.records_parameters:
            record = tf.concat([record, theta], 0)
        return tf.where(ok, new_state, state), record, ok

    @functools.cached_property
    def _compiled_apply(self) -> Any:
        return tf.function(self.apply, jit_compile=True, autograph=False)

    def gather_and_apply(self, state: tf.Tensor, partials: tf.Tensor, step: tf.Tensor, limit: tf.Tensor) -> Any:
        """`apply` on all replicas' partials; called on each replica with its own `[u, P + 2]`."""
        everyones = fixed_order.gather(partials[: self.replica_width], num_shards=self.num_shards)
        return self._compiled_apply(state, everyones, step, limit)

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


class SlotSteps(StepPrograms):
    """Steps over whole shards at hand, laid out as `pipeline.py` says: small splits and mini-batches."""

    def _sums_side_by_side(self, shard_rows: int, rows: Rows) -> bool:
        """Whether the shards are summed by one kernel: it saves a loop's trips, as long as its rows stay in the cache.

        Depends on no replica, because it changes bits.
        """
        row_bytes = sum(column.dtype.size * math.prod(column.shape[1:]) for column in rows)
        small = self.num_shards * shard_rows * row_bytes <= _SIDE_BY_SIDE_BYTES
        return small and self._model.summed and not self._repeats

    def _slot_partials(self, state: tf.Tensor, rows: Rows, counts: tf.Tensor, slot: tf.Tensor) -> tf.Tensor:
        slots, width = counts.shape
        shard_rows = rows[1].shape[0] // (slots * width)
        masters = state[: self.num_parameters]
        flat_counts = tf.reshape(counts, [-1])
        if self._sums_side_by_side(shard_rows, rows):
            first, count = slot * (width * shard_rows), width * shard_rows
            piece = tuple(slice_rows(column, first, count) for column in rows)
            return self.shards_sum(masters, piece, tf.slice(flat_counts, [slot * width], [width]))

        def shard_sum(place: tf.Tensor) -> tf.Tensor:
            first = place * shard_rows
            piece = tuple(slice_rows(column, first, shard_rows) for column in rows)
            return self.rows_sum(masters, piece, tf.gather(flat_counts, place))

        return fixed_order.shard_partials(shard_sum, first=slot * width, num_shards=width, width=self.partial_width)

    @functools.cached_property
    def _fused_loop(self) -> Any:
        """Many steps as one XLA program, for one replica."""

        def loop(state, rows, counts, slots, step, num_steps, limit):  # type: ignore[no-untyped-def]
            def body(place, state, records, _):  # type: ignore[no-untyped-def]
                i, slot = place[0], place[1]
                partials = self._slot_partials(state, rows, counts, slot)[: self.num_shards]
                state, record, ok = self.apply(state, partials, step + tf.cast(i, tf.int64), limit)
                records = tf.raw_ops.TensorListSetItem(input_handle=records, index=i, item=record)
                return tf.stack([i + 1, tf.gather(slots, i + 1)]), state, records, ok

            records = tf.raw_ops.TensorListReserve(
                element_shape=[self.record_width], num_elements=MAX_STEPS_PER_CALL, element_dtype=tf.float64
            )
            start = (tf.stack([0, slots[0]]), state, records, tf.constant(True))
            place, state, records, ok = tf.while_loop(
                lambda place, *rest: (place[0] < num_steps) & rest[-1], body, start
            )
            records = tf.raw_ops.TensorListStack(
                input_handle=records,
                element_shape=[self.record_width],
                element_dtype=tf.float64,
                num_elements=MAX_STEPS_PER_CALL,
            )
            begun = place[0]
            return state, records, begun, begun - tf.cast(~ok, tf.int32)

        return tf.function(loop, jit_compile=True, autograph=False)

    @functools.cached_property
    def _replicated_loop(self) -> Any:
        """Many steps of several replicas: each replica's sums are one XLA program, the gather is outside it."""
        slot_partials = tf.function(self._slot_partials, jit_compile=True, autograph=False)

        def replica_step(state, rows, counts, slot, step, limit):  # type: ignore[no-untyped-def]
            return self.gather_and_apply(state, slot_partials(state, rows, counts, slot), step, limit)

        def loop(state, rows, counts, slots, step, num_steps, limit):  # type: ignore[no-untyped-def]
            def one_step(i, state):  # type: ignore[no-untyped-def]
                at = step + tf.cast(i, tf.int64)
                return self.on_replicas(replica_step, state, rows, counts, tf.gather(slots, i), at, limit)

            return self.repeat(one_step, state, num_steps)

        return tf.function(loop, autograph=False)

    def run(
        self, state: np.ndarray, rows: Any, counts: Any, slots: np.ndarray, *, step: int, limit: float
    ) -> CallResult:
        """One update per entry of `slots`.

        Args:
            state: float64 `[P + s * P]`.
            rows: per-replica rows.
            counts: per-replica int32 `[slots, u]`.
            slots: which slot each step sums; at most `MAX_STEPS_PER_CALL`.
            step: updates applied before.
            limit: loss above which the run has diverged.
        """
        loop = self._fused_loop if self.fusable else self._replicated_loop
        padded = np.zeros(MAX_STEPS_PER_CALL, np.int32)
        padded[: len(slots)] = slots
        return to_result(
            *loop(
                tf.constant(state), rows, counts, tf.constant(padded), tf.constant(step, tf.int64),
                tf.constant(len(slots)), tf.constant(limit, tf.float64),
            )
        )  # fmt: skip


def value_and_gradient(function: Callable[[tf.Tensor], tf.Tensor], at: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A scalar function of one tensor, and its gradient there."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(at)
        value = function(at)
    return value, tape.gradient(value, at)


def slice_rows(column: tf.Tensor, first: tf.Tensor, count: int) -> tf.Tensor:
    """Rows `first .. first + count` of a column `[rows]` or `[rows, d]`."""
    if column.shape.rank == 1:
        return tf.slice(column, [first], [count])
    return tf.slice(column, [first, 0], [count, column.shape[1]])


def _repeated(rows: Rows, real: tf.Tensor) -> Rows:
    """`rows` with the first of the real ones in place of each that is not; `real` is boolean `[k]`."""

    def repeated(column: tf.Tensor) -> tf.Tensor:
        # Without weights the real rows come first.
        one = tf.gather(column, tf.argmax(tf.cast(real, tf.int32), 0)[tf.newaxis]) if len(rows) == 3 else column[:1]
        return tf.where(real if column.shape.rank == 1 else real[:, tf.newaxis], column, one)

    return repeated(rows[0]), repeated(rows[1]), *rows[2:]


def to_result(state: tf.Tensor, records: tf.Tensor, begun: tf.Tensor, applied: tf.Tensor) -> CallResult:
    """A compiled loop's results on the host."""
    return CallResult(state.numpy(), records.numpy()[: int(begun)], int(applied))
