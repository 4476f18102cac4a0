"""The folder of one run: who may write to it, and what lies where. Whether it is ours, `run_place.py` knows.

Nothing is written into a folder that is neither empty nor ours, and nothing in it is ever cleaned but our own temporary
files.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from types import TracebackType

from tapedist.errors import InputError
from tapedist.storage import run_place
from tapedist.storage.files import OWN_PREFIX, POSIX, storage_error, write_atomic
from tapedist.storage.run_lock import RunLock, is_alive
from tapedist.storage.run_place import LOCK, MARKER, marker_text, read_marker

_TEMPORARY = re.compile(re.escape(OWN_PREFIX) + r"-([0-9]{1,9})-.+")


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

    def __init__(self, root: Path, lock: RunLock | None = None, made: list[Path] | None = None):
        self.root = root
        self.metrics = root / "metrics.jsonl"
        self.flags = root / "config.flags"
        self.environment = root / "env.json"
        self.model = root / "model.json"
        self.checkpoints = root / "checkpoints"
        self.events = root / "events"
        self.plots = root / "plots"
        self.report = root / "report.html"
        self.export = root / "export"
        self.done = root / "done.json"
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
            check(root)  # Again: it may have changed before the lock was ours.
            is_new = read_marker(root) is None
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

    def forget_run(self) -> None:
        """Removes the run that the folder holds, so that another can start in its place.

        Raises:
            StorageError: if something cannot be removed.
        """
        try:
            self.done.unlink(missing_ok=True)  # First: without its mark, what is left is no finished run.
            for directory in (self.checkpoints, self.events, self.plots):
                # Out of sight by one step: half a set of checkpoints would be taken for a damaged run.
                doomed = self.root / f"{OWN_PREFIX}-{os.getpid()}-{directory.name}"
                if doomed.exists():  # Left by a killed process that had the same number.
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
        """Lets the next run in; may be called again."""
        self._made = None
        if self._lock:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, InputError):
            self._take_back()
        self.close()

    def _take_back(self) -> None:
        """Leaves the disk as `open` found it, if nothing has happened since: a refused command touches nothing."""
        if self._made is None or not {MARKER, LOCK}.issuperset(os.listdir(self.root)):
            return
        with contextlib.suppress(OSError):
            for name in (MARKER, LOCK):
                (self.root / name).unlink()
            for directory in reversed(self._made):
                directory.rmdir()


def check(path: str | Path, *, write: bool = True) -> None:
    """Whether `RunFolder.open` may use `path`; touches nothing. See `run_place.check`.

    Args:
        path: the folder, which may be missing.
        write: whether it must be writable.

    Raises:
        InputError: if it may not; `problems` says why.
        StateError: if a later version of tapedist made it.
    """
    members = [member.name for member in vars(RunFolder(Path(path))).values() if isinstance(member, Path)]
    run_place.check(path, write=write, members=members[1:])  # The first is the folder itself.


def _make_directories(root: Path) -> list[Path]:
    """Makes `root` and its missing parents, makes their names durable, and returns them from the top down."""
    missing = [parent for parent in (root, *root.parents) if not parent.exists()]
    try:
        for directory in reversed(missing):
            with contextlib.suppress(FileExistsError):
                POSIX.mkdir(directory)
            POSIX.sync_directory(directory.parent)
    except OSError as error:
        raise storage_error("make the run folder", root, error) from error
    return missing[::-1]


def _remove_leftovers(root: Path) -> None:
    """Removes what processes that died were writing or removing."""
    for name in os.listdir(root):
        match = _TEMPORARY.fullmatch(name)
        if match and not is_alive(int(match[1])):
            with contextlib.suppress(OSError):
                path = root / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
