"""Which row goes where: pure integers, the same on any hardware.

Legend: `n` rows of a split, `d` features, `R` replicas, `B` rows a global batch, `T` rows a tile. All row and step
numbers are Python ints or int64 arrays. Nothing here knows TensorFlow or holds state, so any position can be computed
from scratch; that is what makes resume arithmetic.

Sums over rows have no order, so the sizes of tiles and blocks are settings of speed alone: no result depends on them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

# Rows whose features lie together, a cache line of each, so that one stream brings all of them from memory.
TILE_ROWS = 16
# Rows of a tile that products of matrices take, and what its features may take as float64: they stay in the caches.
LEAST_PRODUCT_ROWS, MOST_PRODUCT_ROWS = 64, 1024
PRODUCT_BYTES = 64 * 1024
# An element costs the pipeline up to a millisecond, whatever its size; a block should still stay near the cores.
BLOCK_BYTES = 2 * 1024 * 1024
MOST_BLOCK_ROWS = 2**20
RESIDENT_BYTES = 4 * 1024 * 1024


class Source(Protocol):
    """Where rows come from: any row of a split by its number, in any order, any number of times.

    A source may also have `take_runs` (and `take_tiles`), as the synthetic one does, or `read_into`, as tables do: they
    spare the pipeline lists of row numbers. One whose `reader()` is not None is read by that. One with `ranges` (see
    `ranges.py`) spares training a pass. Weights of one that has `weight_exponent` are divided by 2 to the power of it
    for training. One whose `holds_tiny` is False has no number but 0 below 2**-126, so that none has to be looked for.
    """

    @property
    def num_features(self) -> int:
        """`d`."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """`d` names."""

    @property
    def target_name(self) -> str:
        """What is predicted."""

    @property
    def weighted(self) -> bool:
        """Whether rows have weights of their own."""

    def num_rows(self, split: str) -> int:
        """Rows in `split`, which is "train" or "test"."""

    def fingerprint(self) -> str:
        """Names the rows: equal for two sources exactly when their rows are."""

    def take(self, split: str, indices: Any) -> tuple[Any, ...]:
        """Rows of `split` by number, as TensorFlow operations that can be traced into a `tf.data` map.

        Args:
            split: "train" or "test".
            indices: int64 tensor `[k]`, each in `[0, num_rows(split))`, `k` known statically.

        Returns:
            `(x, y)` of shapes `[k, d]` and `[k]` in a float type, or `(x, y, w)` if the source is `weighted`.
        """


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
    def turns(self) -> int:
        """Blocks of the replica that has the most."""
        return max(map(len, self._stretches))

    def block(self, turn: int, replica: int) -> range:
        """Row numbers that a replica takes; none where it has no more blocks."""
        stretch = self._stretches[replica]
        if turn >= len(stretch):
            return range(0)
        first = self._first_row(stretch[turn])
        end = int(self.remaining[np.searchsorted(self._ends, stretch[turn], side="right"), 1])
        return range(first, min(first + self.block_rows, end))

    def after(self, turns: int) -> np.ndarray:
        """What is left after some turns, for a pass on any number of replicas and in blocks of any size.

        Returns:
            Ranges of rows as in `remaining`.
        """
        left: list[list[int]] = []
        for stretch in self._stretches:
            blocks = stretch[turns:]
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
