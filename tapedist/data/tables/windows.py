"""Rows in shuffled order, window by window: each is read and converted once an epoch, in the order of its rows, while
the window before it is used.

Legend: `k` rows asked for, `d` features.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from tapedist.data.permutations import WINDOW_ROWS, WindowOrder
from tapedist.data.source import RowNumbers, places_in, spans, take_into

_LEAST_HELD = 3  # Two that an element may lie in, and the next.


class WindowReader:
    """See the module's docstring; may be called from several threads.

    Args:
        read: `rows -> (x [k, d], y [k][, w [k]])`, the rows of a range in their order.
        order: the order of an epoch's rows.
        held: windows to hold, see `windows_that_fit`.
    """

    def __init__(
        self, read: Callable[[range], Sequence[np.ndarray]], order: Callable[[int], WindowOrder], *, held: int
    ):
        self._order = functools.lru_cache(maxsize=2)(order)
        self._read = read
        cores = len(os.sched_getaffinity(0))
        self._ahead = min(cores, held - _LEAST_HELD + 1)
        pool = concurrent.futures.ThreadPoolExecutor(cores, thread_name_prefix="tapedist-windows")
        self._windows = _Recent(pool, held, lambda number: self._read(self._order(0).window_rows(number)))
        self._places = _Recent(pool, held, self._places_of)

    def into(self, out: Sequence[np.ndarray], epoch: int, positions: RowNumbers) -> None:
        """Writes the rows at some positions of an epoch's order.

        Args:
            out: `(x [k, d], y [k][, w [k]])`.
            epoch: the epoch's number.
            positions: in `[0, n)`.
        """
        order = self._order(epoch)
        for visit, into in spans(positions, order.starts):
            for visit_ahead in range(visit + 1, min(visit + 1 + self._ahead, len(order.windows))):
                self._windows.submit(int(order.windows[visit_ahead]))
                self._places.submit((epoch, visit_ahead))
            window = self._windows.get(int(order.windows[visit]))
            places = self._places.get((epoch, visit))[places_in(positions, into, int(order.starts[visit]))]
            for column, values in zip(out, window, strict=True):
                take_into(column, into, values, places)

    def _places_of(self, key: tuple[int, int]) -> np.ndarray:
        """Places in its window of all rows of a visit, in their shuffled order."""
        epoch, visit = key
        order = self._order(epoch)
        return order.places(visit, np.arange(order.starts[visit + 1] - order.starts[visit]))


def windows_that_fit(budget: int, row_bytes: int) -> int:
    """How many windows to hold, for a reader on all cores; 0 if a window is too large for that.

    Args:
        budget: bytes.
        row_bytes: of one row.
    """
    wanted = _LEAST_HELD + 2 * len(os.sched_getaffinity(0))
    fit = budget // (WINDOW_ROWS * row_bytes)
    return min(wanted, fit) if fit >= _LEAST_HELD else 0


class _Recent:
    """The results for the most recent keys, made in a pool; what several threads want is made once.

    Args:
        pool: makes them.
        held: how many to hold.
        make: `key -> result`.
    """

    def __init__(self, pool: concurrent.futures.Executor, held: int, make: Callable[[Any], Any]):
        self._pool, self._most, self._make = pool, held, make
        self._held: collections.OrderedDict[Hashable, concurrent.futures.Future[Any]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def submit(self, key: Hashable) -> concurrent.futures.Future[Any]:
        """Has the result made, if it is not at hand."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            while len(self._held) >= self._most:
                self._held.popitem(last=False)
            future = self._held[key] = self._pool.submit(self._make, key)
            return future

    def get(self, key: Hashable) -> Any:
        """The result.

        Raises:
            Exception: what `make` raised; asked again, it is made again.
        """
        future = self.submit(key)
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._held.get(key) is future:
                    del self._held[key]
            raise
