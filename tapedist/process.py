"""What becomes of the process: its standard streams, its limits, and whether it is a fork."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import resource
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from tapedist.errors import InputError, StorageError

# Address space that TensorFlow takes to start: libraries, thread stacks, compilers. With less it aborts the process.
_LEAST_ADDRESS_SPACE = 4 * 1024**3

_TRAININGS_A_COLLECTION = 8

_forked = False
_trainings = 0

_READER_GONE = frozenset({errno.EPIPE, errno.ECONNRESET})

# Errors of the storage, not of the program.
STORAGE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


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
