"""Stop requests: the first signal asks the run to save and leave, a second SIGINT leaves at once.

SIGINT and SIGTERM do. So do the signals that would end the process by default, unsaved: SIGHUP, with which a terminal
or a connection goes away, and those by which batch systems announce the end of a job's time, SIGUSR1, SIGUSR2 (SLURM's
`--signal`, Grid Engine's `-notify`) and SIGXCPU; but only where nobody else handles or, like nohup, ignores them. What
is left behind is the same for all; the exit code is 128 and the signal's number.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from tapedist.errors import Interrupted, TapedistError

ALWAYS = (signal.SIGINT, signal.SIGTERM)
UNLESS_HANDLED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Terminated(BaseException):
    """A signal, as KeyboardInterrupt is SIGINT: no `except Exception` on the way up may swallow it.

    Attributes:
        signum: its number.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise Terminated(signum)


def unhandled() -> list[int]:
    """Those of `UNLESS_HANDLED` that would end this process, or raise `Terminated` in it."""
    return [number for number in UNLESS_HANDLED if signal.getsignal(number) in (signal.SIG_DFL, _raise_terminated)]


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Lets these signals, SIGINT apart, raise `Terminated`, where this thread may say so and nobody else has said what
    they do; for a command, before anything else handles them.
    """
    own: list[int] = []
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGTERM, *UNLESS_HANDLED)
        own = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in own:
        signal.signal(number, _raise_terminated)
    try:
        yield
    finally:
        for number in own:
            signal.signal(number, signal.SIG_DFL)


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
            self._before = {number: signal.signal(number, self._receive) for number in (*ALWAYS, *unhandled())}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None is a handler that is not Python's, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
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
