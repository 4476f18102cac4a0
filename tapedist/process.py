"""The process: its streams, memory limits, stop signals, and the messages of libraries.

The first stop signal asks the run to save and exit, a second SIGINT exits at once. Stop signals are SIGINT and SIGTERM,
and those that would end the process by default, unsaved: SIGHUP, when a terminal or a connection is closed, and the
signals of batch systems before the end of a job's time, SIGUSR1, SIGUSR2 (SLURM's `--signal`, Grid Engine's `-notify`)
and SIGXCPU; but only where no other code handles or, like nohup, ignores them. All leave the same files; the exit code
is 128 and the signal's number.
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

# Address space that TensorFlow needs to start: libraries, thread stacks, compilers. With less it aborts the process.
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
    """Raises if the limit on address space is too low for TensorFlow, which would abort without a message.

    Raises:
        InputError: if it is.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit not in (-1, resource.RLIM_INFINITY) and limit < _LEAST_ADDRESS_SPACE:
        raise InputError(
            f"ulimit -v {limit // 1024}: the memory limit must leave TensorFlow {_LEAST_ADDRESS_SPACE // 1024} KiB of "
            "address space to start; raise it, or limit resident memory instead"
        )


def release_memory() -> None:
    """Returns free memory to the system, after a training.

    A training leaves about a MiB in reference cycles, which Python's collector reaches after some fifty of them, and
    glibc keeps free memory between blocks in use. A collection takes a third of the time of a small training, so it is
    done after some of them only.
    """
    global _trainings
    _trainings += 1
    if _trainings % _TRAININGS_A_COLLECTION == 0:
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # Other C libraries have no `malloc_trim`.
        ctypes.CDLL(None)["malloc_trim"](0)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """A context for a long import: its objects stay, so that Python's collector need not visit them now or later."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def _tensorflow_has_started() -> bool:
    """Returns whether TensorFlow has made its threads, in this process or in the one that it was forked from."""
    # By private attributes, and without an import: the question must not start TensorFlow.
    module = sys.modules.get("tensorflow.python.eager.context")
    context = getattr(module, "_context", None)
    return getattr(context, "_context_handle", None) is not None


def _note_fork() -> None:
    global _forked
    _forked = _tensorflow_has_started()


os.register_at_fork(after_in_child=_note_fork)


def check_fork() -> None:
    """Raises in a process whose TensorFlow would hang or crash, because a fork does not copy its threads.

    Raises:
        InputError: if TensorFlow had started before this process was forked.
    """
    if _forked:
        raise InputError(
            "multiprocessing: this process was forked from one in which TensorFlow had started, which TensorFlow does "
            'not survive; make processes by multiprocessing.get_context("spawn"), or before the first training'
        )


class _Stream:
    """A text stream whose reader may be closed: later output is dropped, and the run goes on.

    Attributes:
        failure: the error if output was dropped for another reason, such as a full disk; else None.
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
        """Redirects the stream's descriptor, and with it what is still buffered, to the null device."""
        # Else Python would fail once more when it flushes the stream at exit.
        if error.errno not in _READER_GONE:
            self.failure = error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._inner.fileno())
        os.close(nothing)


def check_output() -> None:
    """Raises if standard output could not be written.

    Raises:
        StorageError: if the file behind it could not be written; a closed reader is no error.
    """
    getattr(sys.stdout, "flush", lambda: None)()  # `cli.main` may be called where it is another program's object.
    failure = getattr(sys.stdout, "failure", None)
    if failure:
        room = "free some space, or " if failure.errno in STORAGE_ERRNOS else ""
        raise StorageError(f"standard output: cannot be written: {failure.strerror}; {room}send it elsewhere")


def harden_streams() -> None:
    """Makes stdout and stderr safe to print to, if they are closed, without a reader, on a full disk, in any locale."""
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
    """A signal's exception, as KeyboardInterrupt is SIGINT's: no `except Exception` catches it.

    Attributes:
        signum: its number.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


_raised: list[int] = []  # Signals of which `_raise_terminated` has raised.


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    _raised.append(signum)
    raise Terminated(signum)


def unhandled() -> list[int]:
    """Returns those of `UNLESS_HANDLED` that would end this process, or raise `Terminated` in it."""
    return [number for number in UNLESS_HANDLED if signal.getsignal(number) in (signal.SIG_DFL, _raise_terminated)]


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """A context in which stop signals other than SIGINT raise `Terminated`, unless they have another handler.

    For a command, before the run handles them. Without effect outside of the main thread.
    """
    own: list[int] = []
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGTERM, *UNLESS_HANDLED)
        own = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    _raised.clear()
    for number in own:
        signal.signal(number, _raise_terminated)
    try:
        yield
    except Exception as error:
        # A module of C that is being imported turns what is raised in it into an ImportError.
        if _raised and not isinstance(error, TapedistError):
            raise Terminated(_raised[0]) from error
        raise
    finally:
        for number in own:
            signal.signal(number, signal.SIG_DFL)


class StopSignals:
    """A context that turns signals into `Interrupted`; without effect outside of the main thread.

    The first signal raises at once, except inside `deferred`, where there is something to save first: there it is only
    recorded, and the code checks `signum` regularly.

    If a library turns an `Interrupted` into another error, the block still ends with `Interrupted`.

    Args:
        always_noted: whether to record signals only, because other processes must agree first.

    Attributes:
        signum: the signal that asked for the stop; None before.
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
            # None is a handler that was not set by Python, which cannot restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        # The signal may have come inside a library that converted `Interrupted` to an error of its own.
        if self._raised and self.signum and isinstance(error, Exception) and not isinstance(error, TapedistError):
            raise Interrupted(self.signum) from error

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A part of the run that a signal must not interrupt: it checks `signum`, or is short.

        Raises:
            Interrupted: at its end, if a signal came and the code in it has not raised.
        """
        self._noting = True
        try:
            yield
        finally:
            self._noting = self._always_noted
        if self.signum is not None and not self._always_noted:
            raise Interrupted(self.signum)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C ends at once, even while the run saves; a second SIGTERM does not.
        if number == signal.SIGINT and self.signum is not None:
            raise KeyboardInterrupt
        self.signum = number
        if not self._noting:
            self._raised = True
            raise Interrupted(number)


@contextlib.contextmanager
def noise_shown(shown: bool) -> Iterator[None]:
    """A context in which `quiet_start` does nothing if `shown`."""
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
    """Captures what is written to descriptor 2 inside; writes it out if the body raises an error of a library.

    By the descriptor, because TensorFlow's C++ code does not write to `sys.stderr`. A crash of the process is reported
    by `faulthandler` on the real descriptor.
    """
    _flush()
    with contextlib.ExitStack() as stack:
        if _shown:
            yield
            return
        try:
            captured = stack.enter_context(tempfile.TemporaryFile())
            stderr = os.dup(2)
        except OSError:  # No room for a temporary file, or no descriptor left: then messages are shown.
            yield
            return
        stack.callback(os.close, stderr)
        was_enabled = faulthandler.is_enabled()
        if not was_enabled:
            faulthandler.enable(file=stderr)
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except Exception as error:
            if not isinstance(error, (TapedistError, MemoryError)):
                captured.seek(0)
                os.write(stderr, captured.read())
            raise
        finally:
            _flush()
            os.dup2(stderr, 2)
            if not was_enabled:
                faulthandler.disable()
