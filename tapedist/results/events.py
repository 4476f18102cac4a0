"""TensorBoard event files, without the tensorboard package.

An event file is a TFRecord file of `Event` messages. They are made here directly: `tf.summary.write` writes the same
file, but runs an operation per scalar, which is 80 times slower when thousands of epochs arrive at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tapedist.storage.files import storage_error
from tapedist.training.interfaces import Row

_FLUSH_SECONDS = 5.0


class EventFiles:
    """Writes `loss/train`, `loss/test` and `examples_per_sec` over steps into a folder for TensorBoard.

    TensorFlow is imported, and the file made, by the first row. Each run or resume has its own file; its first event
    makes TensorBoard discard the events of earlier files from that step on.

    Args:
        directory: the folder; made if absent.
        clock: Unix time in seconds.

    Raises:
        StorageError: from every method, if a file cannot be made or written.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time):
        self.directory = directory
        self._clock = clock
        self._path = directory
        self._tf: Any = None
        self._event: Any = None
        self._writer: Any = None
        self._flushed = clock()

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            raise storage_error("write", self._path, error) from error
        except self._tf.errors.OpError as error:
            raise storage_error("write", self._path, OSError(error.message.splitlines()[0])) from error

    def _start(self, row: Row) -> None:
        import tensorflow as tf

        self._tf = tf
        self._guarded(lambda: self.directory.mkdir(parents=True, exist_ok=True))
        number = len(list(self.directory.glob("events.out.tfevents.*")))
        # TensorBoard reads the files of a folder in the order of their names.
        self._path = self.directory / f"events.out.tfevents.{int(self._clock()):010d}.tapedist.{number:04d}"
        self._writer = self._guarded(tf.io.TFRecordWriter, str(self._path))
        self._event = event = tf.compat.v1.Event
        self._write(event(wall_time=row.seconds, file_version="brain.Event:2"))
        # TensorBoard takes SessionLog.START at a step as a restart there, and drops later events of earlier files.
        start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
        self._write(event(wall_time=row.seconds, step=row.step, session_log=start))

    def _write(self, event: Any) -> None:
        self._guarded(self._writer.write, event.SerializeToString())

    def record(self, row: Row) -> None:
        """Writes one row: its loss and, for a training row that was timed, its rate."""
        if self._writer is None:
            self._start(row)
        event = self._event(wall_time=row.seconds, step=row.step)
        event.summary.value.add(tag=f"loss/{row.split}", simple_value=float(row.loss))
        rate = row.examples_per_sec
        if row.split == "train" and rate is not None and math.isfinite(rate):
            event.summary.value.add(tag="examples_per_sec", simple_value=float(rate))
        self._write(event)

    def tick(self) -> None:
        """Flushes if the last flush is some seconds old, for a TensorBoard that follows the run."""
        if self._writer is not None and self._clock() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes everything recorded to the operating system."""
        if self._writer is not None:
            self._guarded(self._writer.flush)
            self._flushed = self._clock()

    def close(self) -> None:
        """Flushes and closes the file; a later row would open a new one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._guarded(writer.close)
