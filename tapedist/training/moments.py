"""Centred second moments of the rows: one pass in float64, merged in fixed order.

Legend: `d` features, `D = d + 1` columns (the features, then the target), `u` shards of one replica, `V` shards,
`M = 1 + D + D*D`, `N` is `M`, or with weights one more, in which the rows are counted.

A set of rows is summed up by its weight, its means and its centred products, as one flat float64 vector `[M]`:

    W = sum w        m = sum w*z / W        C = sum w * (z - m)(z - m)'

Two sets merge by the formula of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing
sample variances", 1979; for covariances, Bennett et al. 2009):

    W = Wa + Wb      m = ma + (mb - ma) * Wb / W      C = Ca + Cb + (mb - ma)(mb - ma)' * Wa * Wb / W

Each block's moments come from one compiled function of one shape (`row_moments.py`), whoever runs it; a shard's blocks
are merged in their order, the shards' vectors are gathered and merged in shard order. So the result depends neither on
the topology nor on the number of threads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.training import partials as fixed_order
from tapedist.training.block_turns import BlockTurns
from tapedist.training.replicas import Replicas
from tapedist.training.row_moments import block_moments
from tapedist.training.steps import Rows, check_rows, slice_rows


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of a split, centred.

    Attributes:
        sum_weights: `W`.
        means: float64 `[d + 1]`, the target's last.
        centred: float64 `[d + 1, d + 1]`: `C`.
    """

    sum_weights: float
    means: np.ndarray
    centred: np.ndarray

    @classmethod
    def from_vector(cls, vector: np.ndarray) -> Moments:
        """Reads the flat form `[M]`."""
        columns = round(np.sqrt(len(vector) - 0.75) - 0.5)
        return cls(float(vector[0]), vector[1 : 1 + columns], vector[1 + columns :].reshape(columns, columns))

    def to_vector(self) -> np.ndarray:
        return np.concatenate([[self.sum_weights], self.means, self.centred.ravel()])


def moments_width(num_features: int) -> int:
    """`M`."""
    return 1 + (num_features + 1) + (num_features + 1) ** 2


def merged(a: tf.Tensor, b: tf.Tensor, *, columns: int) -> tf.Tensor:
    """The moments `[N]` of two sets of rows together; either may be empty."""
    end = 1 + columns + columns * columns
    weight = a[0] + b[0]
    # Two empty sets make an empty one; a tensor, because XLA rewrites division by a constant.
    safe = tf.where(weight > 0, weight, tf.ones_like(weight))
    share = b[0] / safe
    gap = b[1 : 1 + columns] - a[1 : 1 + columns]
    means = a[1 : 1 + columns] + gap * share
    cross = (gap[:, tf.newaxis] * gap[tf.newaxis, :]) * (a[0] * share)
    products = a[1 + columns : end] + b[1 + columns : end] + tf.reshape(cross, [-1])
    # Behind these, the rows that have joined.
    return tf.concat([weight[tf.newaxis], means, products, a[end:] + b[end:]], 0)


