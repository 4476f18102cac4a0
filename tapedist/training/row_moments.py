"""Second moments of the rows of one block, tile by tile: the compiled kernel of the `moments` pass.

Legend: `d` features, `D = d + 1` columns (the features, then the target), `S` rows of a block, `k` of a tile,
`M = 1 + D + D*D` numbers in moments (`moments.py`).

A tile's means are subtracted before its products are summed, so that no digits cancel; then it joins the tiles before
it. Products of many features are kept as two panels of the symmetric matrix, its upper rows and the square below them
on the diagonal, which are made whole at the end of the block.
"""

from __future__ import annotations

from typing import NamedTuple

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.training.steps import PRODUCT_ROWS, Rows, slice_rows

_TILE_BYTES = 1024 * 1024
_NARROW = 3  # Up to so many features, sums of products beat a product of matrices.
_HALVED = 32  # From so many on, two panels beat the whole product.


class _Sums(NamedTuple):
    """Moments of some rows, in parts that are cheap to add up.

    Attributes:
        weight: `[]`.
        mean: of the features, `[d]`.
        target_mean: `[]`.
        panels: products of features; each panel holds some rows of the matrix `[d, d]` from its diagonal on.
        cross: products of the features with the target, `[d]`.
        square: `[]`, of the target.
    """

    weight: tf.Tensor
    mean: tf.Tensor
    target_mean: tf.Tensor
    panels: tuple[tf.Tensor, ...]
    cross: tf.Tensor
    square: tf.Tensor


