"""The rows of an element read by NumPy, of tables and arrays: long ranges at a time, without a list of their numbers.

Legend: as in `orders.py`; `d` features, `N` rows that the slots of an element have room for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tapedist.data.layout import RowNumbers, as_array, empty, empty_rows, write_tiles
from tapedist.data.orders import ElementPlan
from tapedist.data.ranges import flushed
from tapedist.data.source import Source

_SHORT_RUN = 512  # Rows; below, a list of row numbers costs less than a call for each run.

Fill = Callable[[Sequence[np.ndarray], RowNumbers], None]


class ElementRows:
    """Makes elements; may be called from several threads.

    Args:
        source: the rows.
        plan: what an element holds.
        dtype: a NumPy float type.
    """

    def __init__(self, source: Source, plan: ElementPlan, dtype: Any):
        self._source, self._plan, self._dtype = source, plan, np.dtype(dtype)
        self._tiny = source.holds_tiny
        # What is to be flushed must not be rounded before.
        self._read_dtype = np.dtype(np.float64) if self._tiny else self._dtype
        self._announce = functools.lru_cache(maxsize=64)(lambda epoch, window: source.read_ahead(plan.split, window))
        self._tiled = not plan.row_major and source.num_features > 1  # One column is the same both ways.
        lie = plan.row_major and not plan.shuffled and plan.slots == 1
        self._lying = source.rows if lie and source.as_they_lie(self._dtype) else None

    def __call__(self, element: int, replica: int) -> tuple[np.ndarray, ...]:
        """`(x, y [slots * tiles, T][, w], counts int32 [slots])`, zeros where no row is real; `x` as the plan says."""
        plan, d = self._plan, self._source.num_features
        first, counts = plan.first_rows(element, replica)
        if self._lying and counts[0] == plan.slot_rows:  # Nothing is copied.
            x, y = self._lying(plan.split, range(int(first[0]), int(first[0] + counts[0])))
            return x.reshape(plan.x_shape(d)), y.reshape(plan.tiled_shape), counts.astype(np.int32)
        shapes = [plan.x_shape(d), *[plan.tiled_shape] * (1 + self._source.weighted)]
        x, *rest = (empty(shape, self._read_dtype) for shape in shapes)
        out = [x if self._tiled else x.reshape(-1, d), *(column.reshape(-1) for column in rest)]
        for slots, fill in self._fills(element):
            self._write(self._slots(out, slots), first[slots], counts[slots], fill)
        if self._tiny:
            x, *rest = (flushed(column, self._dtype) for column in (x, *rest))
        if self._source.weighted and not (rest[1] > 0).all():
            nothing = ~(rest[1] > 0)
            (x if plan.row_major else x.swapaxes(1, 2))[nothing] = 0
            rest[0][nothing] = 0
        return x, *rest, counts.astype(np.int32)

    def _slots(self, out: Sequence[np.ndarray], slots: slice) -> list[np.ndarray]:
        """The part of `out` that belongs to some slots."""
        x, *rest = out
        rows, tiles = self._plan.slot_rows, self._plan.tiles if self._tiled else self._plan.slot_rows
        return [
            x[slots.start * tiles : slots.stop * tiles],
            *(column[slots.start * rows : slots.stop * rows] for column in rest),
        ]

    def _fills(self, element: int) -> Iterator[tuple[slice, Fill]]:
        """Slots, and what writes the rows at their positions: all at once, or epoch by epoch."""
        plan = self._plan
        if not plan.shuffled:
            yield slice(0, plan.slots), lambda out, rows: self._source.read_into(out, plan.split, rows)
            return
        assert plan.epochs
        epochs = plan.epochs(element)
        for epoch in np.unique(epochs).tolist():
            begin, end = np.searchsorted(epochs, [epoch, epoch + 1]).tolist()
            yield slice(begin, end), self._shuffled(epoch)

    def _shuffled(self, epoch: int) -> Fill:
        source, plan = self._source, self._plan
        assert plan.shuffled
        shuffled = plan.shuffled

        def fill(out: Sequence[np.ndarray], positions: RowNumbers) -> None:
            for window in shuffled.windows(epoch, int(positions[0]), int(positions[-1])):
                self._announce(epoch, window)
            source.read_into(out, plan.split, shuffled(epoch, as_array(positions)))

        return fill

    def _write(self, out: Sequence[np.ndarray], first: np.ndarray, counts: np.ndarray, fill: Fill) -> None:
        """Rows of slots one after the other: the `counts` first of each, from position `first` on, are real."""
        k = self._plan.slot_rows
        # A slot goes on where the one before it, if full, has ended.
        joined = (counts[:-1] == k) & (first[1:] == first[:-1] + k)
        begins = np.concatenate([[0], np.flatnonzero(~joined) + 1])
        if counts.sum() < _SHORT_RUN * len(begins):
            real = np.arange(k) < counts[:, np.newaxis]
            self._scatter(out, real.ravel(), (first[:, np.newaxis] + np.arange(k))[real], fill)
            return
        for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(first)], strict=True):
            rows = (end - begin - 1) * k + int(counts[end - 1])
            x, *rest = self._slots(out, slice(begin, end))
            if rows:
                start = int(first[begin])
                fill([x if self._tiled else x[:rows], *(c[:rows] for c in rest)], range(start, start + rows))
            for column in [*([] if self._tiled else [x]), *rest]:
                column[rows:] = 0
            if self._tiled:
                tile, inside = divmod(rows, self._plan.tile_rows)
                x[tile : tile + 1, :, inside:] = 0
                x[tile + 1 :] = 0

    def _scatter(self, out: Sequence[np.ndarray], real: np.ndarray, positions: np.ndarray, fill: Fill) -> None:
        """Rows at `positions` to the places that `real` marks, zeros to the others."""
        if real.all():
            fill(out, positions)
            return
        (x, *rest), d = out, self._source.num_features
        found = empty_rows(len(positions), d, weighted=len(out) == 3, dtype=x.dtype)
        if len(positions):
            fill(found, positions)
        rows = np.empty((len(real), d), x.dtype) if self._tiled else x
        for column, values in zip([rows, *rest], found, strict=True):
            column[real] = values
            column[~real] = 0
        if self._tiled:
            write_tiles(x, 0, rows.T)