class MomentSteps(Replicas):
    """The compiled pass.

    Args:
        strategy: where replicas live.
        num_features: `d`.
        num_rows: rows of the split.
        weighted: whether they have weights.
        split: "train" or "test".
        num_shards: `V`.
        tile_rows: rows whose sums a core's cache should hold; divides the block.
        parallel: blocks under way side by side on a replica.
    """

    def __init__(
        self,
        *,
        strategy: tf.distribute.Strategy,
        num_features: int,
        num_rows: int,
        weighted: bool,
        split: str,
        num_shards: int,
        tile_rows: int,
        parallel: int,
    ):
        width = moments_width(num_features) + weighted
        super().__init__(strategy=strategy, num_shards=num_shards, partial_width=width)
        self._columns = num_features + 1
        self._num_rows, self._weighted, self._split = num_rows, weighted, split
        self._of_shards: dict[Any, Any] = {}
        self._tile_rows = tile_rows
        self._turns = BlockTurns(
            self,
            block_sum=tf.function(self._block, jit_compile=True, autograph=False),
            merge=tf.function(self._merged, jit_compile=True, autograph=False),
            parallel=parallel,
        )
        self.share_traces((num_features, weighted, tile_rows, parallel))

    def _block(self, rows: Rows, count: tf.Tensor) -> tf.Tensor:
        """Moments `[N]` of a block's first `count` rows."""
        found = block_moments(rows, count, tile_rows=self._tile_rows)
        return tf.concat([found, [tf.cast(count, tf.float64)]], 0) if self._weighted else found

    def _merged(self, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        return merged(a, b, columns=self._columns)

    def _folded(self, sums: tf.Tensor) -> tf.Tensor:
        return tf.while_loop(
            lambda shard, _: shard < self.num_shards,
            lambda shard, total: (shard + 1, self._merged(total, sums[shard])),
            (tf.constant(0), tf.zeros([self.partial_width], tf.float64)),
        )[1]

    @functools.cached_property
    def _fold(self) -> Any:
        return tf.function(self._folded, jit_compile=True, autograph=False)

    def _shard_moments(self, rows: Rows, counts: tf.Tensor) -> tf.Tensor:
        """Moments `[u, N]` of a replica's shards, of which each is one block."""
        shards, counts = counts.shape[1], tf.reshape(counts, [-1])
        shard_rows = rows[1].shape[0] // shards

        def one(shard: tf.Tensor) -> tf.Tensor:
            piece = tuple(slice_rows(column, shard * shard_rows, shard_rows) for column in rows)
            return self._block(piece, tf.gather(counts, shard))

        return fixed_order.shard_partials(one, first=tf.constant(0), num_shards=shards, width=self.partial_width)

    def _program(self, rows: Any, counts: Any) -> Any:
        """`_split_program` of rows of these shapes."""
        local = self.strategy.experimental_local_results
        key = tuple((local(column)[0].shape, local(column)[0].dtype) for column in (*rows, counts))
        if key not in self._of_shards:
            self._of_shards[key] = self._split_program(rows, counts)
        return self._of_shards[key]

    def _split_program(self, rows: Any, counts: Any) -> Any:
        """`(rows, counts) -> moments [N]`; of one replica a single compiled call."""
        if self.strategy.num_replicas_in_sync == 1:
            fused = tf.function(
                lambda rows, counts: self._folded(self._shard_moments(rows, counts)), jit_compile=True, autograph=False
            )
            return fused.get_concrete_function(rows, counts)  # To look it up anew costs as much as a small split.
        compiled = tf.function(self._shard_moments, jit_compile=True, autograph=False)

        def replica_moments(rows, counts):  # type: ignore[no-untyped-def]
            found = compiled(rows, counts)[: self.replica_width]
            return self._fold(fixed_order.gather(found, num_shards=self.num_shards))

        return tf.function(lambda rows, counts: self.on_replicas(replica_moments, rows, counts), autograph=False)

    def of_shards(self, rows: Any, counts: Any) -> Moments:
        """The moments of a split whose shards are at hand, as `pipeline.shard_block_elements` lays them out.

        Args:
            rows: per-replica rows of the split, of the same shapes in every call.
            counts: per-replica int32 `[1, u]`.

        Raises:
            MissingRowsError: if they do not hold every row once.
        """
        found = self.strategy.experimental_local_results(self._traced._program(rows, counts)(rows, counts))[0]
        return self._complete(found.numpy())

    def add_blocks(self, sums: Any, blocks: Any, places: list[int]) -> Any:
        """The shards' moments on each replica, with the next blocks merged in; arguments as in `BlockTurns`."""
        return self._traced._turns(sums, blocks, places)

    def finish(self, sums: Any) -> Moments:
        """The moments of all shards, of each replica's `[ceil(V / R), N]`.

        Raises:
            MissingRowsError: if they are not those of every row once.
        """
        return self._complete(self._traced._fold(tf.constant(self.gathered(sums))).numpy())

    def _complete(self, vector: np.ndarray) -> Moments:
        """The moments `[N]`, if every row has joined once."""
        check_rows(vector[-1:] if self._weighted else vector[:1], self._num_rows, self._split)
        return Moments.from_vector(vector[: moments_width(self._columns - 1)])
