"""Sums over rows in the rows' type, by a tape through any model: in pieces of one shape, or in any order.

Legend: `d` features, `P` parameters, `T` rows of a tile, `n` tiles, `K` sums of a step. How rows lie in tiles: see
`row_sums.py`; here they are row-major.
"""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

from tapedist.training import exact
from tapedist.training.losses import Loss, checked, is_custom
from tapedist.training.model import Model
from tapedist.training.row_sums import Rows, Slot, Totals

# Eigen splits the sums of longer products among threads whatever XLA's flags are, and the bits depend on the number of
# threads: with 65 columns of float64 from 256 rows on with 8 threads, from 512 rows on with 2. Up to 192 rows, 1 to 64
# threads agree; so do products of as few rows with a custom model's matrix whose sides are both below 256.
PIECE_ROWS = 128


def tile_rows(rows: Rows, place: tf.Tensor) -> Rows:
    """One tile of `rows`."""

    def tile(column: tf.Tensor) -> tf.Tensor:
        shape = column.shape[1:]
        if column.shape[0] == 1:
            return tf.reshape(column, shape)
        # Sliced as a matrix `[n * T, d]`: `column[place]` inside a loop makes XLA copy the slice.
        flat = tf.reshape(column, [-1, shape[-1]])
        height = math.prod(shape[:-1])
        return tf.reshape(tf.slice(flat, [place * height, 0], [height, shape[-1]]), shape)

    return tuple(tile(column) for column in rows)


