"""Whether this process itself stands still: its main thread waits, but not in TensorFlow, and nothing is computed, read
or written meanwhile.

A worker that hangs while its TensorFlow server still answers cannot be told from outside from one that computes for
long. From inside it can, because the threads of the interpreter go on. What this cannot see: a loop that computes for
ever, and a library that hangs while it holds the interpreter's lock; both are left to the others' patience.
"""

from __future__ import annotations

import collections
import os
import sys
import threading
import time
from collections.abc import Callable

# Share of one core below which a process counts as idle; watching and answering its peers takes less.
_IDLE = 0.05
# Bytes read and written per second below which files do not count as being read.
_QUIET = 100_000


class Standstill:
    """Judges the thread that made it.

    Args:
        seconds: how long it must have been idle.
        clock: monotonic seconds.
        cpu_clock: seconds of computing of the whole process.
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
        """Where the thread stands still; empty if it does not, or not long enough. To be asked now and then."""
        now, cpu, moved = self._clock(), self._cpu_clock(), self._moved()
        frame = sys._current_frames().get(self._thread)
        # Inside TensorFlow it may wait for a peer, or for a device that computes.
        if frame is None or str(frame.f_globals.get("__name__", "")).startswith("tensorflow"):
            self._samples.clear()
            return ""
        self._samples.append((now, cpu, moved))
        while len(self._samples) > 1 and self._samples[1][0] <= now - self._seconds:
            self._samples.popleft()
        first, first_cpu, first_moved = self._samples[0]
        seconds = now - first
        if seconds < self._seconds or cpu - first_cpu > _IDLE * seconds or moved - first_moved > _QUIET * seconds:
            return ""
        return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


def _bytes_moved() -> float:
    """Bytes that this process has read from and written to files and pipes; 0 where the system does not tell."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return float(sum(int(line.split()[1]) for line in file if line.startswith(("rchar", "wchar"))))
    except (OSError, ValueError, IndexError):
        return 0.0
