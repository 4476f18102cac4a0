"""Stop requests: the first SIGINT or SIGTERM asks the run to save and leave, a second SIGINT leaves at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from tapedist.errors import Interrupted, TapedistError


class StopSignals:
    """While entered, turns signals into `Interrupted`; only the main thread may, elsewhere nothing is installed.

    Where nothing is lost, the first signal raises at once. Inside `noted` there is something to save first: there it is
    noted, and whoever runs there asks for `signum` now and then.

    Where a library turns what was raised at once into another error, the block ends by `Interrupted` all the same.

    Args:
        always_noted: whether never to raise at once, because other processes must be told first.

    Attributes:
        signum: the signal that asked for the stop; None while nobody did.
    """

    def __init__(self, *, always_noted: bool = False) -> None:
        self.signum: int | None = None
        self._always_noted = always_noted
        self._noting = always_noted
        self._raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # The signal may have come inside a library that took `Interrupted` for an error of its own.
        if self._raised and self.signum and isinstance(error, Exception) and not isinstance(error, TapedistError):
            raise Interrupted(self.signum) from error

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """A part of the run that a signal must not break off: it leaves by itself, or is so short that it ends first.

        Raises:
            Interrupted: at its end, if a signal came and nobody in it has left.
        """
        self._noting = True
        try:
            yield
        finally:
            self._noting = self._always_noted
        if self.signum is not None and not self._always_noted:
            raise Interrupted(self.signum)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signum is not None:
            raise KeyboardInterrupt
        self.signum = number
        if not self._noting:
            self._raised = True
            raise Interrupted(number)
