"""What the rows of a step add up to: the loss, the weights and the gradient, in the three ways there are.

`LinearSums` are exact sums of a linear model, which have no order; `ModuleSums` those of any other model, whose rows
are summed in pieces of one shape and whose pieces are added without an order; `PlainSums` are sums as the hardware
makes them. The gradient comes from a tape in all of them.

Legend: `d` features, `P` parameters, `T` rows of a tile, `n` tiles, `l` grids of a sum, `K` sums of a step.

Rows are `(x, y[, w])`: tiles of `[n, d, T]`, or `[n, T, d]` for `ModuleSums` and `PlainSums`, and `[n, T]`. The first
`count` rows of consecutive tiles are real; what is behind them, and where the weight is 0, must be zeros.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

from tapedist.training import exact
from tapedist.training.losses import Loss, ResidualLoss, checked, is_custom
from tapedist.training.model import Model

Rows = tuple[tf.Tensor, ...]

# Eigen shares the sums of longer products out to threads whatever XLA's flags say, and their bits follow the number of
# threads: with 65 columns of float64 from 256 rows on with 8 threads, from 512 rows on with 2. Up to 192 rows 1 to 64
# agree; so do products of as few rows with an own model's matrix whose sides are both below 256.
PIECE_ROWS = 128
# Features that one loop over the rows predicts from and sums; more of them take several loops.
_TOGETHER = 64


class Totals(NamedTuple):
    """Sums over all rows of a step.

    Attributes:
        loss: `sum w * loss`, float64 `[]`.
        weight: `sum w`.
        gradient: `[P]`, of the loss.
        rows: how many rows were summed.
        ok: whether the numbers were within the bounds of the arithmetic, boolean `[]`.
    """

    loss: tf.Tensor
    weight: tf.Tensor
    gradient: tf.Tensor
    rows: tf.Tensor
    ok: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Slot:
    """The tiles of a step among those of others.

    Attributes:
        first: int32, the number of the first tile.
        tiles: how many.
        rough: whether the loss may be rounded more.
    """

    first: tf.Tensor | int
    tiles: int
    rough: bool = False


class RowSums(Protocol):
    """One way to sum rows.

    Attributes:
        whole: whether many tiles may be summed inside a larger program; else a tile's program must be compiled alone,
            because what surrounds it could change its bits.
        row_major: whether tiles are `[T, d]` rather than `[d, T]`.
        zero: of the sums, before a row is in them.
    """

    whole: bool
    row_major: bool

    @property
    def zero(self) -> tf.Tensor: ...

    def of_tiles(
        self,
        theta: tf.Tensor,
        bounds: tf.Tensor,
        rows: Rows,
        count: tf.Tensor,
        slot: Slot | None = None,
    ) -> tf.Tensor:
        """Sums of some tiles, to be added to others' in any order.

        Args:
            theta: float64 `[P]`, the parameters.
            bounds: float64 `[d + 2]`, `Bounds.largest`.
            rows: see the module's docstring.
            count: int32, the real rows.
            slot: the tiles to sum, where they are all of a step; by default all there are, to which others are added.
        """

    def total(self, theta: tf.Tensor, bounds: tf.Tensor, sums: tf.Tensor) -> Totals:
        """What the sums of all rows stand for."""


class _Grids(NamedTuple):
    """What fixes a step's sums.

    Attributes:
        at: the parameters as products need them, float64 `[P]`.
        loss: steps of the grids of the loss, each `[]`.
        gradient: those of the gradient, each `[P]`.
        weight: those of the weights, each `[]`.
        ok: whether residuals are within the range of the arithmetic.
    """

    at: tf.Tensor
    loss: exact.Steps
    gradient: exact.Steps
    weight: exact.Steps
    ok: tf.Tensor


@dataclasses.dataclass(frozen=True)
class LinearSums:
    """Exact sums of a linear model; `docs/arithmetic.md` has the formulas.

    Attributes:
        num_features: `d`.
        fit_intercept: whether the last parameter is a bias.
        loss: the package's, or the user's, whose size nothing bounds.
        dtype: of the rows.
        weighted: whether they have weights.
        even: whether every call sums whole tiles.
    """

    num_features: int
    fit_intercept: bool
    loss: Loss
    dtype: tf.DType
    weighted: bool = False
    even: bool = False

    whole = True
    row_major = False

    @property
    def _kind(self) -> exact.Kind:
        return exact.Kind.of(self.dtype)

    @property
    def _own(self) -> bool:
        return is_custom(self.loss)

    @property
    def _row_loss(self) -> Loss:
        """The loss with its constant as the arithmetic has it: of as few bits as a residual."""
        if isinstance(self.loss, ResidualLoss) and math.isfinite(self.loss.delta):
            return dataclasses.replace(self.loss, delta=exact.trimmed_number(self.loss.delta, self._kind.short))
        return self.loss

    @property
    def _levels(self) -> tuple[int, int]:
        """Grids of the loss and of the gradient."""
        if self._own:
            window = exact.absolute_levels(exact.Kind.of(tf.float64))
            return window, window
        return 2, self._kind.levels

    @property
    def _sizes(self) -> list[int]:
        """Sums of numbers out of bounds, of the gradient, of weights, of the loss, and of the rows."""
        of_loss, of_gradient = self._levels
        return [int(self._own), of_gradient * self.num_parameters, 2 * self.weighted, of_loss, 1]

    @property
    def num_parameters(self) -> int:
        return self.num_features + self.fit_intercept

    @property
    def zero(self) -> tf.Tensor:
        return tf.zeros([2, sum(self._sizes)], tf.int64)

    def of_tiles(
        self,
        theta: tf.Tensor,
        bounds: tf.Tensor,
        rows: Rows,
        count: tf.Tensor,
        slot: Slot | None = None,
    ) -> tf.Tensor:
        """See `RowSums`; int64 `[2, K]`, or `[K]` of a slot whose rows are not too many."""
        first, number, rough = (slot.first, slot.tiles, slot.rough) if slot else (0, rows[1].shape[0], False)
        tiles = _Tiles(rows, first, number)
        numbers = self._numbers(self._grids(theta, bounds), tiles, count, rough)
        if tiles.parts > 1:
            halves = tf.reduce_sum(exact.halves(numbers), 2)
        elif slot:
            return tf.concat([numbers, [tf.cast(count, tf.int64)]], 0)
        else:
            halves = exact.halves(numbers)
        return tf.concat([halves, exact.halves([tf.cast(count, tf.int64)])], 1)

    def _numbers(self, grids: _Grids, tiles: _Tiles, count: tf.Tensor, rough: bool) -> tf.Tensor:
        """The sums of the first `count` rows of some tiles, int64 `[K - 1]`, or `[K - 1, parts]`."""
        d, levels = self.num_features, self._levels[1]
        if d <= _TOGETHER:
            return self._sums(grids, tiles, count, tiles.features(0, d), 0, rough=rough)
        y_hat = self._predictions(grids, tiles)
        whole, rest = divmod(d, _TOGETHER)

        def group(g: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            features = tiles.features(g * _TOGETHER, _TOGETHER)
            part = self._gradient(grids, tiles, count, features, g * _TOGETHER, y_hat)
            return g + 1, gen_xla_ops.xla_dynamic_update_slice(
                found, part[tf.newaxis], tf.stack([g, *[0] * part.shape.rank])
            )

        start = (tf.constant(0), tf.zeros([whole, levels * _TOGETHER, *tiles.by_part], tf.int64))
        found = tf.while_loop(lambda g, _: g < whole, group, start)[1]
        last = self._sums(grids, tiles, count, tiles.features(d - rest, rest), d - rest, y_hat, rough)
        bad, gradient, *others = tf.split(last, [self._sizes[0], levels * (self.num_parameters - d + rest), -1])
        by_level = [tf.reshape(part, [levels, -1, *tiles.by_part]) for part in (*tf.unstack(found), gradient)]
        return tf.concat([bad, tf.reshape(tf.concat(by_level, 1), [-1, *tiles.by_part]), *others], 0)

    def _predictions(self, grids: _Grids, tiles: _Tiles) -> tf.Tensor:
        """Of more features than one loop over the rows takes: one after the other, with the sums so far in memory."""
        d, kind = self.num_features, self._kind
        whole, rest = divmod(d, _TOGETHER)

        def add(total: tf.Tensor, first: tf.Tensor | int, number: int) -> tf.Tensor:
            columns = [tf.cast(column, tf.float64) for column in tiles.features(first, number)]
            return exact.chain(total, columns, tf.unstack(tf.slice(grids.at, [first], [number])), kind)

        start = (tf.constant(0), tf.zeros(tiles.shape, tf.float64))
        total = tf.while_loop(
            lambda g, _: g < whole, lambda g, total: (g + 1, add(total, g * _TOGETHER, _TOGETHER)), start
        )[1]
        total = add(total, d - rest, rest)
        return total + grids.at[d] if self.fit_intercept else total

    def _gradient(
        self,
        grids: _Grids,
        tiles: _Tiles,
        count: tf.Tensor,
        features: list[tf.Tensor],
        first: tf.Tensor,
        y_hat: tf.Tensor,
    ) -> tf.Tensor:
        """The gradient by the parameters of some features, int64 `[l * features]`."""
        at = tf.slice(grids.at, [first], [len(features)])
        steps = [tf.slice(step, [first], [len(features)]) for step in grids.gradient]
        _, _, terms = self._terms(features, at, tiles, count, y_hat)
        return exact.grid_sums([(terms, steps)], parts=tiles.parts)

    def _sums(
        self,
        grids: _Grids,
        tiles: _Tiles,
        count: tf.Tensor,
        features: list[tf.Tensor],
        first: int,
        y_hat: tf.Tensor | None = None,
        rough: bool = False,
    ) -> tf.Tensor:
        """Numbers out of bounds, the gradient from the parameter `first` on, weights and the loss, as far as there are
        such: int64 `[sums]`."""
        losses, slopes, terms = self._terms(features, grids.at[first:], tiles, count, y_hat)
        sums: list[tuple[Sequence[tf.Tensor], exact.Steps]]
        sums = [(terms, [step[first:] for step in grids.gradient])]
        if self.weighted:
            sums.append(([tf.cast(tiles.column(2), tf.float64)], _of_one(grids.weight)))
        sums.append(([losses], _of_one(grids.loss[: 1 if rough else None])))
        bad = [self._out_of_bounds(losses, slopes, self._real(tiles, count))] if self._own else []
        found = exact.grid_sums(sums, bad, parts=tiles.parts)
        unknown = [len(grids.loss) - 1 if rough else 0, *tiles.by_part]
        return tf.concat([found, tf.zeros(unknown, tf.int64)], 0)

    def _terms(
        self, features: list[tf.Tensor], at: tf.Tensor, tiles: _Tiles, count: tf.Tensor, y_hat: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Of each row the loss, its slope and what it adds to the gradient by each of the parameters `at`: the tape."""
        kind, real, y = self._kind, self._real(tiles, count), tf.cast(tiles.column(1), tf.float64)
        copies = tf.unstack(tf.tile(tf.reshape(at, [-1, *[1] * len(tiles.shape)]), [1, *tiles.shape]))
        with exact.pinning_unless(bool(kind.long) and not self._own):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(copies)
                y_hat = exact.exact_dot(
                    features, copies, kind, y_hat=y_hat, real=real if self._own else None,
                    short=not self._own and not self.weighted,
                )  # fmt: skip
                losses = self._losses(y_hat, y, tiles, real)
            *terms, slopes = tape.gradient(losses, [*copies, y_hat])
        return losses, slopes, terms

    def _losses(self, y_hat: tf.Tensor, y: tf.Tensor, tiles: _Tiles, real: tf.Tensor | None) -> tf.Tensor:
        """The weighted loss of each row."""
        if self._own:
            losses = _of_rows(self.loss, y_hat, y)
        else:  # The difference is all that it depends on, and has fewer bits; nothing comes of a difference of 0.
            residual = exact.trimmed(y_hat - y, self._kind.short)
            residual = residual if real is None else tf.where(real, residual, tf.zeros_like(residual))
            losses = self._row_loss(residual, tf.zeros_like(residual))
        if self.weighted:
            losses = exact.times(tf.cast(tiles.column(2), tf.float64), exact.trimmed(losses, self._kind.long))
        return tf.where(real, losses, tf.zeros_like(losses)) if self._own and real is not None else losses

    def _real(self, tiles: _Tiles, count: tf.Tensor) -> tf.Tensor | None:
        """Which rows to sum, boolean `[n, T]`; None if the others, if there are any, add nothing."""
        if self.weighted:
            return tiles.column(2) > 0 if self._own else None
        if self.even and not self._own:
            return None
        return tf.reshape(tf.range(math.prod(tiles.shape)), tiles.shape) < count

    def _out_of_bounds(self, losses: tf.Tensor, slopes: tf.Tensor, real: tf.Tensor | None) -> tf.Tensor:
        """Which losses or slopes of one's own no grid holds, int64 `[n, T]`; NaN is one of them."""
        most = exact.absolute_most(exact.Kind.of(tf.float64))
        # Slopes are multiplied by rows, whose largest product may be this large.
        largest = 2.0 ** (math.log2(most) / 2)
        bad = ~((tf.abs(losses) < most) & (tf.abs(slopes) < largest))
        return tf.cast(bad if real is None else bad & real, tf.int64)

    def _grids(self, theta: tf.Tensor, bounds: tf.Tensor) -> _Grids:
        kind, d, weight = self._kind, self.num_features, bounds[-1]
        at = exact.trimmed(exact.flushed(theta, kind.least), kind.long)
        residual = self._residual_bound(at, bounds)
        ok = residual < tf.constant(kind.most, tf.float64)
        weights = exact.grid_steps(weight, 2)
        if self._own:
            steps = exact.absolute_steps(exact.Kind.of(tf.float64))
            return _Grids(at, steps, [tf.fill([self.num_parameters], step) for step in steps], weights, ok)
        assert isinstance(self._row_loss, ResidualLoss)
        floor = tf.constant(kind.floor, tf.float64)
        slope = exact.pin(weight * self._row_loss.largest_slope(residual))
        slope = exact.pin(tf.maximum(slope, floor) * exact.SLACK)
        by_column = exact.pin(slope * tf.concat([bounds[:d], tf.ones([self.fit_intercept * 1], tf.float64)], 0))
        # Squared error has twice the slope that its terms are bounded by: on a grid twice as coarse it has their bits.
        twice = 2.0 if self.loss.name == "squared" else 1.0  # type: ignore[attr-defined]
        gradient = [twice * step for step in exact.grid_steps(by_column, kind.levels)]
        return _Grids(at, exact.grid_steps(exact.pin(slope * residual), 2), gradient, weights, ok)

    def _residual_bound(self, at: tf.Tensor, bounds: tf.Tensor) -> tf.Tensor:
        """A bound of `|y_hat - y|`; of its sum over features too, neither order nor rounding may decide the bits."""
        kind, d = self._kind, self.num_features
        products = exact.pin(tf.maximum(bounds[:d] * tf.abs(at[:d]), tf.constant(kind.floor, tf.float64)))
        terms = max(exact.CAP, (d - 1).bit_length())
        magic = 1.5 * 2.0 ** (terms - 1) * exact.pow2(tf.reduce_max(products))
        total = tf.reduce_sum((products + magic) - magic)
        bias = tf.abs(at[d]) if self.fit_intercept else tf.zeros([], tf.float64)
        residual = exact.pin(((total + bias) + bounds[d]) * exact.SLACK)
        return tf.maximum(residual, tf.constant(kind.floor, tf.float64))

    def total(self, theta: tf.Tensor, bounds: tf.Tensor, sums: tf.Tensor) -> Totals:
        grids = self._grids(theta, bounds)
        bad, gradient, weight, loss, rows = tf.split(sums, self._sizes, axis=-1)

        def value(totals: tf.Tensor, steps: exact.Steps) -> tf.Tensor:
            return exact.value(tf.reshape(totals, [*sums.shape[:-1], len(steps), *steps[0].shape]), steps)

        number = tf.cast(exact.whole(rows)[0], tf.float64)
        of_weights = value(weight, grids.weight) if self.weighted else number
        ok = grids.ok & tf.reduce_all(tf.equal(exact.whole(bad), 0))
        of_loss = tf.where(ok, value(loss, grids.loss), tf.constant(math.inf, tf.float64))
        return Totals(of_loss, of_weights, value(gradient, grids.gradient), number, ok)