def block_moments(rows: Rows, count: tf.Tensor, *, tile_rows: int) -> tf.Tensor:
    """Moments `[M]` of a block's first `count` rows.

    Args:
        rows: `(x [S, d], y [S][, w [S]])`; beyond `count`, and where the weight is 0, they must be zeros.
        count: int32.
        tile_rows: rows whose sums a core's cache should hold; divides the block.
    """
    block_rows, d = rows[0].shape
    tile_rows = _tile(block_rows, tile_rows, d)
    tile_sums = _narrow_sums if d <= _NARROW else _wide_sums
    empty = _empty(d)

    def add_tile(tile: tf.Tensor, *flat: tf.Tensor) -> tuple[tf.Tensor, ...]:
        first = tile * tile_rows
        piece = tuple(slice_rows(column, first, tile_rows) for column in rows)
        found = tile_sums(piece, tf.clip_by_value(count - first, 0, tile_rows))
        return tile + 1, *tf.nest.flatten(_merged(tf.nest.pack_sequence_as(empty, flat), found))

    start = (tf.constant(0), *tf.nest.flatten(empty))
    _, *flat = tf.while_loop(lambda tile, *_: tile < block_rows // tile_rows, add_tile, start)
    return _vector(tf.nest.pack_sequence_as(empty, flat))


def _panel_starts(d: int) -> tuple[int, ...]:
    return (0, d // 2) if d >= _HALVED else (0,)


def _empty(d: int) -> _Sums:
    def zeros(*shape: int) -> tf.Tensor:
        return tf.zeros(shape, tf.float64)

    starts = _panel_starts(d)
    panels = tuple(zeros(stop - start, d - start) for start, stop in zip(starts, (*starts[1:], d), strict=True))
    return _Sums(zeros(), zeros(d), zeros(), panels, zeros(d), zeros())


def _wide_sums(rows: Rows, count: tf.Tensor) -> _Sums:
    """Sums of the first `count` of a tile's rows `(x [k, d], y [k][, w [k]])` by products of matrices."""
    x, y, *weights = (tf.cast(column, tf.float64) for column in rows)
    weight = tf.reduce_sum(weights[0]) if weights else tf.cast(count, tf.float64)
    safe = _or_one(weight)
    mean = tf.reduce_sum(weights[0][:, tf.newaxis] * x if weights else x, 0) / safe
    target_mean = tf.reduce_sum(weights[0] * y if weights else y) / safe
    x, y = x - mean, y - target_mean
    if weights:  # Which are 0 in the padding.
        scaled_x, scaled_y = weights[0][:, tf.newaxis] * x, weights[0] * y
    else:
        real = tf.range(y.shape[0]) < count
        scaled_x = x = tf.where(real[:, tf.newaxis], x, tf.zeros([], tf.float64))
        scaled_y = tf.where(real, y, tf.zeros([], tf.float64))
    # XLA's own code for products of few columns is faster than Eigen's, and takes them in this order only.
    turned, starts = tf.transpose(scaled_x), _panel_starts(x.shape[1])
    panels = tuple(
        tf.matmul(turned[start:stop], x[:, start:]) for start, stop in zip(starts, (*starts[1:], None), strict=True)
    )
    cross = tf.linalg.matvec(x, scaled_y, transpose_a=True)
    return _Sums(weight, mean, target_mean, panels, cross, tf.reduce_sum(scaled_y * y))


def _narrow_sums(rows: Rows, count: tf.Tensor) -> _Sums:
    """`_wide_sums` by sums of products of columns `[k]`."""
    x, y, *weights = (tf.cast(column, tf.float64) for column in rows)
    # A tile's weights as numbers, or 1 for rows and 0 for padding.
    w = weights[0] if weights else tf.cast(tf.range(y.shape[0]) < count, tf.float64)
    weight = tf.reduce_sum(w) if weights else tf.cast(count, tf.float64)
    safe = _or_one(weight)
    columns = [*tf.unstack(x, axis=1), y]
    means = [tf.reduce_sum(w * column if weights else column) / safe for column in columns]
    centred = [column - mean for column, mean in zip(columns, means, strict=True)]
    scaled = [w * column for column in centred]
    d = len(columns) - 1
    products = {(i, j): tf.reduce_sum(scaled[i] * centred[j]) for i in range(d + 1) for j in range(i, d + 1)}
    panel = tf.reshape(tf.stack([products[min(i, j), max(i, j)] for i in range(d) for j in range(d)]), [d, d])
    cross = tf.stack([products[i, d] for i in range(d)])
    return _Sums(weight, tf.stack(means[:d]), means[d], (panel,), cross, products[d, d])


def _or_one(weight: tf.Tensor) -> tf.Tensor:
    """A weight to divide by: no rows have no mean. A tensor, because XLA rewrites division by a constant."""
    return tf.where(weight > 0, weight, tf.ones_like(weight))


def _merged(a: _Sums, b: _Sums) -> _Sums:
    """Both sets of rows together, by the formula in `moments.py`."""
    weight = a.weight + b.weight
    share = b.weight / _or_one(weight)
    factor = a.weight * share
    gap, target_gap = b.mean - a.mean, b.target_mean - a.target_mean
    panels = []
    for start, panel, more in zip(_panel_starts(gap.shape[0]), a.panels, b.panels, strict=True):
        rows, columns = gap[start : start + panel.shape[0], tf.newaxis], gap[start:]
        panels.append(panel + more + rows * columns * factor)
    return _Sums(
        weight,
        a.mean + gap * share,
        a.target_mean + target_gap * share,
        tuple(panels),
        a.cross + b.cross + gap * (target_gap * factor),
        a.square + b.square + target_gap * target_gap * factor,
    )


def _vector(sums: _Sums) -> tf.Tensor:
    """The flat form `[M]`."""
    d = sums.cross.shape[0]
    upper = tf.concat([tf.pad(panel, [[0, 0], [d - panel.shape[1], 0]]) for panel in sums.panels], 0)
    # The corner that a second panel leaves out is the other one, turned.
    height = sums.panels[0].shape[0]
    corner = tf.pad(tf.transpose(upper[:height, height:]), [[height, 0], [0, d - height]])
    features = tf.concat([upper + corner, sums.cross[:, tf.newaxis]], 1)
    target = tf.concat([sums.cross, sums.square[tf.newaxis]], 0)
    products = tf.concat([features, target[tf.newaxis]], 0)
    return tf.concat([[sums.weight], sums.mean, [sums.target_mean], tf.reshape(products, [-1])], 0)


def _tile(block_rows: int, tile_rows: int, d: int) -> int:
    """The largest part of a block that divides it, is no longer than a tile, and whose float64 rows fit the cache."""
    most = min(tile_rows, max(64, _TILE_BYTES // ((d + 1) * 8)))
    if d > _NARROW:
        most = min(most, PRODUCT_ROWS)
    return next(
        block_rows // parts
        for parts in range(1, block_rows + 1)
        if block_rows % parts == 0 and block_rows // parts <= most
    )
