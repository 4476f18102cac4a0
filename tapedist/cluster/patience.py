"""A limit for calls that may never return, such as a library's that waits for a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

_LISTEN_EVERY_SECS = 0.2

Result = TypeVar("Result")


class TooLateError(Exception):
    """The call had not returned in time; it may still be under way."""


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What `call` returns or raises, if it does so in time.

    It runs in a thread of its own, so that the caller's thread can go on and, if it is the main thread, hears signals
    meanwhile. The call must let other threads run while it waits.

    Args:
        seconds: the limit.
        call: what to do.

    Raises:
        TooLateError: if the limit has passed.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True, name="tapedist-call")
    thread.start()
    while thread.is_alive() and seconds > 0:
        # In small parts: where a wait is not broken off by a signal, Python still hears it in between.
        thread.join(min(_LISTEN_EVERY_SECS, seconds))
        seconds -= _LISTEN_EVERY_SECS
    if errors:
        raise errors[0]
    if not results:
        raise TooLateError
    return results[0]
