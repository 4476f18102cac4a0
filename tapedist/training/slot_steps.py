"""Steps over whole shards at hand: small splits and mini-batches, many steps in one compiled loop.

Legend: `P` parameters, `V` shards, `u` shards of one replica, `k` rows of one shard, `s` optimizer slots.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.training import partials as fixed_order
from tapedist.training import records as step_records
from tapedist.training.steps import MAX_STEPS_PER_CALL, CallResult, Rows, StepPrograms, slice_rows

# With one slot only, nothing of the rows would depend on the step; XLA would compute once, before the steps, what it
# computes with each where there are several replicas: other kernels, other bits.
LEAST_SLOTS = 2
_SIDE_BY_SIDE_BYTES = 128 * 1024


class SlotSteps(StepPrograms):
    """Steps over whole shards at hand, laid out as `pipeline.py` says: small splits and mini-batches.

    Args:
        even: whether all shards of all steps are equally long, so that none has padding.
        **programs: see `StepPrograms`.
    """

    def __init__(self, *, even: bool, **programs: Any):
        super().__init__(**programs)
        self._even = even
        self.trace_once(even)

    def _sums_side_by_side(self, shard_rows: int, rows: Rows) -> bool:
        """Whether the shards are summed by one kernel: it saves a loop's trips, as long as its rows stay in the cache.

        Depends on no replica, because it changes bits.
        """
        row_bytes = sum(column.dtype.size * math.prod(column.shape[1:]) for column in rows)
        small = self.num_shards * shard_rows * row_bytes <= _SIDE_BY_SIDE_BYTES
        return small and len(rows) == 2 and self._model.summed and not self._repeats

    def _slot_partials(self, state: tf.Tensor, rows: Rows, counts: tf.Tensor, slot: tf.Tensor) -> tf.Tensor:
        slots, width = counts.shape
        shard_rows = rows[1].shape[0] // (slots * width)
        masters = state[: self.num_parameters]
        flat_counts = tf.reshape(counts, [-1])
        if self._sums_side_by_side(shard_rows, rows):
            assert slots >= LEAST_SLOTS
            # Looked up, not sliced: the start of a slice XLA would take for a constant, and compile anew for each.
            shape = [slots, width * shard_rows]
            piece = tuple(tf.gather(tf.reshape(column, [*shape, *column.shape[1:]]), slot) for column in rows)
            return self.shards_sum(masters, piece, tf.gather(counts, slot), even=self._even)

        def shard_sum(place: tf.Tensor) -> tf.Tensor:
            first = place * shard_rows
            piece = tuple(slice_rows(column, first, shard_rows) for column in rows)
            return self.rows_sum(masters, piece, tf.gather(flat_counts, place), even=self._even)

        return fixed_order.shard_partials(shard_sum, first=slot * width, num_shards=width, width=self.partial_width)

    @functools.cached_property
    def _fused_loop(self) -> Any:
        """Many steps as one XLA program, for one replica."""

        def loop(state, rows, counts, slots, step, num_steps, settings):  # type: ignore[no-untyped-def]
            # Step and slot travel as one tensor, and what can be told after the loop is not counted in it: XLA runs the
            # kernels of a body one after the other up to eight of them, and hands more to its threads, which costs
            # more than the kernels.
            def body(place, state, records, _):  # type: ignore[no-untyped-def]
                i, slot = place[0], place[1]
                partials = self._slot_partials(state, rows, counts, slot)[: self.num_shards]
                state, record, ok = self.apply(state, partials, step + tf.cast(i, tf.int64), settings)
                records = step_records.with_row(records, i, record)
                return tf.stack([i + 1, tf.gather(slots, i + 1)]), state, records, ok

            records = step_records.empty(MAX_STEPS_PER_CALL, width=self.record_width)
            start = (tf.stack([0, slots[0]]), state, records, tf.constant(True))
            place, state, records, ok = tf.while_loop(
                lambda place, *rest: (place[0] < num_steps) & rest[-1], body, start
            )
            records = step_records.stacked(records, MAX_STEPS_PER_CALL, width=self.record_width)
            return state, records, place[0], place[0] - tf.cast(~ok, tf.int32)

        return tf.function(loop, jit_compile=True, autograph=False)

    @functools.cached_property
    def _replicated_loop(self) -> Any:
        """Many steps of several replicas: each replica's sums are one XLA program, the gather is outside it."""
        slot_partials = tf.function(self._slot_partials, jit_compile=True, autograph=False)

        def replica_step(state, rows, counts, slot, step, settings):  # type: ignore[no-untyped-def]
            return self.gather_and_apply(state, slot_partials(state, rows, counts, slot), step, settings)

        def loop(state, rows, counts, slots, step, num_steps, settings):  # type: ignore[no-untyped-def]
            def one_step(i, state):  # type: ignore[no-untyped-def]
                at = step + tf.cast(i, tf.int64)
                return self.on_replicas(replica_step, state, rows, counts, tf.gather(slots, i), at, settings)

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
        loop = self._traced._fused_loop if self.fusable else self._traced._replicated_loop
        padded = np.zeros(MAX_STEPS_PER_CALL + 1, np.int32)  # One more, which the last step looks up.
        padded[: len(slots)] = slots
        return self.result(
            *loop(
                tf.constant(state), rows, counts, tf.constant(padded), tf.constant(step, tf.int64),
                tf.constant(len(slots)), tf.constant(self.settings(limit)),
            )
        )  # fmt: skip
