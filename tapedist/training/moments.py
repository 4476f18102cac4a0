"""Second moments of the rows, exact: one pass, whose sums have no order.

Legend: `d` features, `D = d + 1` columns (the features, then the target), `T` rows of a tile.

A column less its shift is cut into three slices of 21 bits each, whole numbers of at most `2**20` in units of their
own; a product of two has 41 bits, so that `2**13` of them add up without rounding, whoever multiplies the matrices
(Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication by using fast routines of matrix
multiplication and its applications", 2012). Products of slices below the third rank are left out: less than `2**-61`
of the largest. Without weights

    K_ab = sum of slice_a slice_b'      N = 2**42 K_00 + 2**21 (K_01 + K_10) + (K_02 + K_20 + K_11)

and with weights the first factor are the slices of `w * z`, rounded once. From the integers, the means and the centred
products

    W = sum w        m = shift + sum w*z / W        C = sum w * z * z' - (sum w*z)(sum w*z)' / W

are rational numbers, rounded once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.exact_arithmetic import SLICE_BITS, SLICE_ROWS
from tapedist.training import exact
from tapedist.training.block_pass import block_loop
from tapedist.training.bounds import Bounds, pow2
from tapedist.training.host_moments import SLICES, block_sums, pairs
from tapedist.training.replicas import Replicas, all_added
from tapedist.training.row_sums import Rows
from tapedist.training.steps import check_rows


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


@dataclasses.dataclass(frozen=True, eq=False)
class MomentUnits:
    """What columns are less, and in units of what their products are counted.

    Attributes:
        shifts: float64 `[D]`.
        tops: powers of two `[D]` that no shifted column exceeds.
        weighted_tops: those of `w * z`, and last of `w`: `[D + 1]`.
    """

    shifts: np.ndarray
    tops: np.ndarray
    weighted_tops: np.ndarray

    @classmethod
    def of(cls, bounds: Bounds) -> MomentUnits:
        tops = bounds.tops()
        return cls(bounds.shifts(), tops, pow2(bounds.weight * np.append(tops, 1.0)))

    def moments(self, sums: np.ndarray, *, weighted: bool) -> Moments:
        """What the integers `[2, M]` of `MomentSteps` stand for."""
        count = len(self.tops)
        numbers = np.array(exact.value_of(sums), object)
        multiplied = pairs(weighted)
        products, columns, rows = np.split(numbers, [len(multiplied) * count * count, len(numbers) - 1])
        columns = columns.reshape(SLICES, -1)
        total: Any = 0
        for (a, b), product in zip(multiplied, products.reshape(-1, count, count), strict=True):
            both = product if weighted or a == b else product + product.T
            total = total + both * (1 << SLICE_BITS * (2 - a - b))
        of_column: Any = sum(part * (1 << SLICE_BITS * (2 - a)) for a, part in enumerate(columns))
        exponents = np.frexp(self.tops)[1].astype(object) - 1
        if not weighted:
            return _moments(total, of_column, rows[0], 0, exponents, exponents, self.shifts)
        left = np.frexp(self.weighted_tops)[1].astype(object) - 1
        return _moments(total, of_column[:-1], of_column[-1], left[-1] - 62, left[:-1], exponents, self.shifts)


def _moments(
    products: np.ndarray,
    columns: np.ndarray,
    weight: int,
    weight_exponent: int,
    left: np.ndarray,
    right: np.ndarray,
    shifts: np.ndarray,
) -> Moments:
    """Means and centred products, each an exact quotient of integers that is rounded once.

    All but the shifts are Python integers.

    Args:
        products: `[D, D]`, of which those on and above the diagonal count, in units of `2**(left[i] + right[j] - 82)`.
        columns: `[D]`, sums of columns, in units of `2**(left[i] - 62)`.
        weight: the sum of weights, in units of `2**weight_exponent`.
        weight_exponent: see `weight`.
        left: `[D]`.
        right: `[D]`.
        shifts: float64 `[D]`.
    """
    count = len(columns)
    means, centred = np.zeros(count), np.zeros((count, count))
    if weight == 0:
        return Moments(0.0, means, centred)
    for i, shift in enumerate(shifts.tolist()):
        gap = Fraction(columns[i], weight) * Fraction(2) ** (left[i] - 62 - weight_exponent)
        means[i] = float(Fraction(shift) + gap)
    for j in range(count):
        # Of the product and of what the means take from it, times the weight; without the left column's unit.
        units = right[j] - 82, left[j] - 124 - weight_exponent
        unit = min(units)
        both = products[: j + 1, j] * weight * (1 << units[0] - unit)
        both = both - columns[: j + 1] * columns[j] * (1 << units[1] - unit)
        for i, numerator in enumerate(both):
            centred[i, j] = centred[j, i] = _quotient(numerator, weight, left[i] + unit)
    return Moments(_quotient(weight, 1, weight_exponent), means, centred)


def _quotient(numerator: int, denominator: int, exponent: int) -> float:
    """`numerator / denominator * 2**exponent`, rounded once; infinite beyond the range of float64."""
    try:
        return (numerator << exponent) / denominator if exponent >= 0 else numerator / (denominator << -exponent)
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


class MomentSteps(Replicas):
    """The compiled pass.

    Args:
        strategy: where replicas live.
        units: of the split's columns.
        num_rows: rows of the split.
        weighted: whether they have weights.
        split: "train" or "test".
        parallel: blocks under way side by side on a replica.
        fast: whether products may be rounded; on CPUs, where that saves most of the work, they then are.
        row_major: whether tiles are `[T, d]`, which CPUs alone take.
    """

    def __init__(
        self,
        *,
        strategy: tf.distribute.Strategy,
        units: MomentUnits,
        num_rows: int,
        weighted: bool,
        split: str,
        parallel: int,
        fast: bool = False,
        row_major: bool = False,
    ):
        super().__init__(strategy=strategy)
        self._columns = len(units.tops)
        self._units, self._num_rows, self._weighted, self._split = units, num_rows, weighted, split
        self._parallel, self._fast, self.row_major = parallel, fast, row_major
        self._numbers = np.concatenate([[0.0], units.shifts, units.tops, units.weighted_tops])
        self.share_traces((self._columns, weighted, parallel, fast, row_major))

    @property
    def zero(self) -> np.ndarray:
        """Sums before a row is in them, int64 `[2, M]`."""
        sums = len(pairs(self._weighted)) * self._columns**2 + SLICES * (self._columns + self._weighted) + 1
        return np.zeros([2, sums], np.int64)

    def _block(self, numbers: tf.Tensor, rows: Rows, count: tf.Tensor) -> tf.Tensor:
        """Integers `[2, M]` of a block's first `count` rows."""
        zero, *units = tf.split(numbers, [1, self._columns, self._columns, self._columns + 1], num=4)
        shifts, tops, weighted_tops = (unit[:, tf.newaxis] for unit in units)
        x, y, *weights = (tf.cast(column, tf.float64) for column in rows)
        z = tf.concat([x, y[:, tf.newaxis]], 1) - shifts
        if weights:  # Which are 0 where no row is real.
            right = _slices(z, tops)
            with exact.pinning(tf.bitcast(zero[0], tf.int64)):
                weighted = exact.pin(weights[0][:, tf.newaxis] * tf.concat([z, tf.ones_like(z[:, :1])], 1))
            left = _slices(weighted, weighted_tops)
        else:
            real = tf.reshape(tf.range(y.shape.num_elements()) < count, [y.shape[0], 1, y.shape[1]])
            left = right = _slices(tf.where(real, z, tf.zeros([], tf.float64)), tops)
        products = [_product(left[a][:, : self._columns], right[b]) for a, b in pairs(self._weighted)]
        columns = [tf.reduce_sum(tf.cast(tf.reduce_sum(part, 2), tf.int64), 0) for part in left]
        sums = [tf.reshape(part, [-1]) for part in (*products, *columns, tf.cast(count, tf.int64))]
        return exact.halves(tf.concat(sums, 0))

    def _host_block(self, numbers: tf.Tensor, rows: Rows, count: tf.Tensor) -> tf.Tensor:
        """`_block` by NumPy."""

        def sums(numbers: np.ndarray, count: np.int32, *rows: np.ndarray) -> np.ndarray:
            return block_sums(numbers[1:], int(count), rows, fast=self._fast, row_major=self.row_major)

        return tf.ensure_shape(
            tf.numpy_function(sums, [numbers, count, *rows], tf.int64, stateful=False), self.zero.shape
        )

    @functools.cached_property
    def _block_sums(self) -> Any:
        if self.on_cpu:
            return self._host_block
        return tf.function(self._block, jit_compile=True, autograph=False)

    @functools.cached_property
    def _loop(self) -> Any:
        return block_loop(self, self._block_sums, parallel=self._parallel)

    def add_blocks(self, sums: Any, blocks: Any, turns: tf.Tensor) -> Any:
        """Each replica's sums, with its next blocks in them; see `block_loop`."""
        return self._traced._loop(sums, blocks, turns, tf.constant(self._numbers))

    @functools.cached_property
    def _whole_split(self) -> Any:
        def sums(numbers, rows, counts):  # type: ignore[no-untyped-def]
            return all_added(self._block_sums(numbers, rows, counts[0]))

        return tf.function(lambda *arguments: self.on_replicas(sums, *arguments), autograph=False)

    def of_rows(self, rows: Any, counts: Any) -> np.ndarray:
        """The integers `[2, M]` of each replica's rows at hand.

        Args:
            rows: per-replica, one slot of tiles of features, as `pipeline.py` lays it out.
            counts: per-replica int32 `[1]`.
        """
        found = self._traced._whole_split(tf.constant(self._numbers), rows, counts)
        return self.strategy.experimental_local_results(found)[0].numpy()

    def of_split(self, rows: Any, counts: Any) -> np.ndarray:
        """`of_rows` of a whole split.

        Raises:
            MissingRowsError: if not every row is in them once.
        """
        return self._complete(self.of_rows(rows, counts))

    def finish(self, sums: Any) -> np.ndarray:
        """The integers `[2, M]` of all replicas' sums.

        Raises:
            MissingRowsError: if not every row is in them once.
        """
        return self._complete(self.added(sums))

    def _complete(self, sums: np.ndarray) -> np.ndarray:
        check_rows(np.array(exact.value_of(sums[:, -1:])), self._num_rows, self._split)
        return sums

    def moments(self, sums: np.ndarray) -> Moments:
        """What the integers stand for."""
        return self._units.moments(sums, weighted=self._weighted)


def _slices(columns: tf.Tensor, tops: tf.Tensor) -> list[tf.Tensor]:
    """`columns` `[n, D, T]` cut into whole numbers, in units `2**20, 2**41, 2**62` times finer than `tops` `[D, 1]`."""
    slices = []
    for number in range(SLICES):
        step = tops * 2.0 ** (1 - SLICE_BITS - SLICE_BITS * number)
        magic = (1.5 * 2.0**52) * step
        cut = (columns + magic) - magic
        slices.append(cut / step)
        columns = columns - cut
    return slices


def _product(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The sum of `a b'` over tiles of whole numbers `[n, D, T]` of at most `2**20`, int64 `[D, D]`."""
    assert a.shape[-1] <= SLICE_ROWS
    return tf.reduce_sum(tf.cast(tf.matmul(a, b, transpose_b=True), tf.int64), 0)
