"""What an element of the pipeline holds: which rows each replica takes, by integer arithmetic alone.

An element is what one replica computes on: the rows of its shards for some slots (a slot is a batch, a block, or a
small split). Which rows go where is arithmetic on the element's number, so a pipeline can start anywhere; there is no
position to save.

Legend: `V` shards, `R` replicas, `k` rows of one shard, `u` shards of one replica (`ceil(V / R)`; a lone shard is
padded to two).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from tapedist.data.blocks import BatchPlan, BlockPlan, replica_shards
from tapedist.data.epoch_order import WINDOW_ROWS, WindowOrder, epoch_batches, epoch_rows


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
        epochs: the epoch of each slot of an element, int64 `[slots]`.
        shuffled: the order of rows in an epoch, or None where the numbers of rows are their positions.
    """

    split: str
    slots: int
    width: int
    shard_rows: int
    first_rows: Callable[[int, int], tuple[np.ndarray, np.ndarray]]
    epochs: Callable[[int], np.ndarray] | None = None
    shuffled: ShuffledRows | None = None

    def row_numbers(self, element: int, positions: np.ndarray) -> np.ndarray:
        """Row numbers at positions `[slots, u, k]` of an element; padding beyond the split stays in range."""
        assert self.shuffled
        assert self.epochs
        epochs = self.epochs(element)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            result[epochs == epoch] = self.shuffled(int(epoch), positions[epochs == epoch])
        return result


@dataclasses.dataclass(frozen=True)
class ShuffledRows:
    """The order of rows under `--shuffle=rows`.

    Attributes:
        plan: how an epoch is cut into batches.
        seed: the run's seed.
        window: rows per window; fixed, because the order must not depend on the machine.
    """

    plan: BatchPlan
    seed: int
    window: int = WINDOW_ROWS

    def order(self, epoch: int) -> WindowOrder:
        """The order of one epoch."""
        return WindowOrder(self.plan.num_rows, self.seed, epoch, self.window)

    def __call__(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Row numbers at positions of any shape; those beyond the split stay in range."""
        inside = np.minimum(positions, self.plan.num_rows - 1).ravel()
        rows = epoch_rows(
            inside, num_rows=self.plan.num_rows, seed=self.seed, epoch=epoch, window=self.window
        )  # fmt: skip
        return rows.reshape(positions.shape)


def shard_elements(plan: BlockPlan, layout: Layout, *, split: str, slots: int) -> ElementPlan:
    """The one element of a resident split: all shards of a replica, in the first of `slots`."""
    return _one_element(layout, plan.shard_row_range, split=split, slots=slots, shard_rows=plan.shard_rows)


def shard_block_elements(plan: BlockPlan, layout: Layout, *, split: str) -> ElementPlan:
    """The one element of a resident split whose shards are a block each."""
    return _one_element(
        layout, lambda shard: plan.round_block(shard, 0), split=split, slots=1, shard_rows=plan.block_rows
    )


def _one_element(
    layout: Layout, rows: Callable[[int], range], *, split: str, slots: int, shard_rows: int
) -> ElementPlan:
    shape = (slots, layout.loop_width)

    def first_rows(element: int, replica: int) -> tuple[np.ndarray, np.ndarray]:
        ranges = [rows(shard) for shard in layout.shards(replica)]
        ranges += [range(0)] * (math.prod(shape) - len(ranges))
        return np.reshape([r.start for r in ranges], shape), np.reshape([len(r) for r in ranges], shape)

    return ElementPlan(split, *shape, shard_rows, first_rows)


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
    row_numbers: ShuffledRows | None = None,
) -> ElementPlan:  # fmt: skip
    """Element `t`: batches at places `t * slots ...` of the sequence of batches that `order` describes.

    Args:
        plan: how an epoch is cut into batches.
        layout: where shards lie.
        slots: batches per element.
        order: `places int64 [slots] -> (epoch, batch)`: which batch of which epoch is at each place.
        row_numbers: the order of rows in an epoch; None where the numbers of rows are their positions.
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

    def epochs(element: int) -> np.ndarray:
        return order(element * slots + np.arange(slots))[0]

    return ElementPlan("train", slots, width, plan.shard_rows, first_rows, epochs, row_numbers)


def epoch_order(plan: BatchPlan, *, shuffle: str, seed: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """`steps -> (epoch, batch)` of a run's steps, for `batch_elements`."""
    per_epoch = plan.steps_per_epoch

    def order(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, batches = np.divmod(steps, per_epoch)
        if shuffle == "batches":
            batches = epoch_batches(batches, num_batches=per_epoch, seed=seed, epochs=epochs)
        return epochs, batches

    return order


def shuffled_rows(plan: BatchPlan, *, seed: int) -> ShuffledRows:
    """The order of rows under `--shuffle=rows`, for `batch_elements`."""
    return ShuffledRows(plan, seed)
