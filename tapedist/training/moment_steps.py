"""The pass over the rows that sums the integers of second moments (`moments.py`).

Legend: `d` features, `D = d + 1` columns (the features, then the target), `T` rows of a tile, `M` integers.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.data.exact_arithmetic import SLICE_BITS, SLICE_ROWS
from tapedist.data.pipeline import ElementStream
from tapedist.regression.least_squares import Moments
from tapedist.training import exact
from tapedist.training.block_pass import block_loop
from tapedist.training.host_moments import SLICES, block_sums, pairs
from tapedist.training.moments import MomentUnits
from tapedist.training.replicas import Replicas, all_added
from tapedist.training.row_sums import Rows
from tapedist.training.steps import check_rows

NARROW = 4  # Up to so many columns, one loop over the rows is faster than products of matrices.


class MomentSteps(Replicas):
    """A pass over the rows; the base of the implementations.

    Args:
        strategy: of the replicas.
        units: of the split's columns.
        num_rows: rows of the split.
        weighted: whether they have weights.
        split: "train" or "test".

    Attributes:
        row_major: whether tiles are `[T, d]` rather than `[d, T]`.
    """

    row_major = False

    def __init__(
        self, *, strategy: tf.distribute.Strategy, units: MomentUnits, num_rows: int, weighted: bool, split: str
    ):
        super().__init__(strategy=strategy)
        self._columns = len(units.tops)
        self._units, self._num_rows, self._weighted, self._split = units, num_rows, weighted, split

    @property
    def zero(self) -> np.ndarray:
        """Sums before a row is in them, int64 `[2, M]`."""
        sums = len(pairs(self._weighted)) * self._columns**2 + SLICES * (self._columns + self._weighted) + 1
        return np.zeros([2, sums], np.int64)

    def of_rows(self, rows: Any, counts: Any) -> np.ndarray:
        """The integers `[2, M]` of rows that the replicas hold.

        Args:
            rows: per-replica, one slot of tiles, as `pipeline.py` lays it out.
            counts: per-replica int32 `[1]`.
        """
        raise NotImplementedError

    def of_split(self, rows: Any, counts: Any) -> np.ndarray:
        """`of_rows` of a whole split.

        Raises:
            MissingRowsError: if not every row is in them once.
        """
        return self._complete(self.of_rows(rows, counts))

    def add_blocks(self, sums: Any, blocks: Any, visits: int) -> Any:
        """Sums with the next blocks in them, for `BlockPass`."""
        raise NotImplementedError

    def finish(self, sums: Any) -> np.ndarray:
        """The integers `[2, M]` of all rows, of what a pass ends with.

        Raises:
            MissingRowsError: if not every row is in them once.
        """
        return self._complete(self.added(sums))

    def _complete(self, sums: np.ndarray) -> np.ndarray:
        check_rows(np.array(exact.value_of(sums[:, -1:])), self._num_rows, self._split)
        return sums

    def moments(self, sums: np.ndarray) -> Moments:
        """Converts the integers to moments."""
        return self._units.moments(sums, weighted=self._weighted)


class HostMomentSteps(MomentSteps):
    """Sums by NumPy, on all cores of each process, the rows of all replicas of a worker.

    Args:
        fast: whether products may be rounded.
        row_major: see `MomentSteps`.
        **rows: see `MomentSteps`.
    """

    def __init__(self, *, fast: bool = False, row_major: bool = False, **rows: Any):
        super().__init__(**rows)
        self._fast, self.row_major = fast, row_major
        self.share_traces((self._columns, self._weighted, fast, row_major))

    def _sums(self, *element: np.ndarray) -> np.ndarray:
        """The integers of the first rows of a block `(x, y[, w], counts [1])`."""
        units = self._units
        numbers = np.concatenate([units.shifts, units.tops, units.weighted_tops])
        *rows, counts = element
        return block_sums(numbers, int(counts[0]), rows, fast=self._fast, row_major=self.row_major)

    def of_rows(self, rows: Any, counts: Any) -> np.ndarray:
        local = self.strategy.experimental_local_results
        elements = zip(*(local(column) for column in (*rows, counts)), strict=True)
        return self.added(sum((self._sums(*(column.numpy() for column in each)) for each in elements), self.zero))

    def add_blocks(self, sums: np.ndarray, blocks: Iterator[list[Callable[[], Any]]], visits: int) -> np.ndarray:
        elements = itertools.chain.from_iterable(itertools.islice(blocks, visits))
        # NumPy releases the interpreter's lock in products and in operations on whole chunks, so that threads are
        # enough.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as cores:
            for found in cores.map(lambda element: self._sums(*element()), elements):
                sums += found
        return sums

    def given_to_first(self, sums: np.ndarray) -> np.ndarray:
        """`sums` in the process of the first replica, and zeros in the others."""
        # A copy, because `add_blocks` adds in place.
        return sums.copy() if 0 in self.local_replicas else np.zeros_like(sums)

    def added(self, sums: np.ndarray) -> np.ndarray:
        """The sum of all processes' `sums`."""
        if self.strategy.num_replicas_in_sync == 1:
            return sums.copy()

        # A process has one array, where the all-reduce takes one of each replica: the others' are zeros.
        def share(context: tf.distribute.ValueContext) -> tf.Tensor:
            mine = context.replica_id_in_sync_group == self.local_replicas[0]
            return tf.constant(sums if mine else np.zeros_like(sums))

        return super().added(self.strategy.experimental_distribute_values_from_function(share))


