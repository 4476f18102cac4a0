"""Centred second moments of the rows: one pass in float64, merged in fixed order.

Legend: `d` features, `D = d + 1` columns (the features, then the target), `u` shards of one replica, `V` shards,
`M = 1 + D + D*D`.

A set of rows is summed up by its weight, its means and its centred products, as one flat float64 vector `[M]`:

    W = sum w        m = sum w*z / W        C = sum w * (z - m)(z - m)'

Two sets merge by the formula of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing
sample variances", 1979; for covariances, Bennett et al. 2009):

    W = Wa + Wb      m = ma + (mb - ma) * Wb / W      C = Ca + Cb + (mb - ma)(mb - ma)' * Wa * Wb / W

Each shard's rows are merged block after block, tile after tile, by one compiled function of one shape; the shards'
vectors are gathered and merged in shard order. So the result depends neither on the topology nor on the number of
threads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.training import partials as fixed_order
from tapedist.training.steps import Replicas, Rows, slice_rows

_TILE_BYTES = 1024 * 1024
_NARROW = 4  # Up to this many columns, sums of products beat a product of matrices.
# Eigen shares the sums of longer products out to threads whatever XLA's flags say, and their bits follow the number of
# threads: with 65 columns from 256 rows on with 8 threads, from 512 rows on with 2. Up to 192 rows 1 to 64 agree.
_PRODUCT_ROWS = 128


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
    """The moments `[M]` of two sets of rows together; either may be empty."""
    weight = a[0] + b[0]
    # Two empty sets make an empty one; a tensor, because XLA rewrites division by a constant.
    safe = tf.where(weight > 0, weight, tf.ones_like(weight))
    share = b[0] / safe
    gap = b[1 : 1 + columns] - a[1 : 1 + columns]
    means = a[1 : 1 + columns] + gap * share
    cross = (gap[:, tf.newaxis] * gap[tf.newaxis, :]) * (a[0] * share)
    products = a[1 + columns :] + b[1 + columns :] + tf.reshape(cross, [-1])
    return tf.concat([weight[tf.newaxis], means, products], 0)


def rows_moments(rows: Rows, count: tf.Tensor) -> tf.Tensor:
    """Moments `[M]` of the first `count` of `rows`, `(x [k, d], y [k][, w [k]])`."""
    x, y = rows[0], rows[1]
    real = tf.range(y.shape[0]) < count
    weights = tf.cast(rows[2], tf.float64) if len(rows) == 3 else tf.ones(y.shape, tf.float64)
    weights = tf.where(real, weights, tf.zeros_like(weights))
    if x.shape[1] < _NARROW:
        return _narrow_moments([*tf.unstack(x, axis=1), y], weights, weighted=len(rows) == 3)
    z = tf.cast(tf.concat([x, y[:, tf.newaxis]], 1), tf.float64)
    weight = tf.reduce_sum(weights)
    safe = tf.where(weight > 0, weight, tf.ones_like(weight))
    means = tf.linalg.matvec(z, weights, transpose_a=True) / safe
    centred = tf.where(real[:, tf.newaxis], z - means, tf.zeros([], tf.float64))
    scaled = centred * weights[:, tf.newaxis] if len(rows) == 3 else centred
    products = tf.matmul(scaled, centred, transpose_a=True)
    return tf.concat([weight[tf.newaxis], means, tf.reshape(products, [-1])], 0)


def _narrow_moments(columns: list[tf.Tensor], weights: tf.Tensor, *, weighted: bool) -> tf.Tensor:
    """`rows_moments` by sums of products of columns `[k]`."""
    weight = tf.reduce_sum(weights)
    safe = tf.where(weight > 0, weight, tf.ones_like(weight))
    columns = [tf.cast(column, tf.float64) for column in columns]
    means = [tf.reduce_sum(weights * column) / safe for column in columns]
    # Unweighted, the weights are a mask: multiplying one factor by it is enough, and twice would cost.
    centred = [(column - mean) for column, mean in zip(columns, means, strict=True)]
    scaled = [weights * column for column in centred]
    products = {
        (i, j): tf.reduce_sum(scaled[i] * centred[j]) for i in range(len(columns)) for j in range(i, len(columns))
    }
    matrix = [products[min(i, j), max(i, j)] for i in range(len(columns)) for j in range(len(columns))]
    return tf.stack([weight, *means, *matrix])


class MomentSteps(Replicas):
    """The compiled pass.

    Args:
        strategy: where replicas live.
        num_features: `d`.
        num_shards: `V`.
        tile_rows: rows whose sums a core's cache should hold; divides the block.
    """

    def __init__(self, *, strategy: tf.distribute.Strategy, num_features: int, num_shards: int, tile_rows: int):
        super().__init__(strategy=strategy, num_shards=num_shards, partial_width=moments_width(num_features))
        self._columns = num_features + 1
        self._tile_rows = tile_rows

    @functools.cached_property
    def _block(self) -> Any:
        """`(moments [M] so far, rows of a block, count) -> moments [M]`: one compiled shape for all."""

        return tf.function(self._with_rows, jit_compile=True, autograph=False)

    def _with_rows(self, before: tf.Tensor, rows: Rows, count: tf.Tensor) -> tf.Tensor:
        tile_rows = _moment_tile(rows[1].shape[0], self._tile_rows, self._columns)

        def body(tile: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            first = tile * tile_rows
            piece = tuple(slice_rows(column, first, tile_rows) for column in rows)
            found = rows_moments(piece, tf.clip_by_value(count - first, 0, tile_rows))
            return tile + 1, merged(total, found, columns=self._columns)

        tiles = rows[1].shape[0] // tile_rows
        return tf.while_loop(lambda tile, _: tile < tiles, body, (tf.constant(0), before))[1]

    @functools.cached_property
    def _add_block(self) -> Any:
        block = self._block

        def replica_add(total, rows, counts):  # type: ignore[no-untyped-def]
            return block(total, rows, counts[0, 0])

        return tf.function(
            lambda total, rows, counts: self.on_replicas(replica_add, total, rows, counts), autograph=False
        )

    @functools.cached_property
    def _fold(self) -> Any:
        def fold(sums: tf.Tensor) -> tf.Tensor:
            return tf.while_loop(
                lambda shard, _: shard < self.num_shards,
                lambda shard, total: (shard + 1, merged(total, sums[shard], columns=self._columns)),
                (tf.constant(0), tf.zeros([self.partial_width], tf.float64)),
            )[1]

        return tf.function(fold, jit_compile=True, autograph=False)

    @functools.cached_property
    def _of_shards(self) -> Any:
        def shard_moments(rows: Rows, counts: tf.Tensor) -> tf.Tensor:
            shards, counts = counts.shape[1], tf.reshape(counts, [-1])
            shard_rows = rows[1].shape[0] // shards

            def one(shard: tf.Tensor) -> tf.Tensor:
                piece = tuple(slice_rows(column, shard * shard_rows, shard_rows) for column in rows)
                return self._with_rows(tf.zeros([self.partial_width], tf.float64), piece, tf.gather(counts, shard))

            return fixed_order.shard_partials(one, first=tf.constant(0), num_shards=shards, width=self.partial_width)

        compiled = tf.function(shard_moments, jit_compile=True, autograph=False)

        def replica_moments(rows, counts):  # type: ignore[no-untyped-def]
            found = compiled(rows, counts)[: self.replica_width]
            return self._fold(fixed_order.gather(found, num_shards=self.num_shards))

        return tf.function(lambda rows, counts: self.on_replicas(replica_moments, rows, counts), autograph=False)

    def of_shards(self, rows: Any, counts: Any) -> Moments:
        """The moments of a split whose shards are at hand, as `pipeline.shard_elements` lays them out."""
        found = self.strategy.experimental_local_results(self._of_shards(rows, counts))[0]
        return Moments.from_vector(found.numpy())

    def add_block(self, total: Any, rows: Any, counts: Any) -> Any:
        """A shard's moments `[M]` on each replica, with one more block merged in."""
        return self._add_block(total, rows, counts)

    def finish(self, sums: list[Any]) -> Moments:
        """The moments of all shards."""
        return Moments.from_vector(self._fold(tf.constant(self.gathered(sums))).numpy())


def _moment_tile(block_rows: int, tile_rows: int, columns: int) -> int:
    """The largest part of a block that divides it, is no longer than a tile, and whose float64 rows fit the cache."""
    most = min(tile_rows, max(64, _TILE_BYTES // (columns * 8)))
    if columns > _NARROW:
        most = min(most, _PRODUCT_ROWS)
    return next(
        block_rows // parts
        for parts in range(1, block_rows + 1)
        if block_rows % parts == 0 and block_rows // parts <= most
    )
