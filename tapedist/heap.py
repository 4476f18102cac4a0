"""The C library's heap, told to keep the memory that a run uses again and again.

Every block of rows and every temporary of a compiled function is allocated and freed anew. By default glibc asks the
system for each that is large and gives it back, so that its pages are faulted in and cleared every time: making rows
takes up to half as long again (`scripts/bench/limits.md`). What a run frees after its peak it keeps, up to a bound.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

# Of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# Bytes: of an allocation, larger ones being the rows that a run holds to its end; and of what is kept by each of the
# heap's arenas, of which there are several a core: with 256 MiB a run under a limit of 2 GiB found no memory left.
_LARGEST = 32 * 2**20
_KEPT = 32 * 2**20
_SETTLED = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> None:
    """Sets glibc's thresholds for this process, unless its environment has settled them."""
    if sys.platform != "linux" or any(name in os.environ for name in _SETTLED):
        return
    with contextlib.suppress(OSError, AttributeError):  # Another C library.
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
