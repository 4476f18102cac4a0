"""Where a table's rows are kept between the scan at opening and their use: memory, a scratch file, or in place."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence
from typing import IO

import numpy as np

from tapedist.data.tables.reader import SegmentStore
from tapedist.data.tables.split import CHUNK_ROWS
from tapedist.errors import StorageError


class MemoryStore:
    """Chunks of `CHUNK_ROWS` rows, all in memory.

    Args:
        num_columns: columns of every chunk.
    """

    def __init__(self, num_columns: int):
        self.row_bytes = 8 * num_columns
        self.chunks: list[Sequence[np.ndarray]] = []
        self.num_rows = 0

    @property
    def starts(self) -> np.ndarray:
        return np.minimum(np.arange(len(self.chunks) + 1, dtype=np.int64) * CHUNK_ROWS, self.num_rows)

    def append(self, columns: Sequence[np.ndarray]) -> None:
        """Adds a chunk, float64; all but the last hold `CHUNK_ROWS` rows."""
        self.chunks.append(columns)
        self.num_rows += len(columns[0])

    def load(self, segment: int) -> Sequence[np.ndarray]:
        """One array a column."""
        return self.chunks[segment]

    def get(self, segment: int, *, ascending: bool = False) -> Sequence[np.ndarray]:
        """`load`, as `SegmentCache.get`."""
        return self.chunks[segment]


class ScratchStore:
    """Chunks of `CHUNK_ROWS` rows in a nameless file below `$TMPDIR`, row by row; the system frees it with the process.

    Args:
        num_columns: columns of every chunk.
    """

    def __init__(self, num_columns: int):
        self.row_bytes = 8 * num_columns
        self.num_rows = 0
        self._columns = num_columns
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="tapedist-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    @property
    def starts(self) -> np.ndarray:
        chunks = -(-self.num_rows // CHUNK_ROWS)
        return np.minimum(np.arange(chunks + 1, dtype=np.int64) * CHUNK_ROWS, self.num_rows)

    def append(self, columns: Sequence[np.ndarray]) -> None:
        """Adds a chunk; all but the last hold `CHUNK_ROWS` rows.

        Raises:
            StorageError: if the file cannot grow.
        """
        try:
            self._file.write(np.stack(columns, axis=1).tobytes())
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{tempfile.gettempdir()}: {error.strerror} while copying the table there, because it is larger than "
                "memory and its format cannot be read from the middle; set TMPDIR to a larger disk, or use Parquet"
            ) from None
        self.num_rows += len(columns[0])

    def load(self, segment: int) -> list[np.ndarray]:
        """One view a column of a mapping of the chunk; only the pages that are touched are read."""
        first = segment * CHUNK_ROWS
        rows = min(CHUNK_ROWS, self.num_rows - first)
        mapped = mmap.mmap(
            self._file.fileno(), rows * self.row_bytes, offset=first * self.row_bytes, access=mmap.ACCESS_READ
        )
        return list(np.frombuffer(mapped, np.float64).reshape(rows, self._columns).T)


class SegmentCache:
    """The most recently used segments of a store, within a budget; safe to call from several threads.

    A segment that several threads want is loaded once.

    Args:
        store: where segments come from.
        budget: bytes that held segments may take; one segment is always held.
        ahead: segments to load ahead where rows are read in their order; by default as many as can be loaded at once.
    """

    def __init__(self, store: SegmentStore, budget: int, *, ahead: int | None = None):
        self._store, self._budget = store, budget
        self._sizes = np.diff(store.starts) * store.row_bytes
        self._held: collections.OrderedDict[int, Sequence[np.ndarray]] = collections.OrderedDict()
        self._held_bytes = 0
        self._loading: dict[int, concurrent.futures.Future[Sequence[np.ndarray]]] = {}
        self._asked_for: set[int] = set()
        self._lock = threading.Lock()
        largest = int(self._sizes.max(initial=1))
        # Decoding takes a few times the memory of what it yields.
        at_once = max(1, min(len(os.sched_getaffinity(0)), budget // (4 * largest)))
        self._gate = threading.Semaphore(at_once)
        self._depth = at_once if ahead is None else ahead
        self._ahead = concurrent.futures.ThreadPoolExecutor(self._depth, thread_name_prefix="tapedist-read-ahead")

    def get(self, segment: int, *, ascending: bool = False) -> Sequence[np.ndarray]:
        """One array a column.

        Args:
            segment: its number.
            ascending: whether the rows behind are asked for next; then the next segments are loaded meanwhile.
        """
        if ascending:
            for following in self._missing_behind(segment):
                self._ahead.submit(self._load_ahead, following)
        return self._held_or_loaded(segment)

    def _missing_behind(self, segment: int) -> list[int]:
        """The segments that will be needed, if reading has come from the segment before, and are not at hand."""
        with self._lock:
            if segment - 1 not in self._held:
                return []
            behind = range(segment + 1, min(segment + 1 + self._depth, len(self._sizes)))
            missing = [s for s in behind if not (s in self._held or s in self._loading or s in self._asked_for)]
            self._asked_for.update(missing)
            return missing

    def _load_ahead(self, segment: int) -> None:
        with contextlib.suppress(Exception):  # Who needs the segment meets the error.
            self._held_or_loaded(segment)
        with self._lock:
            self._asked_for.discard(segment)

    def _held_or_loaded(self, segment: int) -> Sequence[np.ndarray]:
        with self._lock:
            if segment in self._held:
                self._held.move_to_end(segment)
                return self._held[segment]
            future = self._loading.get(segment)
            mine = future is None
            if future is None:
                future = self._loading[segment] = concurrent.futures.Future()
        return self._load(segment, future) if mine else future.result()

    def _load(self, segment: int, future: concurrent.futures.Future[Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
        try:
            with self._gate:
                self._make_room(int(self._sizes[segment]))
                columns = self._store.load(segment)
        except BaseException as error:
            with self._lock:
                del self._loading[segment]
            future.set_exception(error)
            raise
        with self._lock:
            self._held[segment] = columns
            self._held_bytes += int(self._sizes[segment])
            del self._loading[segment]
        future.set_result(columns)
        return columns

    def _make_room(self, size: int) -> None:
        with self._lock:
            while self._held and self._held_bytes + size > self._budget:
                dropped, _ = self._held.popitem(last=False)
                self._held_bytes -= int(self._sizes[dropped])