class CompiledMomentSteps(MomentSteps):
    """Sums by a compiled program: on accelerators, and on CPUs for many narrow rows that TensorFlow makes.

    Args:
        parallel: blocks that a replica sums at the same time.
        **rows: see `MomentSteps`.
    """

    def __init__(self, *, parallel: int, **rows: Any):
        super().__init__(**rows)
        units, self._parallel = self._units, parallel
        # The 0.0 is the zero that pins products; all are arguments of the program, which serves other splits as well.
        self._numbers = np.concatenate([[0.0], units.shifts, units.tops, units.weighted_tops])
        self.share_traces((self._columns, self._weighted, parallel))

    def _block(self, numbers: tf.Tensor, rows: Rows, count: tf.Tensor) -> tf.Tensor:
        """Integers `[2, M]` of a block's first `count` rows."""
        if self._columns <= NARROW:
            sums = self._narrow_sums(numbers, rows, count)
        else:
            x, y, *weights = (tf.cast(column, tf.float64) for column in rows)
            left, right = self._sides(numbers[:, tf.newaxis], tf.concat([x, y[:, tf.newaxis]], 1), weights, count)
            products = [_product(left[a][:, : self._columns], right[b]) for a, b in pairs(self._weighted)]
            # A tile's sums are exact in float64, at most 2**13 numbers of 2**20, and those of many tiles only as
            # integers.
            columns = [tf.reduce_sum(tf.cast(tf.reduce_sum(part, 2), tf.int64), 0) for part in left]
            sums = tf.concat([tf.reshape(part, [-1]) for part in (*products, *columns)], 0)
        return exact.halves(tf.concat([sums, [tf.cast(count, tf.int64)]], 0))

    def _sides(
        self, numbers: tf.Tensor, columns: tf.Tensor, weights: list[tf.Tensor], count: tf.Tensor
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Slices of the weighted columns and of the weights `[n, D + 1, T]`, and of the columns `[n, D, T]`.

        `numbers` are `[1 + 3 D + 1, 1]`.
        """
        zero, shifts, tops, weighted_tops = tf.split(numbers, [1, self._columns, self._columns, self._columns + 1])
        z = columns - shifts
        if not weights:
            n, _, length = columns.shape
            # Padding is 0 before the shift, and `-shift` after it.
            real = tf.reshape(tf.range(n * length) < count, [n, 1, length])
            both = _slices(tf.where(real, z, tf.zeros([], tf.float64)), tops)
            return both, both
        with exact.pinning(tf.bitcast(zero[0], tf.int64)[0]):  # Weights are 0 where no row is real.
            weighted = exact.pin(weights[0][:, tf.newaxis] * tf.concat([z, tf.ones_like(z[:, :1])], 1))
        return _slices(weighted, weighted_tops), _slices(z, tops)

    def _narrow_sums(self, numbers: tf.Tensor, rows: Rows, count: tf.Tensor) -> tf.Tensor:
        """All integers but the count, by one loop over the rows that sums the products of one rank together."""
        left, right = self._narrow_sides(numbers, rows, count)
        size, ranks = self._columns, [(0, 0), (0, 1), (0, 2) if self._weighted else (1, 1)]
        above = [(i, j) for i in range(size) for j in range(i, size)]
        terms = [_ranked(left[i], right[j], rank, i == j and not self._weighted) for rank in range(3) for i, j in above]
        terms += [column[level] for level in range(SLICES) for column in left]
        # Terms are whole numbers below 2**42 already, so on a grid of step 1: nothing is rounded, and an int64 has room
        # for `MOST_ROWS` of them.
        found = tf.unstack(exact.grid_sums([(terms, [tf.ones([len(terms)], tf.float64)])]))
        # `MomentUnits.moments` adds the products of a rank: here all of it is in the place of one, and the others are
        # 0.
        places = {(ranks[rank], at): found.pop(0) for rank in range(3) for at in above}
        nothing = tf.zeros([], tf.int64)
        products = [
            places.get((pair, (i, j)), nothing)
            for pair in pairs(self._weighted)
            for i in range(size)
            for j in range(size)
        ]
        return tf.stack([*products, *found])

    def _narrow_sides(
        self, numbers: tf.Tensor, rows: Rows, count: tf.Tensor
    ) -> tuple[list[list[tf.Tensor]], list[list[tf.Tensor]]]:
        """Slices `[n, T]` of each column on the left and on the right, one by one, so that XLA can fuse them."""
        size = self._columns
        zero, *units = tf.unstack(numbers)
        shifts, tops, weighted_tops = units[:size], units[size : 2 * size], units[2 * size :]
        x, y, *weights = rows
        columns = [*tf.unstack(x, axis=1), y]
        z = [tf.cast(column, tf.float64) - shift for column, shift in zip(columns, shifts, strict=True)]
        if not weights:
            real = tf.reshape(tf.range(y.shape.num_elements()) < count, y.shape)
            z = [tf.where(real, column, tf.zeros([], tf.float64)) for column in z]
        right = [_slices(column, top) for column, top in zip(z, tops, strict=True)]
        if not weights:
            return right, right
        w = tf.cast(weights[0], tf.float64)
        with exact.pinning(tf.bitcast(zero[tf.newaxis], tf.int64)[0]):
            weighted = [exact.pin(w * column) for column in z] + [w]
        return [_slices(column, top) for column, top in zip(weighted, weighted_tops, strict=True)], right

    @functools.cached_property
    def _block_sums(self) -> Any:
        return tf.function(self._block, jit_compile=True, autograph=False)

    @functools.cached_property
    def _loop(self) -> Any:
        return block_loop(self, self._block_sums, parallel=self._parallel)

    def add_blocks(self, sums: Any, blocks: ElementStream, visits: int) -> Any:
        return self._traced._loop(sums, blocks.graph_iterator, tf.constant(visits), tf.constant(self._numbers))

    @functools.cached_property
    def _whole_split(self) -> Any:
        def sums(numbers, rows, counts):  # type: ignore[no-untyped-def]
            return all_added(self._block_sums(numbers, rows, counts[0]))

        return tf.function(lambda *arguments: self.on_replicas(sums, *arguments), autograph=False)

    def of_rows(self, rows: Any, counts: Any) -> np.ndarray:
        found = self._traced._whole_split(tf.constant(self._numbers), rows, counts)
        return self.strategy.experimental_local_results(found)[0].numpy()


def _ranked(left: list[tf.Tensor], right: list[tf.Tensor], rank: int, once: bool) -> tf.Tensor:
    """The sum of the products of slices of a rank: whole numbers below `2**42`, exact in any order and with FMA.

    Args:
        left: slices of a column.
        right: slices of a column.
        rank: the sum of the slices' places.
        once: whether the second rank's two products are the same one, whose sum is doubled later.
    """
    if rank == 1 and once:
        return left[0] * right[1]
    first, *others = (left[a] * right[rank - a] for a in range(rank + 1))
    for product in others:
        first = first + product
    return first


def _slices(columns: tf.Tensor, tops: tf.Tensor) -> list[tf.Tensor]:
    """`columns` `[n, D, T]` cut into whole numbers, in units `2**20, 2**41, 2**62` times finer than `tops` `[D, 1]`."""
    slices = []
    for number in range(SLICES):
        step = tops * 2.0 ** (1 - SLICE_BITS - SLICE_BITS * number)
        magic = (1.5 * 2.0**52) * step
        # Rounds to the nearest multiple of `step`, see `exact.on_grids`; powers of two, so the quotient is exact.
        cut = (columns + magic) - magic
        slices.append(cut / step)
        columns = columns - cut
    return slices


def _product(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The sum of `a b'` over tiles of whole numbers `[n, D, T]` of at most `2**20`, int64 `[D, D]`."""
    assert a.shape[-1] <= SLICE_ROWS
    return tf.reduce_sum(tf.cast(tf.matmul(a, b, transpose_b=True), tf.int64), 0)
