"""Which row goes where: pure integers, the same on any hardware.

Legend: `n` rows of a split, `d` features, `S` rows a block, `V` virtual shards, `R` replicas, `B` rows a global
batch. All row and step numbers are Python ints or int64 arrays. Nothing here knows TensorFlow or holds state, so
any position can be computed from scratch; that is what makes resume arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any, Protocol

# A tile is what one compiled loop trip sums, sized so that what its sums leave in between stays in a core's nearest
# caches; a block holds up to `_MAX_TILES` tiles, so that one kernel launch (about 25 us) is small against its work.
_TILE_BYTES = 64 * 1024
_WIDE_TILE_BYTES = 2 * 1024 * 1024  # From 8 features on: a block is one tile, because products copy what is sliced.
_MAX_TILES = 64
_ROW_QUANTUM = 64
_RESIDENT_BYTES = 4 * 1024 * 1024


class Source(Protocol):
    """Where rows come from: any row of a split by its number, in any order, any number of times.

    A source may also have `take_runs`, as the synthetic one does, or `read_into`, as tables do: both spare the pipeline
    lists of row numbers. Weights of one that has `weight_exponent` are divided by 2 to the power of it for training.
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


def replica_shards(replica: int, num_replicas: int, num_shards: int) -> range:
    """The contiguous shards of one replica: `ceil(V / R)` of them, fewer (or none) at the end."""
    per_replica = -(-num_shards // num_replicas)
    return range(min(replica * per_replica, num_shards), min((replica + 1) * per_replica, num_shards))


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """How the `n` rows of a split are cut into blocks, and the blocks dealt to `V` shards.

    The block size depends on `(n, d, itemsize, V)` only, never on the machine. Small splits get one block a shard;
    large ones get blocks of `tiles` tiles.

    Attributes:
        num_rows: `n`, at least 0.
        num_features: `d`.
        itemsize: bytes of one number.
        num_shards: `V`.
    """

    num_rows: int
    num_features: int
    itemsize: int
    num_shards: int

    @property
    def _row_bytes(self) -> int:
        return (self.num_features + 1) * self.itemsize

    @property
    def _max_tile_rows(self) -> int:
        tile_bytes = _TILE_BYTES if self.num_features < 8 else _WIDE_TILE_BYTES
        return max(_ROW_QUANTUM, tile_bytes // self._row_bytes // _ROW_QUANTUM * _ROW_QUANTUM)

    @property
    def tile_rows(self) -> int:
        """Rows summed by one trip of the compiled loop."""
        shard_rows = -(-max(1, self.num_rows) // self.num_shards)
        return min(self._max_tile_rows, -(-shard_rows // _ROW_QUANTUM) * _ROW_QUANTUM)

    @property
    def tiles(self) -> int:
        """Tiles in a block."""
        shard_rows = -(-max(1, self.num_rows) // self.num_shards)
        most = _MAX_TILES if self.num_features < 8 else 1
        return min(most, -(-shard_rows // self.tile_rows))

    @property
    def block_rows(self) -> int:
        """`S`."""
        return self.tile_rows * self.tiles

    @property
    def num_blocks(self) -> int:
        return -(-self.num_rows // self.block_rows)

    @property
    def resident(self) -> bool:
        """Whether the split is so small that one compiled loop over whole shards is the fastest form."""
        return self.num_blocks <= self.num_shards and self.num_rows * self._row_bytes <= _RESIDENT_BYTES

    @property
    def even(self) -> bool:
        """Whether the shards of a resident split are equally long."""
        return self.num_rows > 0 and self.num_rows % self.num_shards == 0

    @property
    def shard_rows(self) -> int:
        """Rows of one shard of a resident split, padding included."""
        rows = -(-max(1, self.num_rows) // self.num_shards)
        return rows if self.even else -(-rows // _ROW_QUANTUM) * _ROW_QUANTUM

    def shard_row_range(self, shard: int) -> range:
        """Row numbers of one shard of a resident split, without its padding."""
        first = min(shard * self.shard_rows, self.num_rows)
        return range(first, min(first + self.shard_rows, self.num_rows))

    def shard_blocks(self, shard: int) -> range:
        """The contiguous blocks of one shard; shards differ by at most one block."""
        return range(
            self.num_blocks * shard // self.num_shards,
            self.num_blocks * (shard + 1) // self.num_shards,
        )

    @property
    def rounds(self) -> int:
        """Blocks of the fullest shard; a shard that has fewer is filled up by empty ones."""
        return -(-self.num_blocks // self.num_shards)

    def block_row_range(self, block: int) -> range:
        """Row numbers of one block, without its padding."""
        first = block * self.block_rows
        return range(min(first, self.num_rows), min(first + self.block_rows, self.num_rows))

    def round_block(self, shard: int, round_: int) -> range:
        """Row numbers of block number `round_` of `shard`; none where the shard has no more."""
        blocks = self.shard_blocks(shard)
        return self.block_row_range(blocks[round_]) if round_ < len(blocks) else range(0)


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How one epoch of `n` rows is cut into global batches, and a batch into shards.

    Attributes:
        num_rows: `n`, at least 1.
        batch_size: `B` as asked for; a batch never exceeds `n`.
        num_shards: `V`.
    """

    num_rows: int
    batch_size: int
    num_shards: int

    @property
    def batch_rows(self) -> int:
        """Rows of a full batch."""
        return min(self.batch_size, self.num_rows)

    @property
    def shard_rows(self) -> int:
        """Rows of one shard of one batch, padding included."""
        return -(-self.batch_rows // self.num_shards)

    @property
    def even(self) -> bool:
        """Whether all shards of all batches are equally long."""
        return self.batch_rows % self.num_shards == 0 and self.num_rows % self.batch_rows == 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.batch_rows)

    def rows_of(self, batches: Any) -> Any:
        """Rows of each of `batches`, int64 of any shape: a full batch, or what is left for the last one."""
        return (self.num_rows - batches * self.batch_rows).clip(0, self.batch_rows)

    def batch_range(self, batch: int) -> range:
        """Positions in the epoch's order that batch `batch` of the order holds."""
        first = batch * self.batch_rows
        return range(first, min(first + self.batch_rows, self.num_rows))
