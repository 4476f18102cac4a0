"""Which row goes where: pure integers, the same on any hardware.

A pipeline's element is what one replica computes on: its share of the rows of some slots (a slot is a batch, a block,
or a small split). All of it is arithmetic on the element's number: nothing here knows TensorFlow or holds state, so a
pipeline can start anywhere, and there is no position to save.

Sums over rows have no order, so the sizes of tiles and blocks are settings of speed alone: no result depends on them.

Legend: `n` rows of a split, `d` features, `R` replicas, `B` rows a global batch, `T` rows a tile. All row and step
numbers are Python ints or int64 arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from tapedist.data.permutations import WINDOW_ROWS, epoch_batches, epoch_rows, window_order

# Rows whose features lie together, a cache line of each, so that one stream brings all of them from memory.
TILE_ROWS = 16
# Rows of a tile that products of matrices take, and what its features may take as float64: they stay in the caches.
LEAST_PRODUCT_ROWS, MOST_PRODUCT_ROWS = 64, 1024
PRODUCT_BYTES = 64 * 1024
# An element costs the pipeline up to a millisecond, whatever its size; a block should still stay near the cores.
BLOCK_BYTES = 2 * 1024 * 1024
MOST_BLOCK_ROWS = 2**20
RESIDENT_BYTES = 4 * 1024 * 1024
# `places -> (epoch, batch)`, int64 `[len(places)]` each: which batch of which epoch is at each place of a sequence.
BatchSequence = Callable[[range], tuple[np.ndarray, np.ndarray]]

_STEPS_AT_ONCE = 4096


def split_sizes(n_samples: int, test_fraction: float) -> tuple[int, int]:
    """`(train, test)` row counts; the test split is the last `floor(n * test_fraction)` rows.

    The fraction is the decimal number that its shortest text says, and the product exact: in floating point 0.29 of 100
    rows would be 28, and from 2**53 rows on counts would be rounded.
    """
    test = math.floor(n_samples * Fraction(repr(float(test_fraction))))
    return n_samples - test, test


def product_tile_rows(rows: int, num_features: int) -> int:
    """Rows of the tiles in which products of matrices sum `rows` rows: a power of two, where there are many."""
    most = 2 ** round(math.log2(PRODUCT_BYTES / (8 * num_features)))
    most = max(LEAST_PRODUCT_ROWS, min(MOST_PRODUCT_ROWS, most))
    return min(most, -(-max(1, rows) // TILE_ROWS) * TILE_ROWS)


def share_tiles(rows: int, num_replicas: int, tile_rows: int) -> int:
    """Tiles of `T` rows in which each of `R` replicas holds its share of some rows."""
    return max(1, -(-rows // (tile_rows * num_replicas)))


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """The sizes of the blocks and tiles in which a split is summed.

    Attributes:
        num_rows: `n`, at least 0.
        num_features: `d`.
        itemsize: bytes of one number.
        tile_rows: `T`.
        stretched: how many times larger than others its blocks are.
    """

    num_rows: int
    num_features: int
    itemsize: int
    tile_rows: int = TILE_ROWS
    stretched: int = 1

    @property
    def tiles(self) -> int:
        """Tiles in a block."""
        rows = min(MOST_BLOCK_ROWS, self.stretched * BLOCK_BYTES // (self.num_features * self.itemsize))
        return max(1, min(rows // self.tile_rows, -(-self.num_rows // self.tile_rows)))

    @property
    def block_rows(self) -> int:
        return self.tile_rows * self.tiles

    @property
    def num_blocks(self) -> int:
        return -(-self.num_rows // self.block_rows)

    @property
    def resident(self) -> bool:
        """Whether the split is so small that one compiled loop over all of its rows is the fastest form."""
        return self.num_rows * (self.num_features + 1) * self.itemsize <= RESIDENT_BYTES


@dataclasses.dataclass(frozen=True, eq=False)
class BlockOrder:
    """A pass over the rows of a split that are still to be visited, block by block.

    Each range of rows is cut into blocks, and each replica takes a contiguous stretch of all blocks, one a turn, so
    that rows are read in the order in which they are stored. Nothing is listed: there may be 2**62 rows.

    Attributes:
        remaining: ranges of rows `[first, end)`, int64 `[k, 2]`, ascending and apart.
        block_rows: rows of a block, at most.
        num_replicas: `R`.
    """

    remaining: np.ndarray
    block_rows: int
    num_replicas: int

    @classmethod
    def whole(cls, num_rows: int, block_rows: int, num_replicas: int) -> BlockOrder:
        """A pass from its beginning."""
        return cls(np.array([[0, num_rows]], np.int64), block_rows, num_replicas)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Blocks up to the end of each range, int64 `[k]`."""
        return (-(-np.diff(self.remaining, axis=1)[:, 0] // self.block_rows)).cumsum()

    @functools.cached_property
    def _stretches(self) -> list[range]:
        """The numbers of each replica's blocks."""
        blocks = int(self._ends[-1]) if len(self._ends) else 0
        cuts = [blocks * replica // self.num_replicas for replica in range(self.num_replicas + 1)]
        return [range(*ends) for ends in itertools.pairwise(cuts)]

    @property
    def rows(self) -> int:
        """How many rows are still to be visited."""
        return int(np.diff(self.remaining).sum())

    @functools.cached_property
    def visits(self) -> int:
        """Blocks of the replica that has the most."""
        return max(map(len, self._stretches))

    def block(self, visit: int, replica: int) -> range:
        """Row numbers that a replica takes; none where it has no more blocks."""
        stretch = self._stretches[replica]
        if visit >= len(stretch):
            return range(0)
        first = self._first_row(stretch[visit])
        end = int(self.remaining[np.searchsorted(self._ends, stretch[visit], side="right"), 1])
        return range(first, min(first + self.block_rows, end))

    def after(self, visits: int) -> np.ndarray:
        """What is left after some turns, for a pass on any number of replicas and in blocks of any size.

        Returns:
            Ranges of rows as in `remaining`.
        """
        left: list[list[int]] = []
        for stretch in self._stretches:
            blocks = stretch[visits:]
            if not blocks:
                continue
            first, last = np.searchsorted(self._ends, [blocks[0], blocks[-1]], side="right").tolist()
            ranges = self.remaining[first : last + 1].tolist()
            ranges[0][0] = self._first_row(blocks[0])
            ranges[-1][1] = min(ranges[-1][1], self._first_row(blocks[-1]) + self.block_rows)
            for begin, end in ranges:
                if left and left[-1][1] == begin:
                    left[-1][1] = end
                elif begin < end:
                    left.append([begin, end])
        return np.array(left, np.int64).reshape(-1, 2)

    def _first_row(self, block: int) -> int:
        """Where the block of a number begins."""
        place = int(np.searchsorted(self._ends, block, side="right"))
        before = int(self._ends[place - 1]) if place else 0
        return int(self.remaining[place, 0]) + (block - before) * self.block_rows


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How one epoch of `n` rows is cut into global batches.

    Attributes:
        num_rows: `n`, at least 1.
        batch_size: `B` as asked for; a batch never exceeds `n`.
    """

    num_rows: int
    batch_size: int

    @property
    def batch_rows(self) -> int:
        """Rows of a full batch."""
        return min(self.batch_size, self.num_rows)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.batch_rows)

    def rows_of(self, batches: Any) -> Any:
        """Rows of each of `batches`, int64 of any shape: a full batch, or what is left for the last one."""
        return (self.num_rows - batches * self.batch_rows).clip(0, self.batch_rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElementPlan:
    """What an element holds: the fixed shape, and the rows for each element number and replica.

    Attributes:
        split: "train" or "test".
        slots: slots per element.
        tiles: tiles per slot.
        tile_rows: `T`; a slot has room for `tiles * tile_rows` rows.
        row_major: whether a tile holds row after row; otherwise feature after feature.
        first_rows: `(element, replica) -> (first, counts)`, both int64 `[slots]`: the slot's rows are at positions
            `first .. first + counts`.
        epochs: the epoch of each slot of an element, int64 `[slots]`, ascending.
        shuffled: the order of rows in an epoch, or None where the numbers of rows are their positions.
    """

    split: str
    slots: int
    tiles: int
    tile_rows: int
    row_major: bool = False
    first_rows: Callable[[int, int], tuple[np.ndarray, np.ndarray]]
    epochs: Callable[[int], np.ndarray] | None = None
    shuffled: ShuffledRows | None = None

    @property
    def slot_rows(self) -> int:
        """Rows that a slot has room for."""
        return self.tiles * self.tile_rows

    @property
    def tiled_shape(self) -> tuple[int, int]:
        """Of the target, and of weights."""
        return self.slots * self.tiles, self.tile_rows

    def x_shape(self, num_features: int) -> tuple[int, int, int]:
        tiles, rows = self.tiled_shape
        return (tiles, rows, num_features) if self.row_major else (tiles, num_features, rows)

    def row_numbers(self, element: int, positions: np.ndarray) -> np.ndarray:
        """Row numbers at positions `[slots, k]` of an element; padding beyond the split stays in range."""
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

    def windows(self, epoch: int, first: int, last: int) -> list[range]:
        """The windows that hold the rows at positions from `first` to `last` of an epoch, and the next one."""
        order = window_order(self.plan.num_rows, self.seed, epoch, self.window)
        begin, end = order.visits(first, last)
        return [order.window_rows(number) for number in order.windows[begin : end + 2].tolist()]

    def __call__(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Row numbers at positions of any shape; those beyond the split stay in range."""
        inside = np.minimum(positions, self.plan.num_rows - 1).ravel()
        rows = epoch_rows(inside, num_rows=self.plan.num_rows, seed=self.seed, epoch=epoch, window=self.window)
        return rows.reshape(positions.shape)


def in_order(places: range) -> tuple[np.ndarray, np.ndarray]:
    """The batches of the first epoch, as a `BatchSequence`."""
    return np.zeros(len(places), np.int64), np.arange(places.start, places.stop)


def split_elements(num_rows: int, num_replicas: int, *, split: str, **layout: Any) -> ElementPlan:
    """The one element of a resident split, which is a batch of all rows: see `batch_elements`."""
    return batch_elements(BatchPlan(num_rows, num_rows), num_replicas, slots=1, order=in_order, split=split, **layout)


def block_elements(order: BlockOrder, whole: BlockOrder, *, split: str, **layout: Any) -> ElementPlan:
    """Element `t`: the blocks of turn `t`. Behind a pass begins the next one, from its beginning.

    Args:
        order: the pass to begin with.
        whole: a pass from its beginning, in blocks of the same size.
        split: "train" or "test".
        **layout: `tiles`, which have room for a block, `tile_rows` and `row_major` of the plan.
    """

    def first_rows(element: int, replica: int) -> tuple[np.ndarray, np.ndarray]:
        if element < order.visits:
            rows = order.block(element, replica)
        else:
            rows = whole.block((element - order.visits) % whole.visits, replica)
        return np.array([rows.start]), np.array([len(rows)])

    plan = ElementPlan(split=split, slots=1, first_rows=first_rows, **layout)
    assert max(order.block_rows, whole.block_rows) <= plan.slot_rows
    return plan


def batch_elements(
    plan: BatchPlan,
    num_replicas: int,
    *,
    slots: int,
    order: BatchSequence,
    row_numbers: ShuffledRows | None = None,
    split: str = "train",
    **layout: Any,
) -> ElementPlan:
    """Element `t`: the batches at places `t * slots ...` of a sequence.

    Each replica fills its tiles with consecutive rows of a batch, the last ones with what is left.

    Args:
        plan: how an epoch is cut into batches.
        num_replicas: `R`.
        slots: batches per element.
        order: which batch of which epoch is at each place.
        row_numbers: the order of rows in an epoch; None where the numbers of rows are their positions.
        split: "train" or "test".
        **layout: `tiles` of a replica's share of a batch, `tile_rows` and `row_major` of the plan.
    """

    def batches_of(element: int) -> tuple[np.ndarray, np.ndarray]:
        return order(range(element * slots, (element + 1) * slots))

    def first_rows(element: int, replica: int) -> tuple[np.ndarray, np.ndarray]:
        _, batches = batches_of(element)
        rows = plan.rows_of(batches)
        before = np.minimum(replica * elements.slot_rows, rows)
        return batches * plan.batch_rows + before, np.minimum(elements.slot_rows, rows - before)

    elements = ElementPlan(
        split=split, slots=slots, first_rows=first_rows, epochs=lambda element: batches_of(element)[0],
        shuffled=row_numbers, **layout,
    )  # fmt: skip
    assert plan.batch_rows <= elements.slot_rows * num_replicas
    return elements


def epoch_order(plan: BatchPlan, *, shuffle: str, seed: int) -> BatchSequence:
    """The sequence of batches of a run's steps; may be asked from several threads."""
    per_epoch = plan.steps_per_epoch

    # Many at once take half the time, and what makes elements asks for the same ones as what counts their rows.
    @functools.lru_cache(maxsize=8)
    def found(number: int) -> tuple[np.ndarray, np.ndarray]:
        epochs, batches = np.divmod(number * _STEPS_AT_ONCE + np.arange(_STEPS_AT_ONCE), per_epoch)
        if shuffle == "batches":
            batches = epoch_batches(batches, num_batches=per_epoch, seed=seed, epochs=epochs)
        return epochs, batches

    def order(steps: range) -> tuple[np.ndarray, np.ndarray]:
        first = steps.start // _STEPS_AT_ONCE
        parts = [found(number) for number in range(first, -(-steps.stop // _STEPS_AT_ONCE))]
        inside = slice(steps.start - first * _STEPS_AT_ONCE, steps.stop - first * _STEPS_AT_ONCE)
        epochs, batches = (np.concatenate(columns)[inside] for columns in zip(*parts, strict=True))
        return epochs, batches

    return order
