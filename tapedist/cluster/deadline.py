"""A deadline that holds while no Python code can run, because a library holds the interpreter's lock and waits."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2
_AFTER_WORDS_SECS = 0.2


class _Event(ctypes.Structure):
    """`struct sigevent` of glibc and musl on 64-bit Linux (`man 7 sigevent`), 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class _Times(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = (
        ("interval_secs", ctypes.c_long),
        ("interval_nanos", ctypes.c_long),
        ("secs", ctypes.c_long),
        ("nanos", ctypes.c_long),
    )


@contextlib.contextmanager
def deadline(seconds: float, *, words: str, code: int) -> Iterator[None]:
    """Ends the process with `code` after `words` on stderr, unless the block is left before `seconds` have passed.

    The C library's timers call `warnx` and `_exit` in threads of their own. Without them (not Linux), there is no
    deadline.
    """
    if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        yield
        return
    libc = ctypes.CDLL(None)
    text = ctypes.create_string_buffer(f"error: {words}".replace("%", "%%").encode())
    with contextlib.suppress(ValueError):  # warnx begins with the program's name; only glibc lets us say it.
        ctypes.c_char_p.in_dll(libc, "program_invocation_short_name").value = b"tapedist"
    timers = [
        _start_timer(libc, seconds, libc.warnx, ctypes.addressof(text)),
        _start_timer(libc, seconds + _AFTER_WORDS_SECS, libc._exit, code),
    ]
    try:
        yield
    finally:
        for timer in timers:
            libc.timer_delete(timer)


def _start_timer(libc: ctypes.CDLL, seconds: float, function: object, argument: int) -> ctypes.c_void_p:
    """A timer that calls the C `function(argument)` once."""
    event = _Event(argument, 0, _SIGEV_THREAD, ctypes.cast(function, ctypes.c_void_p), None, b"")  # type: ignore[arg-type]
    timer = ctypes.c_void_p()
    if libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError("timer_create failed")
    times = _Times(0, 0, int(seconds), max(1, int(seconds % 1 * 1e9)))
    libc.timer_settime(timer, 0, ctypes.byref(times), None)
    return timer
