"""What becomes of the process: its streams, its limits, the signals that ask it to stop, and the noise of libraries.

The first stop signal asks the run to save and leave, a second SIGINT leaves at once. SIGINT and SIGTERM do. So do the
signals that would end the process by default, unsaved: SIGHUP, with which a terminal or a connection goes away, and
those by which batch systems announce the end of a job's time, SIGUSR1, SIGUSR2 (SLURM's `--signal`, Grid Engine's
`-notify`) and SIGXCPU; but only where nobody else handles or, like nohup, ignores them. What is left behind is the same
for all; the exit code is 128 and the signal's number.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import gc
import os
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TextIO

from tapedist.errors import InputError, Interrupted, StorageError, TapedistError

# Address space that TensorFlow takes to start: libraries, thread stacks, compilers. With less it aborts the process.
_LEAST_ADDRESS_SPACE = 4 * 1024**3

_TRAININGS_A_COLLECTION = 8

_forked = False
_trainings = 0

_READER_GONE = frozenset({errno.EPIPE, errno.ECONNRESET})

# Errors of the storage, not of the program.
STORAGE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
ALWAYS = (signal.SIGINT, signal.SIGTERM)
UNLESS_HANDLED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
_shown = False


def check_memory_limit() -> None:
    """Whether the limit on address space lets TensorFlow start, which it could not say itself.

    Raises:
        InputError: if it does not.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit not in (-1, resource.RLIM_INFINITY) and limit < _LEAST_ADDRESS_SPACE:
        raise InputError(
            f"ulimit -v {limit // 1024}: the memory limit must leave TensorFlow {_LEAST_ADDRESS_SPACE // 1024} KiB of "
            "address space to start; raise it, or limit resident memory instead"
        )


def release_memory() -> None:
    """Gives memory that is free back to the system, after a training.

    A training leaves about a MiB in cycles that Python's collector comes to after some fifty of them, and glibc keeps
    what lies between blocks in use. To look for cycles takes as long as a third of a small training, so that is done
    after some of them only.
    """
    global _trainings
    _trainings += 1
    if _trainings % _TRAININGS_A_COLLECTION == 0:
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # Another C library has its own ways.
        ctypes.CDLL(None)["malloc_trim"](0)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For a long import: what it makes stays, so that Python's collector need look through it neither now nor later."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def _tensorflow_has_started() -> bool:
    """Whether TensorFlow has made the threads that serve its operations, in this process or the one that it forked."""
    module = sys.modules.get("tensorflow.python.eager.context")
    context = getattr(module, "_context", None)
    return getattr(context, "_context_handle", None) is not None


def _note_fork() -> None:
    global _forked
    _forked = _tensorflow_has_started()


os.register_at_fork(after_in_child=_note_fork)


def check_fork() -> None:
    """Refuses a process whose TensorFlow would hang or crash, because its threads have stayed behind a fork.

    Raises:
        InputError: if TensorFlow had started before this process was forked.
    """
    if _forked:
        raise InputError(
            "multiprocessing: this process was forked from one in which TensorFlow had started, which TensorFlow does "
            'not survive; make processes by multiprocessing.get_context("spawn"), or before the first training'
        )


class _Stream:
    """A text stream whose reader may go away: what is written after that is dropped, and the run goes on.

    Attributes:
        failure: why something was dropped although nobody went away, such as a full disk; else None.
    """

    def __init__(self, inner: TextIO):
        self._inner = inner
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, text: str) -> int:
        try:
            return self._inner.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        try:
            self._inner.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Points the stream's descriptor, and with it whatever is still buffered, at nothing."""
        if error.errno not in _READER_GONE:
            self.failure = error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._inner.fileno())
        os.close(nothing)


def check_output() -> None:
    """Whether standard output took what was printed.

    Raises:
        StorageError: if the file behind it could not be written; that a reader went away is no error.
    """
    getattr(sys.stdout, "flush", lambda: None)()  # `cli.main` may be called where it is another program's object.
    failure = getattr(sys.stdout, "failure", None)
    if failure:
        room = "free some space, or " if failure.errno in STORAGE_ERRNOS else ""
        raise StorageError(f"standard output: cannot be written: {failure.strerror}; {room}send it elsewhere")


def harden_streams() -> None:
    """Makes stdout and stderr safe to print to: closed, with the reader gone, on a full disk, in any locale."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            # A closed descriptor's number would be given to the next file, into which libraries would then print.
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
        if descriptor:
            stream = getattr(sys, name) or open(descriptor, "w", closefd=False)  # noqa: SIM115 (for good)
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Stream(stream))


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

    Where nothing is lost, the first signal raises at once. Inside `deferred` there is something to save first:
    there it is noted, and whoever runs there asks for `signum` now and then.

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
    def deferred(self) -> Iterator[None]:
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


@contextlib.contextmanager
def noise_shown(shown: bool) -> Iterator[None]:
    """Decides what `quiet_start` does inside: with `shown`, nothing."""
    global _shown
    before, _shown = _shown, shown
    try:
        yield
    finally:
        _shown = before


def _flush() -> None:
    getattr(sys.stderr, "flush", lambda: None)()  # It may be None, or another program's object.


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Keeps back what is written to descriptor 2 inside; lets it out if the body fails with an error that is not ours.

    A process that dies inside says where: its last words are not kept back.
    """
    _flush()
    with contextlib.ExitStack() as stack:
        if _shown:
            yield
            return
        try:
            said = stack.enter_context(tempfile.TemporaryFile())
            stderr = os.dup(2)
        except OSError:  # No room for a temporary file, or no descriptor left: noise is the smaller evil.
            yield
            return
        stack.callback(os.close, stderr)
        was_enabled = faulthandler.is_enabled()
        if not was_enabled:
            faulthandler.enable(file=stderr)
        os.dup2(said.fileno(), 2)
        try:
            yield
        except Exception as error:
            if not isinstance(error, (TapedistError, MemoryError)):
                said.seek(0)
                os.write(stderr, said.read())
            raise
        finally:
            _flush()
            os.dup2(stderr, 2)
            if not was_enabled:
                faulthandler.disable()