@dataclasses.dataclass(frozen=True, eq=False)
class _TapeSums:
    """Sums of tiles in the rows' type, by a tape through any model.

    Attributes:
        model: what predicts.
        loss: of each row.
        dtype: of the rows.
        weighted: whether they have weights.
        on_cpu: whether the rows are on a CPU, where the bits of long products depend on the number of threads.
    """

    model: Model
    loss: Loss
    dtype: tf.DType
    weighted: bool = False
    on_cpu: bool = True

    row_major = True

    def _rows_sum(self, theta: tf.Tensor, rows: Rows, count: tf.Tensor) -> tf.Tensor:
        """`(sum w*loss, sum w, gradient)` of a tile `(x [T, d], y [T][, w [T]])`, float64 `[P + 2]`.

        On a CPU, rows of a custom model are summed in pieces of `PIECE_ROWS`.
        """
        number = rows[1].shape[0]
        if self.model.pure or not self.on_cpu or number <= PIECE_ROWS:
            return self._tape_sum(theta, rows, count)

        def piece_sum(first: tf.Tensor | int, length: int) -> tf.Tensor:
            piece = tuple(_slice_rows(column, first, length) for column in rows)
            return self._tape_sum(theta, piece, tf.clip_by_value(count - first, 0, length))

        whole, rest = divmod(number, PIECE_ROWS)
        start = (tf.constant(0), tf.zeros([self.model.num_parameters + 2], tf.float64))
        total = tf.while_loop(
            lambda i, _: i < whole, lambda i, total: (i + 1, total + piece_sum(i * PIECE_ROWS, PIECE_ROWS)), start
        )[1]
        return total + piece_sum(whole * PIECE_ROWS, rest) if rest else total

    def _tape_sum(self, theta: tf.Tensor, rows: Rows, count: tf.Tensor) -> tf.Tensor:
        # Padding is rows of zeros, where a custom model or loss need not be finite: its gradient would be 0 * infinity,
        # which is NaN, behind the `tf.where` below. So padding is made copies of a real row.
        repeats = not self.model.pure or is_custom(self.loss)
        if self.weighted:
            real = rows[2] > 0 if repeats else None
        else:
            real = tf.range(rows[1].shape[0]) < count
        if repeats:
            rows = _repeated(rows, real)
        x, y = rows[0], rows[1]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            forward, targets = self.model.bind(theta, self.dtype)
            tape.watch(targets)
            losses = checked(self.loss)(forward(x), y)
            if self.weighted:
                losses = rows[2] * losses
            total = tf.reduce_sum(losses if real is None else tf.where(real, losses, tf.zeros([], self.dtype)))
        gradients = tape.gradient(total, targets, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        if repeats:  # A tile without rows has none to repeat.
            gradients = [tf.where(tf.reduce_any(real), g, tf.zeros([], g.dtype)) for g in gradients]

        weight = tf.reduce_sum(rows[2]) if self.weighted else tf.cast(count, tf.float64)
        pieces = [tf.reshape(piece, [-1]) for piece in (total, weight, *gradients)]
        return tf.concat([tf.cast(piece, tf.float64) for piece in pieces], 0)


class PlainSums(_TapeSums):
    """Ordinary floating-point sums in any order: no bits are promised."""

    @property
    def whole(self) -> bool:
        return self.model.pure

    @property
    def zero(self) -> tf.Tensor:
        return tf.zeros([self.model.num_parameters + 3], tf.float64)

    def of_tiles(
        self,
        theta: tf.Tensor,
        bounds: tf.Tensor,
        rows: Rows,
        count: tf.Tensor,
        slot: Slot | None = None,
    ) -> tf.Tensor:
        """See `RowSums`; float64 `[P + 3]`."""
        length = rows[1].shape[1]
        place, tiles = (slot.first, slot.tiles) if slot else (tf.constant(0), rows[1].shape[0])

        def trip(k: tf.Tensor, place: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
            left = tf.clip_by_value(count - k * length, 0, length)
            return k + 1, place + 1, sums + self._rows_sum(theta, tile_rows(rows, place), left)

        start = (tf.constant(0), place, tf.zeros([self.model.num_parameters + 2], tf.float64))
        sums = trip(*start)[2] if tiles == 1 else tf.while_loop(lambda k, *_: k < tiles, trip, start)[2]
        return tf.concat([sums, [tf.cast(count, tf.float64)]], 0)

    def total(self, theta: tf.Tensor, bounds: tf.Tensor, sums: tf.Tensor) -> Totals:
        return Totals(sums[0], sums[1], sums[2:-1], sums[-1], tf.constant(True))


class ModuleSums(_TapeSums):
    """Sums of any model: a tile's are the compiler's own, and tiles are added exactly, in any order."""

    whole = False

    @property
    def _levels(self) -> int:
        return exact.absolute_levels(exact.Kind.of(self.dtype))

    @property
    def zero(self) -> tf.Tensor:
        return tf.zeros([2, self._levels * (self.model.num_parameters + 2) + 2], tf.int64)

    def of_tiles(
        self,
        theta: tf.Tensor,
        bounds: tf.Tensor,
        rows: Rows,
        count: tf.Tensor,
        slot: Slot | None = None,
    ) -> tf.Tensor:
        """See `RowSums`, for one tile; int64 `[2, K]`."""
        # Inside a larger program XLA would fuse and order a tile's sums by what surrounds them, with other bits.
        assert rows[1].shape[0] == 1, "a tile's program is compiled alone"
        kind = exact.Kind.of(self.dtype)
        sums = self._rows_sum(theta, tuple(column[0] for column in rows), count)
        steps = exact.absolute_steps(kind)
        numbers = tf.reshape(exact.integers(exact.on_grids(sums, steps), steps), [-1])
        # Not `>=`, so that NaN counts. As a count it adds up over tiles like the other integers.
        bad = tf.reduce_sum(tf.cast(~(tf.abs(sums) < exact.absolute_most(kind)), tf.int64))
        return exact.halves(tf.concat([numbers, tf.stack([bad, tf.cast(count, tf.int64)])], 0))

    def total(self, theta: tf.Tensor, bounds: tf.Tensor, sums: tf.Tensor) -> Totals:
        steps = exact.absolute_steps(exact.Kind.of(self.dtype))
        numbers = tf.reshape(sums[:, :-2], [2, self._levels, self.model.num_parameters + 2])
        values = exact.value(numbers, steps)
        bad, rows = tf.unstack(exact.whole(sums[:, -2:]))
        ok = tf.equal(bad, 0)
        loss = tf.where(ok, values[0], tf.constant(math.inf, tf.float64))
        return Totals(loss, values[1], values[2:], tf.cast(rows, tf.float64), ok)


def _slice_rows(column: tf.Tensor, first: tf.Tensor | int, count: int) -> tf.Tensor:
    """Rows `first .. first + count` of a column `[rows]` or `[rows, d]`."""
    if column.shape.rank == 1:
        return tf.slice(column, [first], [count])
    return tf.slice(column, [first, 0], [count, column.shape[1]])


def _repeated(rows: Rows, real: tf.Tensor) -> Rows:
    """`rows` with the first of the real ones in place of each that is not; `real` is boolean `[T]`."""

    def repeated(column: tf.Tensor) -> tf.Tensor:
        # Without weights the real rows come first.
        one = tf.gather(column, tf.argmax(tf.cast(real, tf.int32), 0)[tf.newaxis]) if len(rows) == 3 else column[:1]
        return tf.where(real if column.shape.rank == 1 else real[:, tf.newaxis], column, one)

    return repeated(rows[0]), repeated(rows[1]), *rows[2:]
