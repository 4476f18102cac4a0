"""Rows of a table by their numbers in the file, in the units and the type that training wants.

Memory that is touched for the first time costs more than the arithmetic on it. So a few thousand rows at a time are
collected column by column in a small buffer that stays in the cache, converted there, and written once into the result.

Legend: `k` rows asked for, `d` features.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tapedist.data.source import RowNumbers, Units, ascending_spans, ascends, cut, places_in, spans, take_into
from tapedist.data.tables.scan import CellRule

_BUFFER_BYTES = 2**19
_ALIGNMENT = 64  # TensorFlow takes over arrays that begin there and copies others.


class RowGather:
    """Collects rows from the segments of a store; may be called from several threads.

    Args:
        get: `(segment, ascending) -> its columns`: the features, the target if there is one, the weight if there is
            one; `ascending` says that the rows behind are asked for next.
        starts: int64 `[segments + 1]`, the first row of each segment.
        num_features: `d`.
        has_target: without one, `y` is NaN.
        weighted: whether there is a weight.
        rule: finds the cells that need the mean of their column.

    Attributes:
        means: float64 `[d]`, put in place of bad cells, or None if there are none.
    """

    def __init__(
        self,
        get: Callable[..., Sequence[np.ndarray]],
        starts: np.ndarray,
        *,
        num_features: int,
        has_target: bool,
        weighted: bool,
        rule: CellRule,
    ):
        self.means: np.ndarray | None = None
        self._get, self._starts, self._rule = get, starts, rule
        self._d, self._has_target, self._width = num_features, has_target, num_features + 1 + weighted
        self._step = max(64, _BUFFER_BYTES // (8 * self._width))
        self._local = threading.local()

    def into(
        self, out: Sequence[np.ndarray], file_rows: RowNumbers, *, units: Units | None = None,
        weight_exponent: int = 0, ascending: bool = True,
    ) -> None:  # fmt: skip
        """Writes rows into `out`, rounded to its types at the very end.

        Args:
            out: `(x [k, d], y [k][, w [k]])`, or with feature-major tiles as `x`: see `write_tiles`.
            file_rows: numbers in the file.
            units: of the result; raw ones if None.
            weight_exponent: weights are divided by 2 to the power of it.
            ascending: whether the rows behind are asked for next.
        """
        d, (x, *rest) = self._d, out
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.empty(self._width * self._step)
        with np.errstate(over="ignore"):  # A loss that is not finite is told by name.
            for part, pick in self._parts(file_rows, ascending):
                rows = part.stop - part.start
                found = self._local.buffer[: self._width * rows].reshape(self._width, rows)
                pick(found, units)
                if weight_exponent:
                    np.ldexp(found[-1], -weight_exponent, out=found[-1])
                if x.ndim == 3:
                    write_tiles(x, part.start, found[:d])
                else:
                    x[part] = found[:d].T
                for column, values in zip(rest, found[d:], strict=True):
                    column[part] = values

    def columns_into(self, found: np.ndarray, file_rows: RowNumbers) -> None:
        """Writes rows into `found`, float64 `[columns, k]`, column by column: features, target, weight if there is one.

        Args:
            found: where to.
            file_rows: numbers in the file.
        """
        for part, pick in self._parts(file_rows, True):
            pick(found[:, part], None)

    def _parts(
        self, file_rows: RowNumbers, ascending: bool
    ) -> Iterator[tuple[slice, Callable[[np.ndarray, Units | None], None]]]:
        """Parts of `file_rows` that fit the buffer, and what writes the columns of each, float64 `[columns, rows]`."""
        if not isinstance(file_rows, range) and not ascends(file_rows):
            for first in range(0, len(file_rows), self._step):
                rows = file_rows[first : first + self._step]
                yield slice(first, first + len(rows)), functools.partial(self._scattered, rows)
            return
        for segment, into in ascending_spans(file_rows, self._starts):
            places = places_in(file_rows, into, int(self._starts[segment]))
            held = self._get(segment, ascending=ascending)
            for first in range(into.start, into.stop, self._step):
                part = slice(first, min(into.stop, first + self._step))
                there = cut(places, first - into.start, part.stop - into.start)
                yield part, functools.partial(self._consecutive, held, there)

    def _consecutive(
        self, held: Sequence[np.ndarray], places: slice | np.ndarray, found: np.ndarray, units: Units | None
    ) -> None:
        """Rows of one segment."""
        columns, d = self._columns(found), self._d
        if not (units and isinstance(places, slice) and self.means is None and self._has_target):
            for column, values in zip(columns, held, strict=True):
                take_into(column, slice(None), values, places)
            self._finish(found, units)
            return
        # Straight from where they were decoded: one pass less.
        for column, values, center, factor in zip(columns[:d], held, units.center, units.factor, strict=False):
            np.subtract(values[places], center, out=column)
            column *= factor
        np.subtract(held[d][places], np.float64(units.target_center), out=columns[d])
        for column, values in zip(columns[d + 1 :], held[d + 1 :], strict=True):
            column[:] = values[places]

    def _scattered(self, file_rows: np.ndarray, found: np.ndarray, units: Units | None) -> None:
        """Rows from anywhere."""
        columns = self._columns(found)
        for segment, into in spans(file_rows, self._starts):
            places = places_in(file_rows, into, int(self._starts[segment]))
            for column, values in zip(columns, self._get(segment, ascending=False), strict=True):
                take_into(column, into, values, places)
        self._finish(found, units)

    def _columns(self, found: np.ndarray) -> list[np.ndarray]:
        """The rows of `found` that a segment has a column for."""
        columns = [*found]
        if not self._has_target:
            columns.pop(self._d).fill(np.nan)
        return columns

    def _finish(self, found: np.ndarray, units: Units | None) -> None:
        """Means in place of bad cells, then other units."""
        if self.means is not None:
            for position, mean in enumerate(self.means):
                bad = self._rule.bad(position, found[position])
                if bad is not None:
                    found[position, bad] = mean
        if units:
            found[: self._d] -= units.center[:, np.newaxis]
            found[: self._d] *= units.factor[:, np.newaxis]
            found[self._d] -= units.target_center


def empty_rows(k: int, d: int, *, weighted: bool, dtype: Any) -> tuple[np.ndarray, ...]:
    """`(x [k, d], y [k][, w [k]])` to be written into, aligned for TensorFlow."""
    return empty((k, d), dtype), *(empty((k,), dtype) for _ in range(1 + weighted))


def write_tiles(x: np.ndarray, first: int, columns: np.ndarray) -> None:
    """Writes rows `first ..` of feature-major tiles.

    Args:
        x: `[tiles, d, T]`: the rows of one tile go before those of the next.
        first: the first row.
        columns: `[d, k]`, the features of the rows.
    """
    (_, d, size), (_, k) = x.shape, columns.shape
    done = 0
    while done < k:
        tile, inside = divmod(first + done, size)
        whole = (k - done) // size if not inside else 0
        rows = whole * size or min(size - inside, k - done)
        part = columns[:, done : done + rows]
        if whole:
            x[tile : tile + whole] = part.reshape(d, whole, size).swapaxes(0, 1)
        else:
            x[tile, :, inside : inside + rows] = part
        done += rows


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array to be written into, aligned for TensorFlow."""
    count, item = int(np.prod(shape)), np.dtype(dtype).itemsize
    flat = np.empty(count * item + _ALIGNMENT, np.uint8)
    first = -flat.ctypes.data % _ALIGNMENT
    return flat[first : first + count * item].view(dtype).reshape(shape)
