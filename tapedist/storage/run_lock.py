"""One live process per run folder, by a lock that dies with its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import weakref
from pathlib import Path

from tapedist.errors import InputError
from tapedist.storage.files import storage_error

# How long to wait for the holder, who has the lock already, to have written who it is.
_INTRODUCTION_SECS = 2.0


class RunLock:
    """The exclusive right to write to a run folder.

    The kernel drops the lock when the process ends, however it ends; the file stays, and says nothing by being there.
    """

    def __init__(self, path: Path):
        """Takes the lock.

        Args:
            path: the lock's file, made if missing.

        Raises:
            InputError: if a live process holds it (pid and host are named), or the disk knows no locks.
            StorageError: if the file cannot be written.
        """
        self._fd = _opened(path)
        try:
            _lock(self._fd, path)
            while not _is_at(self._fd, path):  # A start that was refused has taken the file away meanwhile.
                fresh = _opened(path)
                os.close(self._fd)
                self._fd = fresh
                _lock(self._fd, path)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BaseException as error:
            os.close(self._fd)
            if isinstance(error, OSError):
                raise storage_error("lock the run folder by", path, error) from error
            raise
        _held.add(self)

    def release(self) -> None:
        """Lets the next process in; may be called again."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # Only so that nobody reads who held it last.
                os.ftruncate(self._fd, 0)
            self._abandon()

    def _abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs (or waits to be reaped) under `pid`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise storage_error("lock the run folder by", path, error) from error


def _is_at(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(fd))


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"--run_dir={str(path.parent)!r}: is in use by {_holder(fd)}; wait for it, stop it, or use another folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        raise InputError(
            f"--run_dir={str(path.parent)!r}: must be on a disk that supports locks ({error.strerror}); use a local one"
        ) from None


def _holder(fd: int) -> str:
    """Who holds the lock; what a dead holder left in the file is not believed."""
    give_up = time.monotonic() + _INTRODUCTION_SECS
    while time.monotonic() < give_up:
        try:
            holder = json.loads(os.pread(fd, 4096, 0))
            pid, host = int(holder["pid"]), str(holder["host"])
        except (ValueError, TypeError, KeyError):
            pid, host = 0, ""
        if pid > 0 and (host != socket.gethostname() or is_alive(pid)):
            return f"the process with pid {pid} on host {host!r}"
        time.sleep(0.01)
    return "another process"


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _drop_inherited() -> None:
    # A forked child shares the open file, and so would keep the lock after its parent died.
    for lock in list(_held):
        lock._abandon()


os.register_at_fork(after_in_child=_drop_inherited)
