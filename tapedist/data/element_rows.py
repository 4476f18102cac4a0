"""The rows of an element read by NumPy, for tables: long ranges of rows at a time, without a list of their numbers.

Legend: as in `elements.py`; `d` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from tapedist.data.elements import ElementPlan
from tapedist.data.table_gather import empty_rows
from tapedist.data.table_spans import RowNumbers
from tapedist.data.table_windows import WindowReader, windows_that_fit

_SHORT_RUN = 512  # Rows; below, a list of row numbers costs less than a call for each run.
_WINDOWS_BUDGET = 2**29

Fill = Callable[[Sequence[np.ndarray], RowNumbers], None]


class RowReader(Protocol):
    """A source whose rows are read by NumPy."""

    num_features: int
    weighted: bool

    def read_into(self, out: Sequence[np.ndarray], split: str, rows: RowNumbers, *, ascending: bool = True) -> None:
        """Writes rows of a split into `out`, `(x [k, d], y [k][, w [k]])`, rounded to its types at the very end.

        Unless rows are read in ascending order, the ones behind are not worth reading ahead.
        """


class ElementRows:
    """Makes elements; may be called from several threads.

    Args:
        source: the rows.
        plan: what an element holds.
        dtype: a NumPy float type.
    """

    def __init__(self, source: RowReader, plan: ElementPlan, dtype: Any):
        self._source, self._plan, self._dtype = source, plan, np.dtype(dtype)
        self._windows = self._window_reader()

    def __call__(self, element: int, replica: int) -> tuple[np.ndarray, ...]:
        """`(x [slots * u * k, d], y [slots * u * k][, w], counts int32 [slots, u])`, zeros where no row is real."""
        plan, source = self._plan, self._source
        first, counts = plan.first_rows(element, replica)
        out = empty_rows(first.size * plan.shard_rows, source.num_features, weighted=source.weighted, dtype=self._dtype)
        slot_rows = plan.width * plan.shard_rows
        for slots, fill in self._fills(element):
            part = slice(slots.start * slot_rows, slots.stop * slot_rows)
            self._write([column[part] for column in out], first[slots].ravel(), counts[slots].ravel(), fill)
        if source.weighted and not (out[2] > 0).all():
            _clear(out, ~(out[2] > 0))
        return *out, counts.astype(np.int32)

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
        windows, source, plan = self._windows, self._source, self._plan
        if windows:
            return lambda out, rows: windows.into(out, epoch, rows)

        def fill(out: Sequence[np.ndarray], rows: RowNumbers) -> None:
            assert plan.shuffled
            source.read_into(out, plan.split, plan.shuffled(epoch, np.asarray(rows)))

        return fill

    def _window_reader(self) -> WindowReader | None:
        """None where rows are in order, or so wide that they have to be found one by one."""
        source, plan, dtype = self._source, self._plan, self._dtype
        held = windows_that_fit(_WINDOWS_BUDGET, (source.num_features + 1 + source.weighted) * dtype.itemsize)
        if not plan.shuffled or not held:
            return None

        def read(rows: range) -> tuple[np.ndarray, ...]:
            out = empty_rows(len(rows), source.num_features, weighted=source.weighted, dtype=dtype)
            source.read_into(out, plan.split, rows, ascending=False)  # The next window is another one.
            return out

        return WindowReader(read, plan.shuffled.order, held=held)

    def _write(self, out: Sequence[np.ndarray], first: np.ndarray, counts: np.ndarray, fill: Fill) -> None:
        """Rows of shards one after the other: the `counts` first of the `k` from position `first` on are real."""
        k = self._plan.shard_rows
        # A shard goes on where the one before it, if full, has ended.
        joined = (counts[:-1] == k) & (first[1:] == first[:-1] + k)
        begins = np.concatenate([[0], np.flatnonzero(~joined) + 1])
        if counts.sum() < _SHORT_RUN * len(begins):
            real = np.arange(k) < counts[:, np.newaxis]
            positions = (first[:, np.newaxis] + np.arange(k))[real]
            if real.all():
                fill(out, positions)
                return
            _scatter(out, real.ravel(), positions, fill)
            return
        for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(first)], strict=True):
            rows = (end - begin - 1) * k + int(counts[end - 1])
            if rows:
                start = int(first[begin])
                fill([column[begin * k : begin * k + rows] for column in out], range(start, start + rows))
            for column in out:
                column[begin * k + rows : end * k] = 0


def _scatter(out: Sequence[np.ndarray], real: np.ndarray, positions: np.ndarray, fill: Fill) -> None:
    """Rows at `positions` to the places that `real` marks, zeros to the others."""
    x = out[0]
    found = empty_rows(len(positions), x.shape[1], weighted=len(out) == 3, dtype=x.dtype)
    if len(positions):
        fill(found, positions)
    for column, values in zip(out, found, strict=True):
        column[real] = values
        column[~real] = 0


def _clear(out: Sequence[np.ndarray], where: np.ndarray) -> None:
    for column in out:
        column[where] = 0
