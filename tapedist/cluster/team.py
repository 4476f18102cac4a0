"""The workers of a run: exchange of small values by TensorFlow's collectives, and decisions that hold for all of them.

Legend: `W` workers. Every method is a collective: all workers call it, in the same order.
"""

from __future__ import annotations

import concurrent.futures
import io
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import tensorflow as tf

from tapedist import errors
from tapedist.cluster.resolve import ClusterSpec
from tapedist.cluster.watchdog import Watchdog, peer_lost
from tapedist.errors import InputError, Interrupted, PeerLostError, TapedistError
from tapedist.training.interfaces import Decision, SingleProcess, StopRequest

_ASK_EVERY_SECS = 0.5
_MAX_SHOWN = 80
_HEAR_EVERY_SECS = 0.3
_GOES_ON, _DONE, _FAILED = range(3)

Result = TypeVar("Result")


class Team:
    """The team of several workers.

    Args:
        strategy: the multi-worker strategy.
        spec: the cluster.
        watchdog: notified of every exchange.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        spec: ClusterSpec,
        watchdog: Watchdog,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.spec = spec
        self._strategy = strategy
        self._watchdog = watchdog
        self._clock = clock
        self._sum = tf.function(
            lambda value: strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None),
            autograph=False, reduce_retracing=True,
        )  # fmt: skip
        self._silent_rounds = 0
        self._rounds_per_ask = 1
        self._last_ask = clock()

    def gather(self, mine: np.ndarray) -> np.ndarray:
        """All workers' `mine` int64 `[k]`, as `[W, k]` in rank order."""
        rows = np.zeros([self.spec.num_workers, *np.shape(mine)], np.int64)
        rows[self.spec.index] = mine
        return self._total(rows)

    def _total(self, mine: np.ndarray) -> np.ndarray:
        """The sum of all workers' `mine`, int64 of one shape.

        Where each worker has zeros at the others' places, the sum is a gather in rank order; TensorFlow's own gather
        sorts by name, rank 10 before rank 2.
        """
        if not mine.size:  # TensorFlow crashes on an empty sum. It is empty on all workers, so none waits here.
            return mine
        replicas = self._strategy.num_replicas_in_sync // self.spec.num_workers

        def value(context: tf.distribute.ValueContext) -> tf.Tensor:
            # Each replica contributes to the sum, so that only the first one of a worker has its number.
            first = context.replica_id_in_sync_group % replicas == 0
            return tf.constant(mine if first else np.zeros_like(mine), tf.int64)

        found = self._sum(self._strategy.experimental_distribute_values_from_function(value)).numpy()
        self._watchdog.beat()
        return found

    def exchange(self, mine: bytes) -> list[bytes]:
        """All workers' `mine`, in rank order."""
        # Lengths first: a collective needs one shape, so that the bytes are padded to the longest.
        lengths = self.gather(np.array([len(mine)]))[:, 0]
        gathered = self.gather(_as_numbers(mine, int(lengths.max())))
        return [row.tobytes()[:length] for row, length in zip(gathered, lengths, strict=True)]

    def _from_chief(self, payload: bytes) -> bytes:
        """The chief's `payload`; other workers pass an empty one. It is sent once, not once for each worker."""
        length = int(self._total(np.array([len(payload)], np.int64))[0])
        return self._total(_as_numbers(payload, length)).tobytes()[:length]

    # The methods of `training.interfaces.Consensus`.

    def agree(self, mine: Decision) -> Decision:
        gathered = self.gather(np.array(mine, np.int64))
        self._silent_rounds = 0
        self._last_ask = self._clock()
        return Decision(int(gathered[:, 0].max()), int(gathered[0, 1]), bool(gathered[0, 2]))

    def interrupted(self, stop: int) -> bool:
        # Called for every block, which may take less time than a gather. So workers gather every so many calls, a
        # number that the chief sets by its clock; counting calls keeps all of them in step without an exchange.
        self._silent_rounds += 1
        self._watchdog.beat()
        if self._silent_rounds < self._rounds_per_ask:
            return False
        seconds = max(self._clock() - self._last_ask, 1e-6)
        rounds = int(min(self._silent_rounds * _ASK_EVERY_SECS / seconds, 2 * self._rounds_per_ask, 1e9))
        gathered = self.gather(np.array([stop, max(1, rounds)]))
        self._rounds_per_ask = int(gathered[0, 1])
        self._silent_rounds = 0
        self._last_ask = self._clock()
        return bool(gathered[:, 0].any())

    def broadcast_text(self, words: str) -> str:
        return self._from_chief(words.encode() if self.spec.is_chief else b"").decode()

    # The start and the end of a run.

    def broadcast(self, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Calls `make` on the chief alone, and returns its result on all workers.

        Raises:
            TapedistError: on all workers, if `make` raised it.
        """
        return _unpacked(self._from_chief(_packed(make) if self.spec.is_chief else b""))

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Raises if workers would compute different results, or different numbers of steps.

        Args:
            facts: by name, JSON values that must be equal everywhere.

        Raises:
            InputError: on every worker, with ranks and keys.
        """
        mine = json.dumps(facts, sort_keys=True).encode()
        chief, *others = (json.loads(words) for words in self.exchange(mine))
        problems = [
            f"rank {rank} ({self.spec.workers[rank]}): {key} is {_shown(theirs.get(key))}, but "
            f"{_shown(chief.get(key))} on rank 0 ({self.spec.workers[0]}); start all workers with the same flags, "
            "files and versions"
            for rank, theirs in enumerate(others, start=1)
            for key in sorted(chief.keys() | theirs.keys())
            if chief.get(key) != theirs.get(key)
        ]
        if problems:
            raise InputError(*problems)

    def run_with_stop_agreement(self, request: StopRequest, work: Callable[[Callable[[], None]], Result]) -> Result:
        """Returns the result of `work` once every worker's has returned; see `run_with_stop_agreement`."""
        return run_with_stop_agreement(self, request, work)

    def smallest(self, value: int) -> int:
        """The smallest of all workers' `value`."""
        return int(self.gather(np.array([value])).min())

    def leave(self) -> None:
        """Waits for all workers, so that none takes the first that exits for lost."""
        self.gather(np.zeros(1))

    def lost(self, error: tf.errors.OpError) -> PeerLostError | None:
        """Converts TensorFlow's `error` to `PeerLostError`; None if it is not about workers. Not a collective."""
        return peer_lost(error, self.spec, self._watchdog)


class SingleProcessTeam(SingleProcess):
    """A team of one process."""

    def broadcast(self, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return dict(make())

    def compare(self, facts: Mapping[str, Any]) -> None:
        pass

    def run_with_stop_agreement(self, request: StopRequest, work: Callable[[Callable[[], None]], Result]) -> Result:
        return work(lambda: None)  # A single process is interrupted by the signal's own exception.

    def smallest(self, value: int) -> int:
        return value

    def leave(self) -> None:
        pass

    def lost(self, error: tf.errors.OpError) -> PeerLostError | None:
        return None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _as_numbers(words: bytes, length: int) -> np.ndarray:
    """`words` as int64, padded with zeros to `length` bytes."""
    return np.frombuffer(words.ljust(-(-length // 8) * 8, b"\0"), np.int64)


def _packed(make: Callable[[], Mapping[str, np.ndarray]]) -> bytes:
    try:
        buffer = io.BytesIO()
        np.savez(buffer, **dict(make()))  # type: ignore[arg-type]
        return buffer.getvalue()
    except TapedistError as error:
        return json.dumps({"error": type(error).__name__, "message": str(error)}).encode()


def _unpacked(payload: bytes) -> dict[str, np.ndarray]:
    if payload.startswith(b"{"):  # An error; an `.npz` begins with "PK".
        content = json.loads(payload)
        kind = getattr(errors, content["error"])
        raise InputError(*content["message"].split("\n")) if kind is InputError else kind(content["message"])
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        return dict(arrays)


class Gathering(Protocol):
    """The method of a team that `run_with_stop_agreement` needs."""

    def gather(self, mine: np.ndarray) -> np.ndarray:
        """All workers' `mine` int64 `[k]`, as `[W, k]`."""


def run_with_stop_agreement(
    team: Gathering, request: StopRequest, work: Callable[[Callable[[], None]], Result]
) -> Result:
    """Returns the result of `work` once every worker's has returned; a collective of all workers.

    `work` runs in a thread of its own, because workers take different times for it and have no steps to count: the main
    threads exchange, by the clock, whether all are done or any was asked to stop.

    Args:
        team: the workers.
        request: the signal that asked this worker to stop, if one did.
        work: called with `check_stop`, which it calls regularly and which raises to end it.

    Raises:
        Interrupted: on all workers, if any of them was asked to stop.
        Exception: the exception of `work` on this worker. The other workers' `work` goes on, to fail in the same way.
    """
    stop = threading.Event()

    def check_stop() -> None:
        if stop.is_set():
            raise Interrupted(int(request.signum or 0))

    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="tapedist-work")
    try:
        future = pool.submit(work, check_stop)
        signum = _watched(team, request, future)
    finally:
        stop.set()
        # Without waiting: `work` may be in a long read, and the signal should end the run now.
        pool.shutdown(wait=False)
    if signum:
        raise Interrupted(signum)
    return future.result()


def _watched(team: Gathering, request: StopRequest, future: concurrent.futures.Future[Result]) -> int:
    """Waits for the end of all workers' work; returns the signal that asked one of them to stop, else 0."""
    while True:
        concurrent.futures.wait([future], timeout=_HEAR_EVERY_SECS)
        state = (_FAILED if future.exception() else _DONE) if future.done() else _GOES_ON
        gathered = team.gather(np.array([int(request.signum or 0), state]))
        if signum := int(gathered[:, 0].max()):
            return signum
        if (gathered[:, 1] == _FAILED).any():
            break
        if (gathered[:, 1] == _DONE).all():
            return 0
    # A worker has failed and leaves, so that there is nothing more to gather: the others end by themselves.
    while not future.done():
        if request.signum:
            return request.signum
        concurrent.futures.wait([future], timeout=_HEAR_EVERY_SECS)
    return 0
