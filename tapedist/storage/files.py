"""The file operations of a commit, behind one small interface.

Whatever must survive a crash goes through a `FileSystem`, so that tests can inject a fault or a crash at each
operation. Each method is one system call: retries, cleaning and reports are its callers', where they are tested.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tapedist.errors import StorageError, TapedistError

# Prefix of files that belong to the package alone, anywhere in a run folder.
OWN_PREFIX = ".tapedist"

_FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of the quota",
    errno.EFBIG: "raise the file-size limit (ulimit -f)",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EROFS: "use a folder on a writable disk",
    errno.EINVAL: "use a folder on a disk that supports fsync",
}


class FileSystem(Protocol):
    """System calls on files and directories; each raises `OSError` as the call of its name does."""

    def mkdir(self, path: Path) -> None: ...

    def create(self, path: Path) -> int:
        """Opens a file that must not exist yet for writing; returns its descriptor."""

    def write(self, fd: int, data: memoryview) -> int:
        """Writes some of `data`; returns how many bytes, which may be fewer than asked for."""

    def sync(self, fd: int) -> None: ...

    def close(self, fd: int) -> None: ...

    def sync_directory(self, path: Path) -> None:
        """Makes the names in a directory durable, not what lies under them."""

    def rename(self, source: Path, target: Path) -> None: ...

    def listdir(self, path: Path) -> list[str]:
        """Names in a directory, which must not be a symbolic link: nothing is removed through one."""

    def read(self, path: Path) -> bytes: ...

    def unlink(self, path: Path) -> None: ...

    def rmdir(self, path: Path) -> None: ...


class PosixFileSystem:
    """The file system of the operating system."""

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        # O_EXCL: an existing file or link is an error rather than overwritten or followed. 0o666 leaves it to the
        # umask.
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        full_sync = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone leaves data in the drive's cache.
        if full_sync is None:
            os.fsync(fd)
        else:
            fcntl.fcntl(fd, full_sync)

    def close(self, fd: int) -> None:
        os.close(fd)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def listdir(self, path: Path) -> list[str]:
        # By a descriptor of the directory itself: O_NOFOLLOW fails on a link, where `os.listdir(path)` would follow it.
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)


POSIX = PosixFileSystem()


def storage_error(doing: str, path: Path, error: OSError) -> StorageError:
    """The error for the user, in one line: the failed action, the path, the reason and the fix."""
    fix = _FIXES.get(error.errno or 0, "check the disk")
    return StorageError(f"cannot {doing} {str(path)!r}: {error.strerror or error}; {fix} and start again")


def write_synced(fs: FileSystem, path: Path, data: bytes) -> None:
    """Creates `path` with `data`, which is on the disk on return (its name is not until its directory is synced).

    Raises:
        OSError: as the file system's; the file may be left incomplete.
    """
    fd = fs.create(path)
    try:
        left = memoryview(data)
        while left:
            written = fs.write(fd, left)
            # A write may be short, as on a disk that is nearly full; one that makes no progress would loop forever.
            if written <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left = left[written:]
        fs.sync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            fs.close(fd)
        raise
    # Not in a `finally`: some file systems report a failed write by `close` only, and that must raise here.
    fs.close(fd)


@contextlib.contextmanager
def replacing(path: Path, fs: FileSystem = POSIX) -> Iterator[Path]:
    """Yields a temporary path in the same folder; at the end of the block it replaces `path` in one step.

    Args:
        path: the file; its directory must exist.
        fs: where to write. A file that must survive a crash is synced inside the block.

    Raises:
        StorageError: if it cannot be written; the old content is kept.
    """
    temporary = path.with_name(f"{OWN_PREFIX}-{os.getpid()}-{path.name}")
    try:
        with contextlib.suppress(FileNotFoundError):  # Left by a killed process with the same pid.
            fs.unlink(temporary)
        yield temporary
        fs.rename(temporary, path)
        fs.sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            fs.unlink(temporary)
        if isinstance(error, OSError) and not isinstance(error, TapedistError):
            raise storage_error("write", path, error) from error
        raise


def write_atomic(path: Path, text: str, fs: FileSystem = POSIX) -> None:
    """Replaces a small file in one step: after a crash it holds the old text or the new one, never a part.

    Args:
        path: the file; its directory must exist.
        text: the new content, written as UTF-8.
        fs: where to write.

    Raises:
        StorageError: if it cannot be written; the old content is kept.
    """
    with replacing(path, fs) as temporary:
        write_synced(fs, temporary, text.encode())
