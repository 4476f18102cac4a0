"""The observer of a real run: console, `metrics.jsonl` and TensorBoard events as one object."""

from __future__ import annotations

import sys
import warnings

from tapedist.results.console import Console
from tapedist.results.events import EventFiles
from tapedist.storage.metrics_file import MetricsFile, read_rows
from tapedist.storage.run_folder import RunFolder
from tapedist.training.interfaces import Row


class Monitor:
    """Passes the trainer's reports to the console and to the run folder's files.

    Args:
        console: shows the run; None for no output, as in library calls.
        metrics: keeps the rows; None without a run folder.
        events: keeps the scalars; None without a run folder.
        warns: whether notices become Python warnings if there is no console.

    Attributes:
        rows: every row of the run so far, those of earlier calls included.

    Raises:
        StorageError: from every method but `advance`'s and `record`'s console part, if a file cannot be written.
    """

    def __init__(
        self,
        *,
        console: Console | None = None,
        metrics: MetricsFile | None = None,
        events: EventFiles | None = None,
        warns: bool = False,
    ):
        self._console = console
        self._warns = warns
        self._metrics = metrics
        self._events = events
        self.rows: list[Row] = []

    @classmethod
    def of_run(
        cls, folder: RunFolder | None, *, log_every_epochs: int, quiet: bool = False, warns: bool = False
    ) -> Monitor:
        """The monitor of a run: a console unless `quiet`, files if there is a run folder."""
        return cls(
            console=None if quiet else Console(log_every_epochs=log_every_epochs),
            metrics=MetricsFile(folder.metrics) if folder else None,
            events=EventFiles(folder.events) if folder else None,
            warns=warns,
        )

    def begin(
        self, *, epochs: int, first_epoch: int, train_rows: int, test_rows: int, steps_per_epoch: int = 0
    ) -> None:
        if self._metrics:
            self._metrics.start()
        if self._console:
            self._console.begin(
                epochs=epochs,
                first_epoch=first_epoch,
                train_rows=train_rows,
                test_rows=test_rows,
                steps_per_epoch=steps_per_epoch,
            )

    def record(self, row: Row) -> None:
        self.rows.append(row)
        if self._console:
            self._console.record(row)
        if self._metrics:
            self._metrics.record(row)
        if self._events:
            self._events.record(row)

    def advance(self, *, epoch: int, step: int, loss: float | None, examples_per_sec: float) -> None:
        if self._console:
            self._console.advance(epoch=epoch, step=step, loss=loss, examples_per_sec=examples_per_sec)
        if self._metrics:
            self._metrics.tick()
        if self._events:
            self._events.tick()

    def end(self) -> None:
        """Ends the progress bar after the last step; later lines are printed below it."""
        if self._console:
            self._console.close()

    def position(self) -> int:
        return self._metrics.position() if self._metrics else 0

    def rewind(self, position: int) -> None:
        if self._metrics:
            self._metrics.rewind(position)
            self.rows = read_rows(self._metrics.path)

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None without one."""
        return self._console.width if self._console else None

    def log(self, line: str) -> None:
        """Prints one line on the console; a closed output is no error."""
        if self._console:
            self._console.log(line)

    def notice(self, sentence: str, category: type[Warning] = UserWarning) -> None:
        """Shows a notice to the user: on the console, or as a warning at the line that called the package."""
        if self._console:
            self._console.log(f"Notice: {sentence}")
        elif self._warns:
            warnings.warn(sentence, category, stacklevel=_frames_inside() + 1)

    def close(self) -> None:
        """Releases the terminal, then closes the files; all are closed even if one of them fails."""
        try:
            if self._console:
                self._console.close()
        finally:
            try:
                if self._metrics:
                    self._metrics.close()
            finally:
                if self._events:
                    self._events.close()


def _frames_inside() -> int:
    """The number of the package's frames on the stack, including the caller of this function."""
    frame, count = sys._getframe(1), 1
    while frame.f_back and frame.f_back.f_globals.get("__name__", "").partition(".")[0] == "tapedist":
        frame, count = frame.f_back, count + 1
    return count
