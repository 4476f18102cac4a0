"""Long work that every worker does for itself, during which all of them hear a stop that one was asked for."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np

from tapedist.errors import Interrupted
from tapedist.training.consensus import StopRequest

_ASK_EVERY_SECS = 0.3
_GOES_ON, _DONE, _FAILED = range(3)

Result = TypeVar("Result")


class Gathering(Protocol):
    """What `together` asks of a team of several workers."""

    def gather(self, mine: np.ndarray) -> np.ndarray:
        """Everybody's `mine` int64 `[k]`, as `[W, k]`."""


def together(team: Gathering, request: StopRequest, work: Callable[[Callable[[], None]], Result]) -> Result:
    """What `work` returns, once every worker's has returned; a collective of all workers.

    It runs in a thread of its own, because workers take different times for it and have nothing to count along with:
    the main thread agrees by the clock with those of the others on whether all are done or any was asked to stop.

    Args:
        team: the workers.
        request: whether this worker was asked to stop.
        work: takes `heed`, which it calls now and then and which raises to break it off.

    Raises:
        Interrupted: on all workers, if any of them was asked to stop.
        Exception: what `work` raised here. The others' work goes on, to meet the same.
    """
    stop = threading.Event()

    def heed() -> None:
        if stop.is_set():
            raise Interrupted(int(request.signum or 0))

    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="tapedist-work")
    try:
        future = pool.submit(work, heed)
        signum = _watched(team, request, future)
    finally:
        stop.set()
        pool.shutdown(wait=False)
    if signum:
        raise Interrupted(signum)
    return future.result()


def _watched(team: Gathering, request: StopRequest, future: concurrent.futures.Future[Result]) -> int:
    """Waits for the end of everybody's work: the signal that asked a worker to stop, else 0."""
    while True:
        concurrent.futures.wait([future], timeout=_ASK_EVERY_SECS)
        state = (_FAILED if future.exception() else _DONE) if future.done() else _GOES_ON
        everyones = team.gather(np.array([int(request.signum or 0), state]))
        if signum := int(everyones[:, 0].max()):
            return signum
        if (everyones[:, 1] == _FAILED).any():
            break
        if (everyones[:, 1] == _DONE).all():
            return 0
    while not future.done():  # With nobody to agree with.
        if request.signum:
            return request.signum
        concurrent.futures.wait([future], timeout=_ASK_EVERY_SECS)
    return 0