def _of_rows(loss: Loss, y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """A loss of one's own, which takes rows `[k]`."""
    return tf.reshape(checked(loss)(tf.reshape(y_hat, [-1]), tf.reshape(y, [-1])), y.shape)


def _of_one(steps: exact.Steps) -> exact.Steps:
    """Steps `[]` as those of a group of one term, `[1]`."""
    return [step[tf.newaxis] for step in steps]


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Consecutive tiles of rows.

    Attributes:
        rows: features by tiles `[n, d, T]`, and columns `[n, T]`.
        first: the number of the first tile. What a loop of steps computes; else the compiler would cut the columns out
            before it, and hold them twice.
        number: how many tiles.
    """

    rows: Rows
    first: tf.Tensor | int
    number: int

    @property
    def parts(self) -> int:
        """Equal parts that are summed apart, because an int64 holds sums of so many rows only."""
        most = max(1, exact.MOST_ROWS // self.rows[1].shape[1])
        return next(parts for parts in itertools.count(-(-self.number // most)) if self.number % parts == 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a column: `[n, 1, T]`, behind an axis of the parts if there are several.

        As `[n * T]` where there is one feature: a loop in one piece needs no sums of its pieces.
        """
        parts, length = self.parts, self.rows[1].shape[1]
        number = self.number // parts
        return (*self.by_part, *((number, 1, length) if self.rows[0].shape[1] > 1 else (number * length,)))

    @property
    def by_part(self) -> tuple[int, ...]:
        """The axis of the parts, if there are several."""
        return (self.parts,) if self.parts > 1 else ()

    def features(self, first: tf.Tensor | int, count: int) -> list[tf.Tensor]:
        """Some of the features, each of `shape`."""
        shape = self.rows[0].shape
        if isinstance(self.first, int) and shape[:2] == [self.number, count]:
            columns = tf.split(self.rows[0], count, axis=1)
        else:  # One by one: the compiler would copy what several loops read.
            size = [self.number, 1, shape[2]]
            columns = [tf.slice(self.rows[0], [self.first, first + j, 0], size) for j in range(count)]
        return [self._shaped(column) for column in columns]

    def column(self, place: int) -> tf.Tensor:
        """Targets or weights, of `shape`."""
        return self._shaped(tf.slice(self.rows[place], [self.first, 0], [self.number, self.rows[1].shape[1]]))

    def _shaped(self, column: tf.Tensor) -> tf.Tensor:
        return column if column.shape == self.shape else tf.reshape(column, self.shape)


def tile_rows(rows: Rows, place: tf.Tensor) -> Rows:
    """One tile of `rows`."""

    def tile(column: tf.Tensor) -> tf.Tensor:
        shape = column.shape[1:]
        if column.shape[0] == 1:
            return tf.reshape(column, shape)
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
        on_cpu: whether the rows are on a CPU, where long products have the bits of the threads that share them.
    """

    model: Model
    loss: Loss
    dtype: tf.DType
    weighted: bool = False
    on_cpu: bool = True

    row_major = True

    def _rows_sum(self, theta: tf.Tensor, rows: Rows, count: tf.Tensor) -> tf.Tensor:
        """`(sum w*loss, sum w, gradient)` of a tile `(x [T, d], y [T][, w [T]])`, float64 `[P + 2]`.

        On a CPU, rows of an own model are summed piece after piece, so short that no product sums over many of them.
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
        # Own models and losses need not be finite at rows of zeros, and zero times infinity is not zero.
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
    """Sums in whatever order the hardware makes them: no bits are promised."""

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
    """Sums of a model of which nothing is known: a tile's are the compiler's, their sum is exact and has no order."""

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
        assert rows[1].shape[0] == 1, "a tile's program is compiled alone"
        kind = exact.Kind.of(self.dtype)
        sums = self._rows_sum(theta, tuple(column[0] for column in rows), count)
        steps = exact.absolute_steps(kind)
        numbers = tf.reshape(exact.integers(exact.on_grids(sums, steps), steps), [-1])
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


def value_and_gradient(function: Callable[[tf.Tensor], tf.Tensor], at: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A scalar function of one tensor, and its gradient there."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(at)
        value = function(at)
    return value, tape.gradient(value, at)
