"""Where a table's rows are kept between the scan at opening and their use: one float64 matrix a split, or nowhere.

Legend: `k` rows asked for, `c` columns: the features, the target and the weight if there are any.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from tapedist.data.layout import RowNumbers, as_array, piece_rows
from tapedist.data.tables.files import display
from tapedist.errors import StateError, StorageError

_GROWTH_BYTES = 2**22
_SPARE_BYTES = 2**26  # What is left on the disk for others; also what is written between two looks at its room.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HELD_BYTES = 2**26  # Of a pass: as many rows as threads that make elements ask for out of their order.
_MOST_PASSES = 16


class NoRoomError(Exception):
    """The scratch folder has too little room; `str` is a sentence that says so."""


class ScratchFolder:
    """Where files of rows go that do not fit into memory.

    Args:
        path: an existing folder; empty takes the system's temporary folder.
    """

    def __init__(self, path: str = ""):
        self._path = path

    def check_room(self, size: int) -> None:
        """Raises NoRoomError unless so many bytes fit."""
        with self._translated():
            folder = self._folder()
            free = shutil.disk_usage(folder).free
        if free < size + _SPARE_BYTES:
            raise NoRoomError(
                f"{self._name(folder)}: has {free / 2**30:.3g} GiB free, and the rows need {size / 2**30:.3g} GiB more"
            )

    def new_file(self) -> IO[bytes]:
        """A file without a name: the system frees it with the process, however that ends."""
        with self._translated():
            return tempfile.TemporaryFile(dir=self._folder(), prefix="tapedist-")

    def write(self, file: IO[bytes], rows: np.ndarray) -> None:
        """Appends rows to a file.

        Raises:
            NoRoomError: if they do not fit.
            StorageError: if they cannot be written for another reason.
        """
        with self._translated():
            file.write(rows.data)
            file.flush()

    def _folder(self) -> str:
        return self._path or tempfile.gettempdir()

    def _name(self, folder: str) -> str:
        return f"--scratch_dir={display(self._path)}" + ("" if self._path else f" ({display(folder)})")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            folder = self._path or os.environ.get("TMPDIR", "")
            said = f"{self._name(folder)}: {(error.strerror or str(error)).lower()} while rows are kept there"
            if error.errno in _NO_ROOM:
                raise NoRoomError(said) from None
            raise StorageError(f"{said}; give a folder that can be written") from None


class RowStore:
    """The kept rows of a split, float64 `[rows, c]`: appended in order, then read by number.

    They are in memory, or in a nameless file that is mapped, whose pages the system holds as long as it has room.

    Args:
        num_columns: `c`.
        folder: where the file goes.
    """

    def __init__(self, num_columns: int, folder: ScratchFolder):
        self.num_rows = 0
        self._columns, self._folder = num_columns, folder
        self._matrix = np.empty((0, num_columns))
        self._file: IO[bytes] | None = None
        self._map: mmap.mmap | None = None
        self._unchecked = 0

    @property
    def in_memory(self) -> bool:
        return self._file is None

    def check_room(self, rows: int) -> None:
        """Raises NoRoomError unless a file of so many rows fits."""
        self._folder.check_room(rows * self._columns * 8)

    def append(self, rows: np.ndarray) -> None:
        """Adds rows `[k, c]`, which are copied.

        Raises:
            NoRoomError: if the file cannot grow.
        """
        end = self.num_rows + len(rows)
        if self._file:
            self._write(rows)
        else:
            if end > len(self._matrix):
                growth = max(len(rows), _GROWTH_BYTES // (8 * self._columns))
                # The system moves large arrays without copying them. Nobody else has seen this one.
                self._matrix.resize((len(self._matrix) + growth, self._columns), refcheck=False)
            self._matrix[self.num_rows : end] = rows
        self.num_rows = end

    def move_to_file(self) -> None:
        """Goes on in a file.

        Raises:
            NoRoomError: if there is too little room for one.
            StorageError: if it cannot be made.
        """
        self._file = self._folder.new_file()
        weakref.finalize(self, self._file.close)
        for first in range(0, self.num_rows, step := piece_rows(self._columns)):
            self._write(self._matrix[first : min(first + step, self.num_rows)])
        self._matrix = np.empty((0, self._columns))

    def _write(self, rows: np.ndarray) -> None:
        assert self._file
        self._unchecked -= rows.nbytes
        if self._unchecked < 0:
            self._folder.check_room(_SPARE_BYTES)
            self._unchecked = _SPARE_BYTES
        self._folder.write(self._file, np.ascontiguousarray(rows))

    def seal(self) -> None:
        """Ends the appending: rows can be read."""
        if self._file and self.num_rows:
            size = self.num_rows * self._columns * 8
            self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)
            self._matrix = np.frombuffer(self._map, np.float64).reshape(-1, self._columns)
        else:
            self._matrix.resize((self.num_rows, self._columns), refcheck=False)

    def take(self, rows: RowNumbers) -> np.ndarray:
        """Rows by number, `[k, c]`; those of a range are not copied and not to be written to."""
        if isinstance(rows, range):
            return self._matrix[rows.start : rows.stop]
        return self._matrix.take(rows, axis=0)

    def read_ahead(self, rows: range) -> None:
        """Has the system read a range that will be asked for out of order."""
        if self._map and len(rows):
            first = rows.start * self._columns * 8 // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, rows.stop * self._columns * 8 - first)

    def impute(self, means: np.ndarray) -> None:
        """Puts the means `[d]` of the first columns into their cells that are NaN."""
        for first in range(0, self.num_rows, step := piece_rows(self._columns)):
            rows = self._matrix[first : first + step]
            if not np.isnan(rows[:, : len(means)]).any():
                continue
            if self._file is None:
                imputed(rows, means)
                continue
            # Not through the mapping: what cannot be written would end the process there.
            changed = imputed(rows.copy(), means)
            os.pwrite(self._file.fileno(), changed.data, first * self._columns * 8)


def imputed(rows: np.ndarray, means: np.ndarray) -> np.ndarray:
    """`rows` `[k, c]`, changed where one of the first columns is NaN."""
    features = rows[:, : len(means)]
    np.copyto(features, means, where=np.isnan(features))
    return rows


class DecodedRows:
    """Rows that there is no room to keep, decoded anew in every pass; may be asked by several threads.

    A pass goes on where it is when the rows behind are asked for; rows before it begin a new one. So only rows that are
    asked for nearly in their order are quick.

    Args:
        decode: yields all rows in order, in pieces `[k, c]` that are not changed afterwards.
    """

    in_memory = False

    def __init__(self, decode: Callable[[], Iterator[np.ndarray]], num_rows: int):
        self.num_rows = num_rows
        self._decode = decode
        self._means: np.ndarray | None = None
        self._passes: list[_Pass] = []  # The one that was used last is the first.
        self._lock = threading.Lock()

    def take(self, rows: RowNumbers) -> np.ndarray:
        """Rows by number, `[k, c]`.

        Raises:
            InputError: if a file cannot be decoded any more.
            StateError: if a file changed since it was opened.
        """
        numbers = as_array(rows)
        order = np.argsort(numbers, kind="stable")
        ascending, found, done = numbers[order], [], 0
        with self._lock:
            while done < len(numbers):
                first, piece = self._piece(int(ascending[done]))
                end = int(np.searchsorted(ascending, first + len(piece)))
                found.append(piece[ascending[done:end] - first])
                done = end
        if len(found) == 1 and isinstance(rows, range):
            return found[0]
        result = np.empty((len(numbers), found[0].shape[1] if found else 0))
        result[order] = np.concatenate(found) if found else result
        return result

    def read_ahead(self, rows: range) -> None:
        """Nothing: rows come in their order."""

    def impute(self, means: np.ndarray) -> None:
        """See `RowStore.impute`."""
        self._means, self._passes = means, []

    def _piece(self, row: int) -> tuple[int, np.ndarray]:
        """The piece that holds a row, and the number of its first row."""
        for a_pass in self._passes:
            if piece := a_pass.held_piece(row):
                return piece
        before = [one for one in self._passes if one.end <= row]
        a_pass = max(before, key=lambda one: one.end) if before else _Pass(self._decode())
        if before:
            self._passes.remove(a_pass)
        # Of passes that have ended, threads that are late need the last one only.
        going = [one for one in self._passes if one.end < self.num_rows]
        ended = [one for one in self._passes if one.end >= self.num_rows][:1]
        self._passes = [a_pass, *going[: _MOST_PASSES - 2], *ended]
        while a_pass.end <= row:
            a_pass.advance(self._means)
        piece = a_pass.held_piece(row)
        assert piece
        return piece


class _Pass:
    """One pass over all rows, and the last pieces that it has seen."""

    def __init__(self, pieces: Iterator[np.ndarray]):
        self.end = 0
        self._pieces, self._held, self._held_bytes = pieces, collections.deque[tuple[int, np.ndarray]](), 0

    def held_piece(self, row: int) -> tuple[int, np.ndarray] | None:
        return next(((first, piece) for first, piece in self._held if first <= row < first + len(piece)), None)

    def advance(self, means: np.ndarray | None) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            raise StateError("the table ended early: it changed while in use; restore it and resume")
        if means is not None:
            imputed(piece, means)
        self._held.append((self.end, piece))
        self.end += len(piece)
        self._held_bytes += piece.nbytes
        while self._held_bytes > _HELD_BYTES and len(self._held) > 1:
            self._held_bytes -= self._held.popleft()[1].nbytes
