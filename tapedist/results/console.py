"""A run's standard output: a progress bar on a terminal, plain lines elsewhere.

No error of the output ends the run: when its reader is closed (`| head`), the console prints nothing more.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tapedist.training.interfaces import Row

_REFRESH_SECONDS = 0.1
_SI = ((1e12, "T "), (1e9, "G "), (1e6, "M "), (1e3, "k "), (1.0, ""))


def format_loss(loss: float) -> str:
    """Three decimals, as in `51.641`; four significant digits for very small or large losses."""
    if math.isfinite(loss) and loss != 0 and not 0.1 <= abs(loss) < 1e9:
        return f"{loss:.4g}"
    return f"{loss:.3f}"


def format_rate(rows_per_sec: float) -> str:
    """Three digits and a decimal unit prefix, as in `1.65 G rows/s`."""
    if not math.isfinite(rows_per_sec) or rows_per_sec <= 0:
        return "- rows/s"
    # 0.9995, because 999.6 rounds to four digits: it is shown as `1.00 k`.
    scale, prefix = next(((s, p) for s, p in _SI if rows_per_sec >= s * 0.9995), _SI[-1])
    value = rows_per_sec / scale
    digits = max(0, 2 - max(0, math.floor(math.log10(value * 1.0005))))
    return f"{value:.{digits}f} {prefix}rows/s"


def format_duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:20` or `2 d 4 h`."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-:--"
    whole = math.ceil(seconds)
    if whole >= 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Console:
    """Shows a run on a text stream.

    Args:
        log_every_epochs: epochs between loss lines.
        stream: where to write; standard output by default, nowhere if that is closed.
        terminal: whether to draw a progress bar; by default, whether `stream` is a capable terminal.
        clock: seconds, for the pace of redraws.
    """

    def __init__(
        self,
        *,
        log_every_epochs: int,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._log_every = log_every_epochs
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        if terminal is None:
            terminal = _is_terminal(self._stream)
        self._terminal = terminal
        self._bar: Any = None
        self._drawn = -math.inf
        self._full = False
        self._last_line: tuple[str, int] | None = None
        self._epochs = self._steps_per_epoch = self._train_rows = 0
        self._loss = math.nan

    @contextlib.contextmanager
    def _output(self) -> Iterator[TextIO | None]:
        """The stream, or None after an error; an output error in the body ends all output."""
        if self._stream is None:
            yield None
            return
        try:
            yield self._stream
        except Exception as error:  # A stream object of the caller's may raise anything.
            stream, self._stream = self._stream, None
            bar, self._bar = self._bar, None
            if bar is not None:
                with contextlib.suppress(Exception):
                    bar.stop()  # Restores `sys.stdout` and `sys.stderr`, which the bar has replaced.
            if not isinstance(error, BrokenPipeError):
                logging.warning("standard output cannot be written (%s); the run goes on without it", error)
            _discard(stream)

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None in a file or a pipe."""
        return shutil.get_terminal_size().columns if self._terminal else None

    def log(self, line: str) -> None:
        """Prints one line, above the progress bar if there is one."""
        with self._output() as stream:
            if self._bar is not None:
                self._bar.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
            elif stream is not None:
                _write(stream, line + "\n")

    def begin(self, *, epochs: int, first_epoch: int, train_rows: int, test_rows: int, steps_per_epoch: int) -> None:
        """Prints the numbers of rows and, on a terminal, draws the bar."""
        self._epochs, self._train_rows, self._steps_per_epoch = epochs, train_rows, steps_per_epoch
        self.log(f"Training samples: {train_rows}")
        self.log(f"Test samples: {test_rows}")
        with self._output() as stream:
            if self._terminal and stream is not None:
                self._bar = _progress_bar(stream, self._clock)
                per_epoch = max(1, steps_per_epoch)
                self._bar.add_task(
                    "", total=epochs * per_epoch, completed=first_epoch * per_epoch, **self._facts(first_epoch, 0, 0.0)
                )
                self._bar.start()

    def record(self, row: Row) -> None:
        """Prints the loss line of this row, if one is due."""
        if row.split == "train":
            self._loss = row.loss
        due = row.epoch % self._log_every == 0 and self._last_line != (row.split, row.epoch)
        if self._terminal or not due:
            return
        if row.split == "train":
            self.log(f"Epoch: {row.epoch}, loss {format_loss(row.loss)}")
        elif row.epoch < self._epochs:  # The last one belongs to the final summary.
            self.log(f"Epoch: {row.epoch}, test loss {format_loss(row.loss)}")
        self._last_line = (row.split, row.epoch)

    def advance(self, *, epoch: int, step: int, loss: float | None, examples_per_sec: float) -> None:
        """Updates the bar, or flushes the lines printed so far."""
        if loss is not None:
            self._loss = loss
        with self._output() as stream:
            if self._bar is None:
                if stream is not None:
                    _flush(stream)
                return
            facts = self._facts(epoch, step, examples_per_sec)
            done = step if self._steps_per_epoch else epoch
            self._bar.update(self._bar.task_ids[0], completed=done, **facts)
            now, total = self._clock(), self._epochs * max(1, self._steps_per_epoch)
            ends = done >= total and not self._full  # The last state is always drawn, because it stays on the screen.
            if ends or now - self._drawn >= _REFRESH_SECONDS:
                self._drawn, self._full = now, done >= total
                self._bar.refresh()

    def _facts(self, epoch: int, step: int, rate: float) -> dict[str, str]:
        epochs_done = step / self._steps_per_epoch if self._steps_per_epoch and step else epoch
        left = max(0.0, self._epochs - epochs_done) * self._train_rows
        return {
            "epochs": f"{epoch}/{self._epochs}",
            "loss": "" if math.isnan(self._loss) else f"loss {format_loss(self._loss)}",
            "rate": format_rate(rate),
            "left": f"{format_duration(left / rate if rate > 0 else math.nan)} left",
        }

    def close(self) -> None:
        """Leaves the bar on the screen and releases the terminal; lines can still be printed."""
        with self._output() as stream:
            bar, self._bar = self._bar, None
            if bar is not None:
                bar.stop()
            elif stream is not None:
                _flush(stream)


def _is_terminal(stream: Any) -> bool:
    """Returns whether `stream` is a terminal on which a bar can be drawn."""
    try:
        return hasattr(stream, "flush") and bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except Exception:  # A stream object of the caller's may lack the method, or raise anything.
        return False


def _write(stream: TextIO, text: str) -> None:
    """Writes `text`, with escapes where the stream's encoding has no such characters."""
    try:
        stream.write(text)
    except UnicodeEncodeError as error:
        stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))


def _flush(stream: TextIO) -> None:
    flush = getattr(stream, "flush", None)  # An object that `print` can write to need not have it.
    if flush is not None:
        flush()


def _discard(stream: TextIO) -> None:
    """Sends what `stream` still buffers to the null device; else Python reports an error when it flushes at exit."""
    with contextlib.suppress(Exception):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)


def _progress_bar(stream: TextIO, clock: Callable[[], float]) -> Any:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("epoch {task.fields[epochs]}"),
        BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
        console=RichConsole(file=stream, force_terminal=True),
        auto_refresh=False,  # In a thread of its own, an error of a closed terminal could not be caught.
        expand=True,
        get_time=clock,
    )
