"""Exact sums of a linear model over rows: the loss, the weights and the gradient, in any order.

Legend: `d` features, `P` parameters, `T` rows of a tile, `n` tiles, `l` grids of a sum, `K` sums of a step. How rows
lie in tiles: see `row_sums.py`; here they are feature-major.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

from tapedist.training import exact
from tapedist.training.losses import Loss, ResidualLoss, checked, is_custom
from tapedist.training.row_sums import Rows, Slot, Totals

# Features of one loop over the rows; more of them take several loops. Time to trace and compile grows with them: 64
# take 0.9 s in float32.
_TOGETHER = 64


class _Grids(NamedTuple):
    """Trimmed parameters and grids of a step.

    Attributes:
        at: the parameters, trimmed for exact products, float64 `[P]`.
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
        loss: the package's, or a custom one, which has no bound.
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
    def _custom(self) -> bool:
        return is_custom(self.loss)

    @property
    def _row_loss(self) -> Loss:
        """The loss with its constant trimmed to the bits of a residual."""
        if isinstance(self.loss, ResidualLoss) and math.isfinite(self.loss.delta):
            return dataclasses.replace(self.loss, delta=exact.trimmed_number(self.loss.delta, self._kind.short))
        return self.loss

    @property
    def _levels(self) -> tuple[int, int]:
        """Grids of the loss and of the gradient."""
        if self._custom:
            # No bound follows from a custom loss, so its sums take grids for numbers of any size, for float32 rows too.
            window = exact.absolute_levels(exact.Kind.of(tf.float64))
            return window, window
        # One grid shows a loss below about 1e-9 as 0; of a gradient it is enough for float32 rows, whose 29 bits of a
        # parameter err more.
        return 2, self._kind.levels

    @property
    def _sizes(self) -> list[int]:
        """Counts of the sums: of numbers out of bounds, the gradient, weights, the loss, and rows."""
        of_loss, of_gradient = self._levels
        return [int(self._custom), of_gradient * self.num_parameters, 2 * self.weighted, of_loss, 1]

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
        # An int64 holds the sums of one part. Sums of several parts or calls are added as halves; a slot is all that a
        # step sums, so its numbers need not be split, which saves kernels in the loop of steps.
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

        # A loop in the program, not in Python: its size, and the time to compile it, do not grow with `d`.
        def group(g: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            features = tiles.features(g * _TOGETHER, _TOGETHER)
            part = self._gradient(grids, tiles, count, features, g * _TOGETHER, y_hat)
            return g + 1, gen_xla_ops.xla_dynamic_update_slice(
                found, part[tf.newaxis], tf.stack([g, *[0] * part.shape.rank])
            )

        start = (tf.constant(0), tf.zeros([whole, levels * _TOGETHER, *tiles.by_part], tf.int64))
        found = tf.while_loop(lambda g, _: g < whole, group, start)[1]
        # The last group sums the loss and the weights as well, which must be summed once. It may have no feature.
        last = self._sums(grids, tiles, count, tiles.features(d - rest, rest), d - rest, y_hat, rough)
        bad, gradient, *others = tf.split(last, [self._sizes[0], levels * (self.num_parameters - d + rest), -1])
        by_level = [tf.reshape(part, [levels, -1, *tiles.by_part]) for part in (*tf.unstack(found), gradient)]
        return tf.concat([bad, tf.reshape(tf.concat(by_level, 1), [-1, *tiles.by_part]), *others], 0)

    def _predictions(self, grids: _Grids, tiles: _Tiles) -> tf.Tensor:
        """Predictions of more features than one loop takes: group after group, the sums so far in memory."""
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
        """The gradient by the parameters of some features, int64 `[l * features]`, or with an axis of parts."""
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
        """Numbers out of bounds (of a custom loss), the gradient from the parameter `first` on, weights (if there are
        any) and the loss: int64 `[sums]`."""
        losses, slopes, terms = self._terms(features, grids.at[first:], tiles, count, y_hat)
        sums: list[tuple[Sequence[tf.Tensor], exact.Steps]]
        sums = [(terms, [step[first:] for step in grids.gradient])]
        if self.weighted:
            sums.append(([tf.cast(tiles.column(2), tf.float64)], _of_one(grids.weight)))
        sums.append(([losses], _of_one(grids.loss[: 1 if rough else None])))
        bad = [self._out_of_bounds(losses, slopes, self._real(tiles, count))] if self._custom else []
        found = exact.grid_sums(sums, bad, parts=tiles.parts)
        # The grids that a rough loss leaves out are 0, so that both programs have sums of one shape.
        unknown = [len(grids.loss) - 1 if rough else 0, *tiles.by_part]
        return tf.concat([found, tf.zeros(unknown, tf.int64)], 0)

    def _terms(
        self, features: list[tf.Tensor], at: tf.Tensor, tiles: _Tiles, count: tf.Tensor, y_hat: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """The loss of each row, its slope, and its terms of the gradient by each of the parameters `at`, by a tape."""
        kind, real, y = self._kind, self._real(tiles, count), tf.cast(tiles.column(1), tf.float64)
        # A copy of each parameter for each row, which XLA never writes to memory: the tape costs nothing measurable.
        copies = tf.unstack(tf.tile(tf.reshape(at, [-1, *[1] * len(tiles.shape)]), [1, *tiles.shape]))
        # Products of float32 rows with trimmed factors are exact; those of a custom loss need not be.
        with exact.pinning_unless(bool(kind.long) and not self._custom):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                # The last group of features may be empty, and then only predictions made before lead to the loss.
                tape.watch(copies if y_hat is None else [*copies, y_hat])
                y_hat = exact.exact_dot(
                    features, copies, kind, y_hat=y_hat, real=real if self._custom else None,
                    short=not self._custom and not self.weighted,
                )  # fmt: skip
                losses = self._losses(y_hat, y, tiles, real)
            # A tape takes the gradient of the sum of `losses`; as each row has its own copies, these are single terms.
            *terms, slopes = tape.gradient(losses, [*copies, y_hat])
        return losses, slopes, terms

    def _losses(self, y_hat: tf.Tensor, y: tf.Tensor, tiles: _Tiles, real: tf.Tensor | None) -> tf.Tensor:
        """The weighted loss of each row."""
        if self._custom:
            losses = _of_rows(self.loss, y_hat, y)
        else:
            # The package's losses depend on the difference alone: it is trimmed once, and so all products of it are
            # exact. Padding gets the difference 0, for which losses and slopes are 0.
            residual = exact.trimmed(y_hat - y, self._kind.short)
            residual = residual if real is None else tf.where(real, residual, tf.zeros_like(residual))
            losses = self._row_loss(residual, tf.zeros_like(residual))
        if self.weighted:
            losses = exact.times(tf.cast(tiles.column(2), tf.float64), exact.trimmed(losses, self._kind.long))
        return tf.where(real, losses, tf.zeros_like(losses)) if self._custom and real is not None else losses

    def _real(self, tiles: _Tiles, count: tf.Tensor) -> tf.Tensor | None:
        """A mask of the rows to sum, boolean `[n, T]`; None if all others add 0 by themselves."""
        if self.weighted:
            return tiles.column(2) > 0 if self._custom else None
        if self.even and not self._custom:
            return None
        return tf.reshape(tf.range(math.prod(tiles.shape)), tiles.shape) < count

    def _out_of_bounds(self, losses: tf.Tensor, slopes: tf.Tensor, real: tf.Tensor | None) -> tf.Tensor:
        """Flags custom losses or slopes that no grid holds, int64 `[n, T]`; NaN is one of them."""
        most = exact.absolute_most(exact.Kind.of(tf.float64))
        # Slopes are multiplied by rows, whose largest product may be this large.
        largest = 2.0 ** (math.log2(most) / 2)
        # Not `>=`: every comparison with NaN is false.
        bad = ~((tf.abs(losses) < most) & (tf.abs(slopes) < largest))
        return tf.cast(bad if real is None else bad & real, tf.int64)

    def _grids(self, theta: tf.Tensor, bounds: tf.Tensor) -> _Grids:
        kind, d, weight = self._kind, self.num_features, bounds[-1]
        at = exact.trimmed(exact.flushed(theta, kind.least), kind.long)
        residual = self._residual_bound(at, bounds)
        ok = residual < tf.constant(kind.most, tf.float64)
        weights = exact.grid_steps(weight, 2)
        if self._custom:
            steps = exact.absolute_steps(exact.Kind.of(tf.float64))
            return _Grids(at, steps, [tf.fill([self.num_parameters], step) for step in steps], weights, ok)
        assert isinstance(self._row_loss, ResidualLoss)
        floor = tf.constant(kind.floor, tf.float64)
        slope = exact.pin(weight * self._row_loss.largest_slope(residual))
        # The floor keeps grids off the denormal numbers, which some machines flush and others do not.
        slope = exact.pin(tf.maximum(slope, floor) * exact.SLACK)
        by_column = exact.pin(slope * tf.concat([bounds[:d], tf.ones([self.fit_intercept * 1], tf.float64)], 0))
        # Squared error has twice the slope that its terms are bounded by: on a grid twice as coarse it has their bits.
        twice = 2.0 if self.loss.name == "squared" else 1.0  # type: ignore[attr-defined]
        gradient = [twice * step for step in exact.grid_steps(by_column, kind.levels)]
        return _Grids(at, exact.grid_steps(exact.pin(slope * residual), 2), gradient, weights, ok)

    def _residual_bound(self, at: tf.Tensor, bounds: tf.Tensor) -> tf.Tensor:
        """A bound of `|y_hat - y|`, with the same bits for any order of its sum over features."""
        kind, d = self._kind, self.num_features
        products = exact.pin(tf.maximum(bounds[:d] * tf.abs(at[:d]), tf.constant(kind.floor, tf.float64)))
        # On a grid of its own, as sums over rows are: a bound that differs by a bit may cross a power of two, and would
        # then halve or double every grid of the step. So many bits are free that `d` products add up exactly.
        terms = max(exact.CAP, (d - 1).bit_length())
        magic = 1.5 * 2.0 ** (terms - 1) * exact.pow2(tf.reduce_max(products))
        total = tf.reduce_sum((products + magic) - magic)
        bias = tf.abs(at[d]) if self.fit_intercept else tf.zeros([], tf.float64)
        residual = exact.pin(((total + bias) + bounds[d]) * exact.SLACK)
        return tf.maximum(residual, tf.constant(kind.floor, tf.float64))

    def total(self, theta: tf.Tensor, bounds: tf.Tensor, sums: tf.Tensor) -> Totals:
        # Made again from the same parameters, which costs a few scalars, rather than carried along with the sums.
        grids = self._grids(theta, bounds)
        bad, gradient, weight, loss, rows = tf.split(sums, self._sizes, axis=-1)

        def value(totals: tf.Tensor, steps: exact.Steps) -> tf.Tensor:
            return exact.value(tf.reshape(totals, [*sums.shape[:-1], len(steps), *steps[0].shape]), steps)

        number = tf.cast(exact.whole(rows)[0], tf.float64)
        of_weights = value(weight, grids.weight) if self.weighted else number
        ok = grids.ok & tf.reduce_all(tf.equal(exact.whole(bad), 0))
        # Out of bounds the integers mean nothing: an infinite loss is what `StepPrograms.apply` takes for divergence.
        of_loss = tf.where(ok, value(loss, grids.loss), tf.constant(math.inf, tf.float64))
        return Totals(of_loss, of_weights, value(gradient, grids.gradient), number, ok)


def _of_rows(loss: Loss, y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """A custom loss of each row; it takes and returns `[k]`."""
    return tf.reshape(checked(loss)(tf.reshape(y_hat, [-1]), tf.reshape(y, [-1])), y.shape)


def _of_one(steps: exact.Steps) -> exact.Steps:
    """Steps `[]` as those of a group of one term, `[1]`."""
    return [step[tf.newaxis] for step in steps]


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Consecutive tiles of rows.

    Attributes:
        rows: features by tiles `[n, d, T]`, and columns `[n, T]`.
        first: the number of the first tile. A tensor inside a loop of steps: columns at a constant place would be cut
            out before the loop, and held twice.
        number: how many tiles.
    """

    rows: Rows
    first: tf.Tensor | int
    number: int

    @property
    def parts(self) -> int:
        """The number of equal parts that are summed apart, because an int64 holds sums of so many rows only."""
        most = max(1, exact.MOST_ROWS // self.rows[1].shape[1])
        return next(parts for parts in itertools.count(-(-self.number // most)) if self.number % parts == 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a column: `[n, 1, T]`, behind an axis of the parts if there are several.

        `[n * T]` where there is one feature: one long loop, where a loop over tiles of 16 would add up its vectors
        after each of them.
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
        # One split instead of `count` slices, where all features are taken.
        if isinstance(self.first, int) and shape[:2] == [self.number, count]:
            columns = tf.split(self.rows[0], count, axis=1)
        else:  # One by one: XLA would copy a slice that several loops read.
            size = [self.number, 1, shape[2]]
            columns = [tf.slice(self.rows[0], [self.first, first + j, 0], size) for j in range(count)]
        return [self._shaped(column) for column in columns]

    def column(self, place: int) -> tf.Tensor:
        """Targets or weights, of `shape`."""
        return self._shaped(tf.slice(self.rows[place], [self.first, 0], [self.number, self.rows[1].shape[1]]))

    def _shaped(self, column: tf.Tensor) -> tf.Tensor:
        return column if column.shape == self.shape else tf.reshape(column, self.shape)
