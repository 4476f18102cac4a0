"""Detects that a peer is lost or stuck while this process waits for it, and that this process itself has stalled.

From outside, a worker that hangs while its TensorFlow server still answers cannot be distinguished from one that
computes for long. From inside it can, because the threads of the interpreter go on: the main thread waits, but not in
TensorFlow, and nothing is computed, read or written meanwhile. This does not detect an endless loop, nor a library that
hangs while it holds the interpreter's lock; for those, the other workers' timeout remains.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable

import psutil
import tensorflow as tf

from tapedist.cluster.network import unreachable
from tapedist.cluster.resolve import ClusterSpec
from tapedist.errors import PeerLostError

# Share of one core below which a process counts as idle; the watchdog and TensorFlow's server take less.
_IDLE = 0.05
# Bytes read and written per second below which files do not count as being read.
_QUIET = 100_000
_TCP_SECS = 2.0
_PING_SECS = 5.0
_LEAVE_SECS = 10.0
# Timeouts to wait if all answer and none has stalled: a compilation or a scan of a table may take that long.
_PATIENCE = 10


class StallDetector:
    """Detects a stall of the thread that made it.

    Args:
        seconds: how long it must have been idle.
        clock: monotonic seconds.
        cpu_clock: processor seconds of the whole process.
        moved: bytes that the process has read and written.
    """

    def __init__(
        self,
        seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
        moved: Callable[[], float] | None = None,
    ):
        self._seconds, self._clock, self._cpu_clock = seconds, clock, cpu_clock
        self._moved = moved or _bytes_moved
        self._thread = threading.get_ident()
        self._samples: collections.deque[tuple[float, float, float]] = collections.deque()

    def where(self) -> str:
        """The place where the thread has stalled; empty if it has not, or not long enough. Call it regularly."""
        now, cpu, moved = self._clock(), self._cpu_clock(), self._moved()
        frame = sys._current_frames().get(self._thread)
        # By the innermost Python frame. Inside TensorFlow it may wait for a peer, or for a device that computes.
        if frame is None or str(frame.f_globals.get("__name__", "")).startswith("tensorflow"):
            self._samples.clear()
            return ""
        self._samples.append((now, cpu, moved))
        # Keeps the newest sample that is at least `seconds` old, so that the window never gets shorter than that.
        while len(self._samples) > 1 and self._samples[1][0] <= now - self._seconds:
            self._samples.popleft()
        first, first_cpu, first_moved = self._samples[0]
        seconds = now - first
        if seconds < self._seconds or cpu - first_cpu > _IDLE * seconds or moved - first_moved > _QUIET * seconds:
            return ""
        return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


def _bytes_moved() -> float:
    """Bytes that this process has read from and written to files and pipes; 0 where the system does not count them."""
    try:
        counters = psutil.Process().io_counters()
        return float(counters.read_chars + counters.write_chars)
    except (psutil.Error, AttributeError):  # Not every system counts them.
        return 0.0


class Watchdog:
    """A thread that expects regular progress.

    After half of the timeout without any it checks the peers. If one is lost, running collectives are aborted, so that
    the main thread raises `PeerLostError`; if that does not happen, the process exits with 75. It also exits with 75
    when its own main thread has stalled, so that the others see which worker it was.

    Args:
        spec: the cluster.
        timeout_secs: `--peer_timeout_secs`.
        ask: returns the addresses of lost peers; by default `lost_peers`.
    """

    def __init__(
        self, spec: ClusterSpec, timeout_secs: float, *, ask: Callable[[ClusterSpec], list[str]] | None = None
    ):
        self.verdict = ""
        self._spec = spec
        self._timeout_secs = timeout_secs
        self._ask = ask or lost_peers
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="tapedist-watchdog")

    def __enter__(self) -> Watchdog:
        self._standstill = StallDetector(0.75 * self._timeout_secs)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self) -> None:
        """Records progress."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        warned = 0.0
        while not self._done.wait(min(1.0, self._timeout_secs / 8)):
            beat = self._last
            waited = time.monotonic() - beat
            # In every turn, because the detector needs samples of the whole window.
            stuck = self._standstill.where()
            if stuck and waited >= self._timeout_secs:
                self._give_up(stuck, waited)
            if waited < self._timeout_secs / 2:
                continue
            # Asking takes seconds. If there was progress meanwhile, an answer that is missing means nothing.
            lost = self._ask(self._spec)
            if self._done.is_set() or beat != self._last:
                continue
            waited = time.monotonic() - beat
            if lost:
                self._end(f"no answer from {named(lost, self._spec)} while waiting for {waited:.0f} s")
            elif waited >= _PATIENCE * self._timeout_secs:
                others = [address for address in self._spec.workers if address != self._spec.address]
                self._end(
                    f"nothing was finished for {waited:.0f} s, though {named(others, self._spec)} answer; one of them "
                    "is stuck, or --peer_timeout_secs is too short"
                )
            elif waited >= self._timeout_secs and beat != warned:
                warned = beat
                print(
                    f"tapedist: warning: nothing was finished for {waited:.0f} s; all peers answer; giving up after "
                    f"{_PATIENCE * self._timeout_secs:.0f} s",
                    file=sys.stderr,
                )

    def _give_up(self, where: str, waited: float) -> None:
        mine = named([self._spec.address], self._spec)
        words = f"this worker, {mine}, has done nothing for {waited:.0f} s in {where}, and nobody keeps it waiting"
        print(f"tapedist: error: {advised(words)}", file=sys.stderr, flush=True)
        # Not `sys.exit`, which would end this thread only, and wait for the one that has stalled.
        os._exit(PeerLostError.exit_code)

    def _end(self, verdict: str) -> None:
        self.verdict = verdict
        with contextlib.suppress(Exception):
            from tensorflow.python.eager import context

            # No public function wakes a main thread that waits in a collective for a peer that is gone.
            context.context().abort_collective_ops(tf.errors.UNAVAILABLE, verdict)
        if not self._done.wait(_LEAVE_SECS):
            print(f"tapedist: error: {advised(verdict)}", file=sys.stderr, flush=True)
            os._exit(PeerLostError.exit_code)
        raise SystemExit  # Ends this thread.


