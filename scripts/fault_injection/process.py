"""A training process that can be watched from outside, and the moments of its life."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
_TOO_LONG_SECS = 600.0


class TrainingProcess:
    """One `tapedist train`, and how far it has come by what it prints."""

    def __init__(self, flags: list[str], run_dir: Path, replicas: int):
        path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
        devices = [f"--num_virtual_devices={replicas}"] if replicas > 1 else []
        self.began = time.monotonic()
        self.run_dir = run_dir
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tapedist", "train", f"--run_dir={run_dir}", *flags, *devices],
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        self.loading, self.training = threading.Event(), threading.Event()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=self._read_output), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_output(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("Strategy:"):
                self.loading.set()
            elif line.startswith("Training samples:"):
                self.training.set()

    def _read_errors(self) -> None:
        assert self._process.stderr
        self._errors.extend(self._process.stderr)

    @property
    def errors(self) -> str:
        return "".join(line for line in self._errors if line.startswith("tapedist:") or "Error" in line).strip()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_for(self, happened: Callable[[], bool], pause: float = 0.002) -> bool:
        """Waits until something happened; False if the process ended before."""
        while self.running:
            if happened():
                return True
            time.sleep(pause)
        return False

    def send(self, signum: int) -> None:
        if self.running:
            self._process.send_signal(signum)

    def end(self) -> int:
        try:
            code = self._process.wait(_TOO_LONG_SECS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = 999
        for reader in self._readers:
            reader.join()
        return code


class Watch:
    """Names made in a directory, told by the kernel as they appear (Linux only)."""

    _IN_CREATE = 0x100

    def __init__(self, directory: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_CLOEXEC)
        if libc.inotify_add_watch(self._descriptor, os.fsencode(directory), self._IN_CREATE) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def made(self, *, seconds: float) -> list[str]:
        """Names that were made since the last call, or within some seconds."""
        names = []
        if select.select([self._descriptor], [], [], seconds)[0]:
            events = os.read(self._descriptor, 1 << 16)
            while events:
                _, _, _, length = struct.unpack("iIII", events[:16])
                names.append(os.fsdecode(events[16 : 16 + length].rstrip(b"\0")))
                events = events[16 + length :]
        return names


def newest_save(run_dir: Path) -> int:
    """The number of the newest checkpoint; 0 if there is none."""
    try:
        names = os.listdir(run_dir / "checkpoints")
    except FileNotFoundError:
        return 0
    return max((int(name.partition("-")[0]) for name in names if name[0].isdigit()), default=0)
