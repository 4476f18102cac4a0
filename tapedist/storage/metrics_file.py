"""`metrics.jsonl`: one strict JSON object per line, one line per row of metrics.

Lines are buffered and reach the file whole or not at all, so that a full disk leaves no partial line. A checkpoint
stores `position`; a resumed run truncates the file to it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tapedist.errors import StateError
from tapedist.storage.files import storage_error
from tapedist.training.interfaces import Row

_BUFFER_BYTES = 1 << 20
_FLUSH_SECONDS = 1.0
_STRICT = json.JSONEncoder(allow_nan=False)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def as_json(row: Row) -> str:
    """One line of the file, without its newline; NaN and infinity are null, because strict JSON has none."""
    return _STRICT.encode(
        {
            "time": _finite(row.seconds),
            "step": int(row.step),
            "epoch": int(row.epoch),
            "split": row.split,
            "loss": _finite(row.loss),
            "penalty": _finite(row.penalty),
            "examples_per_sec": _finite(row.examples_per_sec),
        }
    )


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a metrics file; a null loss or penalty becomes NaN.

    A last line without its newline is that of a crash, and is skipped.

    Raises:
        StateError: if the file is not there, or a line is not what training writes.
    """
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    break
                rows.append(_row(json.loads(line)))
    except OSError as error:
        raise StateError(f"{path}: cannot be read ({error.strerror}); restore it, or train again") from None
    except (ValueError, KeyError, TypeError):
        raise StateError(f"{path}: line {len(rows) + 1} is damaged; restore it, or train again") from None
    return rows


def _row(entry: dict[str, Any]) -> Row:
    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    return Row(
        step=entry["step"],
        epoch=entry["epoch"],
        split=entry["split"],
        loss=number(entry["loss"]),
        penalty=number(entry["penalty"]),
        examples_per_sec=entry["examples_per_sec"],
        seconds=number(entry["time"]),
    )


class MetricsFile:
    """Appends rows to one file.

    The first call that needs the file opens it, and empties it unless that call is `rewind`.

    Args:
        path: the file; its folder exists.
        clock: seconds, for the pace of flushes.

    Raises:
        StorageError: from every method, if the file cannot be opened or written.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic):
        self.path = path
        self._clock = clock
        self._lines: list[bytes] = []
        self._waiting = 0
        self._descriptor: int | None = None
        self._size = 0
        self._flushed = clock()

    def _open(self, keep: int) -> int:
        """Opens the file with its first `keep` bytes, or the whole lines of it if it has fewer."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._descriptor = descriptor
            # Synced before the checkpoint was, so it is shorter only if something else has cut it.
            size = os.fstat(descriptor).st_size
            self._size = keep if keep <= size else _whole_lines(descriptor, size)
            os.ftruncate(descriptor, self._size)
        except OSError as error:
            raise storage_error("write", self.path, error) from error
        if self._size < keep:
            logging.warning("%r holds %d of the %d bytes saved; earlier rows are missing", str(self.path), size, keep)
        return descriptor

    def start(self) -> None:
        """Opens the file, so that a folder that cannot be written is an error at once."""
        if self._descriptor is None:
            self._open(0)

    def rewind(self, position: int) -> None:
        """Truncates the file to its first `position` bytes and drops what is buffered."""
        self._lines.clear()
        self._waiting = 0
        self._release()
        self._open(position)

    def record(self, row: Row) -> None:
        """Buffers one row."""
        line = as_json(row).encode() + b"\n"
        self._lines.append(line)
        self._waiting += len(line)
        if self._waiting >= _BUFFER_BYTES:
            self.flush()

    def tick(self) -> None:
        """Flushes if the last flush is a second old, for readers that follow the file."""
        if self._lines and self._clock() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes all buffered lines, or none of them."""
        self.start()
        assert self._descriptor is not None
        data = b"".join(self._lines)
        try:
            # At an offset, not at the end: after a failure the truncated file and `_size` agree whatever was written.
            _write_at(self._descriptor, data, self._size)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            if isinstance(error, OSError):
                self._lines.clear()  # Reported now, so that `close` does not fail for the same lines again.
                raise storage_error("write", self.path, error) from error
            raise
        self._size += len(data)
        self._lines.clear()
        self._waiting = 0
        self._flushed = self._clock()

    def position(self) -> int:
        """Flushes and syncs the file, and returns its size in bytes."""
        # Synced, because a checkpoint that is on the disk must not point behind the end of this file.
        self.flush()
        assert self._descriptor is not None
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise storage_error("write", self.path, error) from error
        return self._size

    def close(self) -> None:
        """Writes what is buffered and closes the file."""
        try:
            if self._lines:
                self.flush()
        finally:
            self._release()

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _whole_lines(descriptor: int, size: int) -> int:
    """Bytes up to and with the last newline of the first `size`."""
    tail = os.pread(descriptor, min(size, 1 << 16), max(0, size - (1 << 16)))
    return size - len(tail) + tail.rfind(b"\n") + 1
