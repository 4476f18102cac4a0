"""The folder of one run: its marker, its lock and its layout.

The marker `.tapedist` makes a folder a run folder. Nothing is written into a folder that is neither empty nor a run
folder, and nothing in it is ever cleaned but the package's own temporary files. One live process may write to it, by a
lock that the kernel drops with the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import time
import weakref
from pathlib import Path
from types import TracebackType

import psutil

from tapedist.errors import InputError, StateError
from tapedist.storage.files import OWN_PREFIX, POSIX, storage_error, write_atomic

SCHEMA = 1
_FORMAT = "tapedist run folder"
MARKER = OWN_PREFIX
LOCK = f"{OWN_PREFIX}.lock"
# Files and folders of a run, by the attributes of `RunFolder`.
MEMBERS = {
    "metrics": "metrics.jsonl",
    "flags": "config.flags",
    "environment": "env.json",
    "model": "model.json",
    "checkpoints": "checkpoints",
    "events": "events",
    "plots": "plots",
    "report": "report.html",
    "export": "export",
    "done": "done.json",
}
# Time that a process with the lock may need to write its pid and host into the file.
_HOLDER_WRITE_SECS = 2.0
_TEMPORARY = re.compile(re.escape(OWN_PREFIX) + r"-([0-9]{1,9})-.+")


def marker_text() -> str:
    """The content of a marker."""
    return json.dumps({"format": _FORMAT, "schema": SCHEMA}) + "\n"


def read_marker(folder: str | Path) -> int | None:
    """Returns the schema in a folder's marker; None if there is no valid marker."""
    # O_NONBLOCK, because to open a named pipe in the marker's place would wait for a writer.
    try:
        fd = os.open(os.path.join(folder, MARKER), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as file:
        try:
            marker = json.loads(file.read(4096))
            known = marker["format"] == _FORMAT and type(marker["schema"]) is int
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return int(marker["schema"]) if known else None


def check(path: str | Path, *, write: bool = True) -> None:
    """Raises if a path cannot be the folder of a run; touches nothing.

    A link is followed only to a folder in the same directory (`latest -> 2026-11-23`): one that leads elsewhere may be
    another user's.

    Args:
        path: the folder, which may be missing.
        write: whether it must be writable.

    Raises:
        InputError: if it cannot, with the reason.
        StateError: if a later version of tapedist made it.
    """
    text = os.fspath(path)
    problem = _wrong_name(text)
    try:
        problem = problem or _wrong_link(text) or _wrong_place(text, write) or _wrong_content(text, write)
    except OSError as error:
        problem = f"cannot be looked at ({error.strerror}); use another path"
    if problem:
        raise InputError(f"--run_dir={text!r}: {problem}")


def _wrong_name(text: str) -> str | None:
    if not text:
        return "must name a folder"
    if not text.isprintable():
        return "must not hold control characters; rename the path"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return "must be a local path, because saving needs rename and fsync; train into a local folder and copy it out"
    return None


def _wrong_link(text: str) -> str | None:
    link = text.rstrip("/") or text
    if not os.path.islink(link):
        return None
    target = os.path.realpath(link)
    if not os.path.isdir(target):
        return f"is a link to {target!r}, which is no folder; remove the link"
    if os.path.dirname(target) != os.path.realpath(os.path.dirname(os.path.abspath(link))):
        return f"is a link that leads outside its folder, to {target!r}; give that path itself"
    return None


def _wrong_place(text: str, write: bool) -> str | None:
    """Checks the folder, or the nearest existing parent of a missing one."""
    place = os.path.realpath(text)
    while True:
        try:
            mode = os.stat(place).st_mode
            break
        except (FileNotFoundError, NotADirectoryError):
            place = os.path.dirname(place)
    shown = "" if place == os.path.realpath(text) else f"its parent {place!r} "
    if not stat.S_ISDIR(mode):
        return f"{shown}is a file; give a folder"
    if write and not os.access(place, os.W_OK | os.X_OK):
        return f"{shown}is not writable; use another folder or change its permissions"
    return None


def _wrong_content(text: str, write: bool) -> str | None:
    try:
        names = os.listdir(text)
    except FileNotFoundError:
        return None
    # Listed before the marker is read: another run that starts here at this moment writes its marker first, so that
    # files that are listed have a marker by now.
    foreign = sorted(name for name in names if not name.startswith(OWN_PREFIX))
    marker = read_marker(text)
    if marker is None and foreign:
        fix = "give a new or an empty folder" if write else "give the --run_dir of a training run"
        return f"is not empty and not a run folder (it holds {foreign[0]!r}); {fix}"
    if marker is not None and marker > SCHEMA:
        raise StateError(
            f"--run_dir={text!r}: was made by a later version (schema {marker}, this one knows up to {SCHEMA}); "
            "continue with that version"
        )
    for name in (MARKER, LOCK, *MEMBERS.values()):
        if os.path.islink(os.path.join(text, name)):
            return f"holds a link in the place of {name}; remove it"
    return None


class RunLock:
    """The exclusive right to write to a run folder.

    The kernel drops the lock when the process ends, however it ends; the file stays, and its existence means nothing.
    """

    def __init__(self, path: Path):
        """Takes the lock.

        Args:
            path: the lock's file, made if missing.

        Raises:
            InputError: if a live process holds it (with its pid and host), or the disk does not support locks.
            StorageError: if the file cannot be written.
        """
        self._fd = _opened(path)
        try:
            _lock(self._fd, path)
            # The lock is the open file's, not the name's: `_roll_back` of a refused command may have unlinked the file
            # in between, and then another process could lock a new one of this name.
            while not _is_at(self._fd, path):
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
        """Releases the lock; may be called again."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # Not needed for the lock, but a stale pid would mislead.
                os.ftruncate(self._fd, 0)
            self._abandon()

    def _abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise storage_error("lock the run folder by", path, error) from error


def _is_at(fd: int, path: Path) -> bool:
    """Returns whether `path` is still the name of the open file."""
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
    """Describes the process that holds the lock; the pid of a dead one is ignored."""
    # Polled: the holder has the lock already, and may not have written its pid yet.
    give_up = time.monotonic() + _HOLDER_WRITE_SECS
    while time.monotonic() < give_up:
        try:
            holder = json.loads(os.pread(fd, 4096, 0))
            pid, host = int(holder["pid"]), str(holder["host"])
        except (ValueError, TypeError, KeyError):
            pid, host = 0, ""
        # On a shared disk the holder may be on another host, whose pids cannot be looked up here.
        if pid > 0 and (host != socket.gethostname() or psutil.pid_exists(pid)):
            return f"the process with pid {pid} on host {host!r}"
        time.sleep(0.01)
    return "another process"


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _drop_inherited() -> None:
    # `flock` is of the open file, which a forked child shares: it would keep the lock after its parent's death. Closed,
    # not unlocked, because to unlock would take the lock from the parent, too.
    for lock in list(_held):
        lock._abandon()


os.register_at_fork(after_in_child=_drop_inherited)


class RunFolder:
    """A run folder, by `open` (locked, to train into) or `find` (of an earlier run, to read or add to).

    Attributes:
        root: its absolute path without links.
        metrics: loss rows, one JSON object a line.
        flags: a flagfile that repeats the run.
        environment: versions and devices.
        model: the fitted parameters and the training summary.
        checkpoints: directory of `CheckpointStore`.
        events: directory of TensorBoard event files.
        plots: directory of figures.
        report: the HTML page.
        export: directory of numbered SavedModels.
        done: written last by training; its presence means success.
    """

    metrics: Path
    flags: Path
    environment: Path
    model: Path
    checkpoints: Path
    events: Path
    plots: Path
    report: Path
    export: Path
    done: Path

    def __init__(self, root: Path, lock: RunLock | None = None, made: list[Path] | None = None):
        self.root = root
        for name, member in MEMBERS.items():
            setattr(self, name, root / member)
        self._lock = lock
        self._made = made  # Folders that `open` made for a new run; None if the run was there.

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Makes the folder if it is missing, locks it until `close` or the end of the process, and marks it as ours.

        Raises:
            InputError: as `check`, or if a live process holds the lock.
            StateError: if a later version of tapedist made it.
            StorageError: if it cannot be written.
        """
        check(path)
        root = Path(os.path.realpath(path))
        made = _make_directories(root)
        lock = RunLock(root / LOCK)
        try:
            check(root)  # Again: it may have changed before the lock was taken.
            is_new = read_marker(root) is None
            # The marker before any other file, so that a crash never leaves files of a run without one.
            if is_new:
                write_atomic(root / MARKER, marker_text())
            _remove_leftovers(root)
        except BaseException:
            lock.release()
            raise
        return cls(root, lock, made if is_new else None)

    @classmethod
    def find(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run, without a lock.

        Raises:
            InputError: if there is no such folder, or it is not ours.
            StateError: if a later version of tapedist made it.
        """
        check(path, write=False)
        if read_marker(path) is None:
            raise InputError(f"--run_dir={str(path)!r}: is no run folder; give the --run_dir of a training run")
        return cls(Path(os.path.realpath(path)))

    def clear(self) -> None:
        """Removes the run that the folder holds, so that another can start in its place.

        Raises:
            StorageError: if something cannot be removed.
        """
        try:
            self.done.unlink(missing_ok=True)  # First: without it, whatever is left is no finished run.
            for directory in (self.checkpoints, self.events, self.plots):
                # Renamed first, in one step: half a set of checkpoints would be taken for a damaged run. The new name
                # is one that `_remove_leftovers` finishes after a crash.
                doomed = self.root / f"{OWN_PREFIX}-{os.getpid()}-{directory.name}"
                if doomed.exists():  # Left by a killed process with the same pid.
                    shutil.rmtree(doomed)
                if directory.exists():
                    directory.rename(doomed)
                    POSIX.sync_directory(self.root)
                    shutil.rmtree(doomed)
            for file in (self.metrics, self.model, self.report):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("remove the earlier run from", self.root, error) from error

    def close(self) -> None:
        """Releases the lock; may be called again."""
        self._made = None
        if self._lock:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, InputError):
            self._roll_back()
        self.close()

    def _roll_back(self) -> None:
        """Restores the disk as `open` found it, if no other file was made since: a refused command leaves nothing."""
        if self._made is None or not {MARKER, LOCK}.issuperset(os.listdir(self.root)):
            return
        with contextlib.suppress(OSError):
            # Still under the lock. A process that opened the lock's file before this takes a new one; see `RunLock`.
            for name in (MARKER, LOCK):
                (self.root / name).unlink()
            for directory in reversed(self._made):
                directory.rmdir()


def _make_directories(root: Path) -> list[Path]:
    """Makes `root` and its missing parents, makes their names durable, and returns them from the top down."""
    missing = [parent for parent in (root, *root.parents) if not parent.exists()]
    try:
        for directory in reversed(missing):
            # From the top down, each name durable before the next folder is made in it.
            with contextlib.suppress(FileExistsError):
                POSIX.mkdir(directory)
            POSIX.sync_directory(directory.parent)
    except OSError as error:
        raise storage_error("make the run folder", root, error) from error
    return missing[::-1]


def _remove_leftovers(root: Path) -> None:
    """Removes temporary files and folders of processes that died."""
    for name in os.listdir(root):
        match = _TEMPORARY.fullmatch(name)
        if match and not psutil.pid_exists(int(match[1])):
            with contextlib.suppress(OSError):
                path = root / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
