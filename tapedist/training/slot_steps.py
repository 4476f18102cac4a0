"""Steps over rows in device memory: small splits and mini-batches, many steps in one compiled loop.

Legend: `P` parameters, `R` replicas, `s` optimizer slots, `T` rows of a tile. A slot holds the rows of one step: a
batch, or a small split.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.training import steps as step_records
from tapedist.training.row_sums import Rows, Slot
from tapedist.training.schedule import MAX_STEPS_PER_CALL
from tapedist.training.steps import CallResult, RowPrograms


class SlotSteps(RowPrograms):
    """Steps over rows in device memory, in the layout of `pipeline.py`.

    Args:
        **programs: see `RowPrograms`.
    """

    def __init__(self, **programs: Any):
        super().__init__(**programs)
        self.trace_once()

    @property
    def _fused(self) -> bool:
        """Returns whether the whole loop is one XLA program: without an exchange, and with sums that fit into one."""
        return self.strategy.num_replicas_in_sync == 1 and self.row_sums.whole

    @functools.cached_property
    def _fused_loop(self) -> Any:
        def loop(state, rows, counts, plan, step, num_steps, settings):  # type: ignore[no-untyped-def]
            tiles = rows[1].shape[0] // counts.shape[0]

            # XLA:CPU runs up to eight kernels of a loop's body one after the other, and hands more to its threads,
            # which costs more than the kernels. So the step number and the plan travel in the state vector, as float64:
            # `[steps begun, slot, rough, *state]`.
            def steps(carried, records, *, rough):  # type: ignore[no-untyped-def]
                def body(carried, records):  # type: ignore[no-untyped-def]
                    i, slot, state = tf.cast(carried[0], tf.int32), tf.cast(carried[1], tf.int32), carried[3:]
                    # The count of a lone slot does not change in the loop, and neither does `1 / W` of it, so that XLA
                    # can move both out.
                    count = tf.gather(counts, slot) if counts.shape[0] > 1 else counts[0]
                    sums = self.row_sums.of_tiles(
                        state[: self.num_parameters], self.bounds_in(settings), rows, count,
                        Slot(slot * tiles, tiles, rough),
                    )  # fmt: skip
                    at = step + tf.cast(i, tf.int64)
                    state, record, ok = self.apply_sums(self.row_sums, state, sums, at, settings)
                    records = step_records.with_row(records, i, record)
                    # The sign holds whether the step was applied: a step that was not ends the loop as
                    # `-(steps begun)`, which is below 0 even for the first step.
                    begun = tf.where(ok, carried[0] + 1, -1 - carried[0])
                    return tf.concat([[begun], tf.gather(plan, i + 1), state], 0), records

                def goes_on(carried, _):  # type: ignore[no-untyped-def]
                    return (carried[0] >= 0) & (carried[0] < limit) & tf.equal(carried[2], float(rough))

                return tf.while_loop(goes_on, body, (carried, records))

            # Two loops inside a third, the one of exact losses and the one of rough ones, each until the plan asks for
            # the other: XLA:CPU makes a select of a `tf.cond`, and would compute both kinds in every step.
            with self.pinned(settings):
                records = step_records.empty(MAX_STEPS_PER_CALL, width=self.record_width)
                start = (tf.concat([[tf.zeros([], tf.float64)], plan[0], state], 0), records)
                limit = tf.cast(num_steps, tf.float64)
                carried, records = tf.while_loop(
                    lambda carried, _: (carried[0] >= 0) & (carried[0] < limit),
                    lambda *now: steps(*steps(*now, rough=False), rough=True),
                    start,
                )
            records = step_records.stacked(records, MAX_STEPS_PER_CALL, width=self.record_width)
            begun = tf.cast(tf.abs(carried[0]), tf.int32)
            return carried[3:], records, begun, begun - tf.cast(carried[0] < 0, tf.int32)

        return tf.function(loop, jit_compile=True, autograph=False)

    @functools.cached_property
    def _replicated_loop(self) -> Any:
        """Many steps of several replicas; the exchange is outside of the compiled sums and the compiled update."""
        # `all_reduce` of int64 does not work inside `jit_compile`.

        def replica_step(state, rows, counts, slot, step, settings):  # type: ignore[no-untyped-def]
            piece, count = _slot(rows, counts, slot)
            sums = self.compiled_sums(state[: self.num_parameters], settings, piece, count)
            return self.add_and_apply(state, sums, step, settings)

        def loop(state, rows, counts, plan, step, num_steps, settings):  # type: ignore[no-untyped-def]
            def one_step(i, state):  # type: ignore[no-untyped-def]
                at, slot = step + tf.cast(i, tf.int64), tf.cast(plan[i, 0], tf.int32)
                return self.on_replicas(replica_step, state, rows, counts, slot, at, settings)

            return self.repeat(one_step, state, num_steps)

        return tf.function(loop, autograph=False)

    def run(
        self,
        state: np.ndarray,
        rows: Any,
        counts: Any,
        slots: np.ndarray,
        *,
        step: int,
        limit: float,
        rough: np.ndarray | bool = False,
    ) -> CallResult:
        """One update per entry of `slots`.

        Args:
            state: float64 `[P + s * P]`.
            rows: per-replica rows.
            counts: per-replica int32 `[slots]`.
            slots: the slot of each step; at most `MAX_STEPS_PER_CALL`.
            step: updates applied before.
            limit: loss above which the run has diverged.
            rough: the steps whose loss may be on its first grid alone, boolean like `slots`, or all or none of them.
        """
        loop = self._traced._fused_loop if self._fused else self._traced._replicated_loop
        # Of one size for any number of steps, so that the program is traced once. The last step reads one row more.
        plan = np.zeros([MAX_STEPS_PER_CALL + 1, 2])
        plan[: len(slots), 0], plan[: len(slots), 1] = slots, rough
        found = self.result(
            *loop(
                tf.constant(state), rows, counts, tf.constant(plan), tf.constant(step, tf.int64),
                tf.constant(len(slots)), tf.constant(self.settings(limit)),
            )
        )  # fmt: skip
        return dataclasses.replace(found, rough=plan[: len(found.records), 1] > 0) if self._fused else found

    def first_step(self, state: np.ndarray, rows: Any, counts: Any) -> tuple[CallResult, ...]:
        """One step over the first slot, by each of the loops: of exact and of rough losses."""
        loops = (False, True) if self._fused else (False,)
        first = np.zeros(1, np.int32)
        return tuple(self.run(state, rows, counts, first, step=0, limit=math.inf, rough=rough) for rough in loops)


def _slot(rows: Rows, counts: tf.Tensor, slot: tf.Tensor) -> tuple[Rows, tf.Tensor]:
    """The tiles of one slot and its count; a split that is one slot is not copied."""
    slots = counts.shape[0]
    if slots == 1:
        return rows, counts[0]
    tiles = rows[1].shape[0] // slots

    def piece(column: tf.Tensor) -> tf.Tensor:
        found = column[slot * tiles : (slot + 1) * tiles]
        return tf.ensure_shape(found, [tiles, *column.shape[1:]])

    return tuple(piece(column) for column in rows), counts[slot]


class LossSteps(RowPrograms):
    """Steps of one replica over one slot that leave a record and the state as it was.

    Args:
        **programs: see `RowPrograms`.
    """

    def __init__(self, **programs: Any):
        super().__init__(**programs)
        self.trace_once()

    @functools.cached_property
    def _record(self) -> Any:
        def record(state, rows, counts, settings):  # type: ignore[no-untyped-def]
            with self.pinned(settings):
                theta, zero = state[: self.num_parameters], tf.zeros([], tf.int64)
                slot = Slot(0, rows[1].shape[0])
                sums = self.row_sums.of_tiles(theta, self.bounds_in(settings), rows, counts[0], slot)
                # XLA leaves out what makes a new state, and so the gradient.
                return self.apply_sums(self.row_sums, state, sums, zero, settings)[1]

        return tf.function(record, jit_compile=True, autograph=False)

    def run(self, state: np.ndarray, rows: Any, counts: Any) -> CallResult:
        """A record at `state`, float64 `[P + s * P]`; arguments as in `SlotSteps.run`."""
        record = self._traced._record(tf.constant(state), rows, counts, tf.constant(self.settings(math.inf)))
        return CallResult(state, record.numpy()[np.newaxis], 0)
