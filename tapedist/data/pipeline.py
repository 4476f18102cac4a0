"""Source + `InputContext` -> `tf.data` -> distributed rows.

Legend: `d` features, `V` shards, `R` replicas, `k` rows of one shard, `u` shards of one replica (`ceil(V / R)`; a
lone shard is padded to two). An element is what one replica computes on: the rows of its `u` shards for some slots (a
slot is a batch, a block, or a small split), padded with zero rows, and how many rows of each shard are real:

    rows    (x [slots * u * k, d], y [slots * u * k][, w])
    counts  int32 [slots, u]

Which rows go where is arithmetic on the element's number, so a pipeline can start anywhere; there is no position to
save.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.data.blocks import BatchPlan, BlockPlan, Source, epoch_batches, epoch_rows, replica_shards

_PREFETCH = 2


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the shards of a run lie on its replicas.

    Attributes:
        num_shards: `V`.
        num_replicas: `R`.
    """

    num_shards: int
    num_replicas: int

    @property
    def replica_width(self) -> int:
        """Shards of the fullest replica, `ceil(V / R)`: what each replica gathers."""
        return -(-self.num_shards // self.num_replicas)

    @property
    def loop_width(self) -> int:
        """`u`: shards that each replica loops over, at least two."""
        return max(2, self.replica_width)

    def shards(self, replica: int) -> range:
        return replica_shards(replica, self.num_replicas, self.num_shards)


@dataclasses.dataclass(frozen=True)
class ElementPlan:
    """What an element holds: the fixed shape, and the rows for each element number and shard.

    Attributes:
        split: "train" or "test".
        slots: slots per element.
        width: `u`.
        shard_rows: `k`.
        first_rows: `(element, replica) -> (first, counts)`, both int64 `[slots, u]`: the shard's rows are at positions
            `first .. first + counts`.
        row_numbers: maps positions `[slots, u, k]` of an element to row numbers, or None where they are the same.
    """

    split: str
    slots: int
    width: int
    shard_rows: int
    first_rows: Callable[[int, int], tuple[np.ndarray, np.ndarray]]
    row_numbers: Callable[[int, np.ndarray], np.ndarray] | None = None


def shard_elements(plan: BlockPlan, layout: Layout, *, split: str) -> ElementPlan:
    """The one element of a resident split: all shards of a replica, one block each."""
    width = layout.loop_width

    def first_rows(element: int, replica: int) -> tuple[np.ndarray, np.ndarray]:
        ranges = [plan.round_block(shard, element) for shard in layout.shards(replica)]
        ranges += [range(0)] * (width - len(ranges))
        return np.array([[r.start for r in ranges]]), np.array([[len(r) for r in ranges]])

    return ElementPlan(split, 1, width, plan.block_rows, first_rows)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockOrder:
    """The order of a pass over a split: each replica goes through its shards one after the other, so that rows are read
    in the order in which they are stored.

    In a turn every replica takes a block of the shard at one place among its own, or none where that shard has no more.

    Attributes:
        plan: how the split is cut.
        layout: where shards lie.
        done: blocks of each shard that an earlier part of the pass took, int64 `[V]`.
    """

    plan: BlockPlan
    layout: Layout
    done: np.ndarray

    @classmethod
    def whole(cls, plan: BlockPlan, layout: Layout) -> BlockOrder:
        """A pass from its beginning."""
        return cls(plan, layout, np.zeros(plan.num_shards, np.int64))

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Turns up to the end of each place, int64 `[ceil(V / R)]`; of a whole pass, as many at every place."""
        width = self.layout.replica_width
        left = np.zeros(self.layout.num_replicas * width, np.int64)
        left[: self.plan.num_shards] = self.plan.rounds - self.done
        return left.reshape(-1, width).max(axis=0).cumsum()

    @functools.cached_property
    def _blocks(self) -> np.ndarray:
        return np.array([len(self.plan.shard_blocks(shard)) for shard in range(self.plan.num_shards)])

    @property
    def turns(self) -> int:
        return int(self._ends[-1])

    def place(self, turn: int) -> tuple[int, int]:
        """Which place a turn is at, and how many turns at that place were before it."""
        place = int(np.searchsorted(self._ends, turn, side="right"))
        return place, turn - (int(self._ends[place - 1]) if place else 0)

    def block(self, turn: int, replica: int) -> range:
        """Row numbers that a replica takes."""
        place, before = self.place(turn)
        shards = self.layout.shards(replica)
        if place >= len(shards):
            return range(0)
        return self.plan.round_block(shards[place], int(self.done[shards[place]]) + before)

    def after(self, turns: int) -> BlockOrder:
        """What is left after some turns of the pass, on any layout."""
        width = self.layout.replica_width
        ends = np.concatenate([[0], self._ends])
        at_place = np.clip(turns - ends[:-1], 0, np.diff(ends))
        done = self.done + at_place[np.arange(self.plan.num_shards) % width]
        return dataclasses.replace(self, done=np.minimum(done, self._blocks))


def block_elements(order: BlockOrder, *, split: str) -> ElementPlan:
    """Element `t`: the block of turn `t`. Behind a pass begins the next one, from its beginning."""
    whole = BlockOrder.whole(order.plan, order.layout)

    def first_rows(element: int, replica: int) -> tuple[np.ndarray, np.ndarray]:
        if element < order.turns:
            rows = order.block(element, replica)
        else:
            rows = whole.block((element - order.turns) % whole.turns, replica)
        return np.array([[rows.start]]), np.array([[len(rows)]])

    return ElementPlan(split, 1, 1, order.plan.block_rows, first_rows)


def batch_elements(
    plan: BatchPlan, layout: Layout, *, slots: int, order: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    row_numbers: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> ElementPlan:  # fmt: skip
    """Element `t`: batches at places `t * slots ...` of the sequence of batches that `order` describes.

    Args:
        plan: how an epoch is cut into batches.
        layout: where shards lie.
        slots: batches per element.
        order: `places int64 [slots] -> (epoch, batch)`: which batch of which epoch is at each place.
        row_numbers: `(epoch, positions) -> row numbers`, element by element; None where they are the same.
    """
    width = layout.loop_width

    def first_rows(element: int, replica: int) -> tuple[np.ndarray, np.ndarray]:
        _, batches = order(element * slots + np.arange(slots))
        start = batches[:, np.newaxis] * plan.batch_rows
        rows = np.minimum(plan.batch_rows, plan.num_rows - start)
        shards = layout.shards(replica)
        offsets = (shards.start + np.arange(width)) * plan.shard_rows
        counts = np.clip(rows - offsets, 0, plan.shard_rows)
        counts[:, len(shards) :] = 0
        return start + offsets, counts

    def numbers(element: int, positions: np.ndarray) -> np.ndarray:
        assert row_numbers is not None
        epochs, _ = order(element * slots + np.arange(slots))
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            result[epochs == epoch] = row_numbers(int(epoch), positions[epochs == epoch])
        return result

    return ElementPlan("train", slots, width, plan.shard_rows, first_rows, row_numbers and numbers)


def epoch_order(plan: BatchPlan, *, shuffle: str, seed: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """`steps -> (epoch, batch)` of a run's steps, for `batch_elements`."""
    per_epoch = plan.steps_per_epoch

    def order(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, batches = np.divmod(steps, per_epoch)
        if shuffle == "batches":
            batches = epoch_batches(batches, num_batches=per_epoch, seed=seed, epochs=epochs)
        return epochs, batches

    return order


def shuffled_rows(plan: BatchPlan, *, seed: int) -> Callable[[int, np.ndarray], np.ndarray]:
    """`(epoch, positions) -> row numbers` under `--shuffle=rows`; padding beyond the split stays in range."""

    def row_numbers(epoch: int, positions: np.ndarray) -> np.ndarray:
        inside = np.minimum(positions, plan.num_rows - 1).ravel()
        return epoch_rows(inside, num_rows=plan.num_rows, seed=seed, epoch=epoch).reshape(positions.shape)

    return row_numbers


def distribute(
    strategy: tf.distribute.Strategy,
    source: Source,
    plan: ElementPlan,
    *,
    elements: range,
    dtype: tf.DType,
    parallel: int,
) -> Any:
    """A distributed dataset of the elements numbered `elements`, one per replica and turn.

    Each worker's input pipeline makes the elements of its own replicas only.
    """

    def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
        local = context.num_replicas_in_sync // context.num_input_pipelines
        first = context.input_pipeline_id * local
        dataset = tf.data.Dataset.range(len(elements) * local)
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        options.deterministic = True
        options.autotune.enabled = False
        # There is nothing to rewrite, and trying to takes a copy of all that a source holds in memory.
        options.experimental_optimization.apply_default_optimizations = False

        # Rewriting the function by autograph, which it does not need, would take half a second.
        @tf.autograph.experimental.do_not_convert
        def element(i: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
            return _element(source, plan, elements, i // local, first + i % local, dtype)

        dataset = dataset.map(element, num_parallel_calls=parallel)
        return dataset.prefetch(_PREFETCH).with_options(options)

    return strategy.distribute_datasets_from_function(dataset_fn)


def _element(
    source: Source, plan: ElementPlan, elements: range, turn: tf.Tensor, replica: tf.Tensor, dtype: tf.DType
) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
    """One element as TensorFlow operations; the integer arithmetic runs in NumPy."""
    shape = (plan.slots, plan.width)
    last = max(0, source.num_rows(plan.split) - 1)

    def place(turn: np.int64, replica: np.int64) -> tuple[np.ndarray, np.ndarray]:
        first, counts = plan.first_rows(elements[int(turn)], int(replica))
        return first.astype(np.int64), counts.astype(np.int64)

    def numbers(turn: np.int64, positions: np.ndarray) -> np.ndarray:
        assert plan.row_numbers is not None
        return plan.row_numbers(elements[int(turn)], positions).astype(np.int64)

    first, counts = tf.numpy_function(place, [turn, replica], [tf.int64, tf.int64])
    first.set_shape(shape)
    counts.set_shape(shape)
    # Most elements are full: they need neither a bound on their positions nor a mask.
    full = tf.reduce_all(counts == plan.shard_rows)
    positions = first[..., tf.newaxis] + tf.range(plan.shard_rows, dtype=tf.int64)
    positions = tf.cond(full, lambda: positions, lambda: tf.minimum(positions, last))
    if plan.row_numbers:
        positions = tf.ensure_shape(tf.numpy_function(numbers, [turn, positions], tf.int64), positions.shape)
    flat = tf.reshape(positions, [-1])
    if hasattr(source, "take_as"):
        rows = source.take_as(plan.split, flat, dtype.as_numpy_dtype)
    else:
        rows = tuple(tf.cast(column, dtype) for column in source.take(plan.split, flat))
    rows = tf.cond(full, lambda: rows, lambda: _where(_real(counts, plan.shard_rows), rows))
    if source.weighted:
        rows = _where(rows[2] > 0, rows)
    return rows, tf.cast(counts, tf.int32)


def _real(counts: tf.Tensor, shard_rows: int) -> tf.Tensor:
    """Which rows of an element are no padding, boolean `[slots * u * k]`."""
    return tf.reshape(tf.sequence_mask(counts, shard_rows), [-1])


def _where(real: tf.Tensor, rows: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
    """`rows` with zeros where they are not real: zero times what overflows would not be zero."""
    return tuple(
        tf.where(real if column.shape.rank == 1 else real[:, tf.newaxis], column, tf.zeros([], column.dtype))
        for column in rows
    )
