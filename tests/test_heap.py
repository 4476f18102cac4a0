"""Memory that is freed stays with the process, unless its environment says otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

_USES_AND_FREES = """
import ctypes, resource
import tapedist.heap
tapedist.heap.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def use():
    address = libc.malloc(ctypes.c_size_t(24 * 2**20))
    ctypes.memset(address, 1, 24 * 2**20)
    libc.free(ctypes.c_void_p(address))
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's thresholds")
@pytest.mark.parametrize(
    ("env", "least", "most"), [({}, 0, 1000), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, 50_000, 100_000)]
)
def test_pages_are_faulted_in_once(run_python: Callable[..., Any], env: dict[str, str], least: int, most: int) -> None:
    """24 MiB are 6,144 pages."""
    done = run_python("-c", _USES_AND_FREES, env=env)
    assert least <= int(done.out) <= most
