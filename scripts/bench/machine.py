"""What the measurements depend on beside the code."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any


def cores() -> int:
    return len(os.sched_getaffinity(0))


def describe() -> dict[str, Any]:
    """Processor, memory, system, versions, the commit and the load before the run."""
    packages = ("tapedist", "tensorflow", "keras", "numpy")
    return {
        "date": f"{dt.datetime.now():%Y-%m-%d %H:%M}",
        "processor": _processor(),
        "cores": cores(),
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compiler": _output("cc", "--version"),
        "commit": _commit(),
        "load": os.getloadavg()[0],
    }


def _commit() -> str:
    """The commit, and whether what was measured differs from it; what measurements write does not count."""
    measured = (":/", ":(top,exclude)scripts/bench/results")
    changed = _output("git", "status", "--porcelain", "--", *measured) != "unknown"
    return _output("git", "describe", "--always") + "-dirty" * changed


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=pathlib.Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


def _processor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _caches() -> str:
    found = []
    for index in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found)