def lost_peers(spec: ClusterSpec) -> list[str]:
    """Addresses of the other workers that do not answer, by TCP, then by TensorFlow's health check.

    A stopped process still accepts connections, because its kernel does; TensorFlow's server in it does not answer.
    """
    others = [address for address in spec.workers if address != spec.address]
    dead = unreachable(others, _TCP_SECS)
    return dead or [address for address in others if not _healthy(spec.workers.index(address))]


def _healthy(rank: int) -> bool:
    """Returns whether the TensorFlow server of worker `rank` answers; true if TensorFlow has no such check."""
    try:
        from tensorflow.python.eager import context

        context.context().check_collective_ops_peer_health(
            f"/job:worker/replica:0/task:{rank}", timeout_in_ms=int(_PING_SECS * 1000)
        )
    except (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.FailedPreconditionError):
        return False
    except Exception:  # Another version without it: the TCP check remains.
        return True
    return True


def peer_lost(error: tf.errors.OpError, spec: ClusterSpec, watchdog: Watchdog) -> PeerLostError | None:
    """Converts a collective's `error` to `PeerLostError`; None if it is not about peers."""
    if watchdog.verdict:
        return PeerLostError(advised(watchdog.verdict))
    # TensorFlow reports a lost peer as any of these, depending on where it notices first.
    kinds = (
        tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.FailedPreconditionError,
        tf.errors.AbortedError, tf.errors.InternalError, tf.errors.CancelledError,
    )  # fmt: skip
    if not isinstance(error, kinds):
        return None
    others = [address for address in spec.workers if address != spec.address]
    lost = unreachable(others, _TCP_SECS) or _blamed(str(error), spec)
    if lost:
        return PeerLostError(advised(f"lost {named(lost, spec)}"))
    # Without the first letter, which is a capital in some messages.
    if "ollective" not in str(error) and "oordination" not in str(error):
        return None
    return PeerLostError(advised(f"lost contact with one of {named(others, spec)}"))


def _blamed(text: str, spec: ClusterSpec) -> list[str]:
    """Addresses of the tasks that TensorFlow's message calls unhealthy."""
    ranks = {int(rank) for rank in re.findall(r"/job:worker/(?:replica:\d+/)?task:(\d+)", text)}
    return [spec.workers[rank] for rank in sorted(ranks) if rank < spec.num_workers and rank != spec.index]


def named(addresses: list[str], spec: ClusterSpec) -> str:
    return ", ".join(f"{address} (rank {spec.workers.index(address)})" for address in addresses)


def advised(verdict: str) -> str:
    return f"{verdict}; start all workers again, they continue from the last checkpoint"
