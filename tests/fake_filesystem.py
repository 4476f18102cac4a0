"""A file system in memory that fails on order, and forgets in a crash what was not synced.

A file's content is durable once the file was synced; a name is durable once its directory was. After a crash any
subset of the other changes may have reached the disk, in any order: a name without its content, a later rename
without an earlier one, half of a file. A single rename is atomic, as POSIX file systems promise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tapedist.errors import StorageError


class Crash(BaseException):
    """The machine stopped before this operation; the file system takes no more."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong at operation number `at`, and from then on if `sticky`.

    Attributes:
        at: the operation's number, from 0.
        kind: an errno name; "LATE" (EIO after the operation took effect); "SHORT" (a write takes a half, says so);
            "LYING" (a write takes a half and says all); "CRASH".
        sticky: whether every later operation suffers it too.
    """

    at: int
    kind: str
    sticky: bool = False


def outcome(operation: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
    """What the call ended with: None, the documented error or the crash; anything else is a failure of the test."""
    try:
        operation(*args, **kwargs)
    except (StorageError, Crash) as error:
        return error
    return None


@dataclasses.dataclass(eq=False)
class File:
    data: bytes = b""
    durable: bytes = b""

    def survivors(self) -> list[bytes]:
        """What may be found after a crash."""
        if self.data == self.durable:
            return [self.durable]
        half = len(self.data) // 2
        return [self.durable, self.data, self.data[:half], bytes(half) + self.data[half:]]


@dataclasses.dataclass(eq=False)
class Directory:
    entries: dict[str, File | Directory] = dataclasses.field(default_factory=dict)
    durable: dict[str, File | Directory] = dataclasses.field(default_factory=dict)
    pending: list[list[tuple[str, File | Directory | None]]] = dataclasses.field(default_factory=list)

    def change(self, *entries: tuple[str, File | Directory | None]) -> None:
        self.pending.append(list(entries))
        _apply(self.entries, entries)


def _apply(names: dict, entries) -> None:
    for name, node in entries:
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class FakeFileSystem:
    """See the module; implements `tapedist.storage.files.FileSystem` on absolute paths."""

    def __init__(self, root: Directory | None = None):
        self.root = root or Directory()
        self.fault: Fault | None = None
        self.log: list[str] = []
        self._open: dict[int, File] = {}

    # The seam.

    def mkdir(self, path: Path) -> None:
        with _Operation(self, "mkdir", path):
            parent = self._directory(path.parent)
            if path.name in parent.entries:
                raise _error(errno.EEXIST, path)
            parent.change((path.name, Directory()))

    def create(self, path: Path) -> int:
        with _Operation(self, "create", path) as operation:
            parent = self._directory(path.parent)
            if path.name in parent.entries:
                raise _error(errno.EEXIST, path)
            file = File()
            parent.change((path.name, file))
            if operation.kind != "LATE":
                self._open[len(self.log)] = file
            return len(self.log)

    def write(self, fd: int, data: memoryview) -> int:
        with _Operation(self, "write", fd) as operation:
            taken = len(data) // 2 if operation.kind in ("SHORT", "LYING") else len(data)
            self._open[fd].data += bytes(data[:taken])
            return len(data) if operation.kind == "LYING" else taken

    def sync(self, fd: int) -> None:
        with _Operation(self, "sync", fd):
            self._open[fd].durable = self._open[fd].data

    def close(self, fd: int) -> None:
        file = self._open.pop(fd)
        with _Operation(self, "close", fd):
            assert file is not None

    def sync_directory(self, path: Path) -> None:
        with _Operation(self, "sync_directory", path):
            directory = self._directory(path)
            directory.durable, directory.pending = dict(directory.entries), []

    def rename(self, source: Path, target: Path) -> None:
        with _Operation(self, "rename", source):
            parent, node = self._directory(source.parent), self._node(source)
            assert target.parent == source.parent
            there = parent.entries.get(target.name)
            if isinstance(there, Directory) and there.entries:
                raise _error(errno.ENOTEMPTY, target)
            parent.change((source.name, None), (target.name, node))

    def listdir(self, path: Path) -> list[str]:
        with _Operation(self, "listdir", path):
            return list(self._directory(path).entries)

    def read(self, path: Path) -> bytes:
        with _Operation(self, "read", path):
            node = self._node(path)
            if not isinstance(node, File):
                raise _error(errno.EISDIR, path)
            return node.data

    def unlink(self, path: Path) -> None:
        with _Operation(self, "unlink", path):
            if not isinstance(self._node(path), File):
                raise _error(errno.EISDIR, path)
            self._directory(path.parent).change((path.name, None))

    def rmdir(self, path: Path) -> None:
        with _Operation(self, "rmdir", path):
            if self._directory(path).entries:
                raise _error(errno.ENOTEMPTY, path)
            self._directory(path.parent).change((path.name, None))

    # What tests do to it.

    def inject(self, fault: Fault | None) -> None:
        """Starts to count operations anew, with `fault` ahead."""
        self.fault, self.log = fault, []

    @property
    def open_files(self) -> int:
        return len(self._open)

    def copy(self) -> FakeFileSystem:
        """The same names and contents, all durable; without faults."""
        return FakeFileSystem(_rebuilt(self.root, lambda _: True, lambda file: file.data))

    def put(self, path: Path, data: bytes) -> None:
        """Sets a file's content behind the store's back."""
        self._directory(path.parent).entries[path.name] = File(data, data)

    def crashes(self, seed: int, limit: int = 24) -> Iterator[FakeFileSystem]:
        """File systems that may be found after a crash now: all if at most `limit`, else both extremes and a sample."""
        changes: list[int] = []
        files: list[File] = []
        for directory, file in _unsynced(self.root, set()):
            changes.extend(id(change) for change in directory.pending)
            files.extend(file)
        options = [range(2)] * len(changes) + [range(len(file.survivors())) for file in files]
        count = 1
        for option in options:
            count *= len(option)
        if count <= limit:
            picks: Iterator[tuple[int, ...]] = itertools.product(*options)
        else:
            rng = random.Random(seed)
            sample = [tuple(rng.choice(option) for option in options) for _ in range(limit - 2)]
            picks = iter([(0,) * len(options), tuple(min(1, len(option) - 1) for option in options), *sample])
        for pick in picks:
            kept = dict(zip(changes, pick, strict=False))
            found = {id(file): number for file, number in zip(files, pick[len(changes) :], strict=True)}
            yield FakeFileSystem(
                _rebuilt(
                    self.root,
                    lambda change, kept=kept: bool(kept[id(change)]),
                    lambda file, found=found: file.survivors()[found[id(file)]],
                    durable=True,
                )
            )

    def _node(self, path: Path) -> File | Directory:
        node: File | Directory = self.root
        for part in path.parts[1:]:
            if not isinstance(node, Directory):
                raise _error(errno.ENOTDIR, path)
            if part not in node.entries:
                raise _error(errno.ENOENT, path)
            node = node.entries[part]
        return node

    def _directory(self, path: Path) -> Directory:
        node = self._node(path)
        if not isinstance(node, Directory):
            raise _error(errno.ENOTDIR, path)
        return node


class _Operation:
    """Counts one operation, and makes it fail when its turn has come."""

    def __init__(self, fs: FakeFileSystem, name: str, target: Path | int):
        self._fs, self._name, self._target = fs, name, target
        self.kind = ""

    def __enter__(self) -> _Operation:
        fault, number = self._fs.fault, len(self._fs.log)
        self._fs.log.append(self._name)
        if fault and (number == fault.at or (number > fault.at and (fault.sticky or fault.kind == "CRASH"))):
            self.kind = fault.kind
        if self.kind == "CRASH":
            raise Crash
        if self.kind and self.kind not in ("LATE", "SHORT", "LYING"):
            raise _error(getattr(errno, self.kind), self._target)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.kind == "LATE" and error is None:
            raise _error(errno.EIO, self._target)


def _error(number: int, target: Path | int) -> OSError:
    return OSError(number, os.strerror(number), str(target))


def _unsynced(directory: Directory, seen: set[int]) -> Iterator[tuple[Directory, list[File]]]:
    """Every directory that may exist after a crash, with the files in it, each once."""
    if id(directory) in seen:
        return
    seen.add(id(directory))
    pending = [node for change in directory.pending for _, node in change if node is not None]
    nodes = list({id(node): node for node in [*directory.durable.values(), *pending]}.values())
    yield directory, [node for node in nodes if isinstance(node, File)]
    for node in nodes:
        if isinstance(node, Directory):
            yield from _unsynced(node, seen)


def _rebuilt(directory: Directory, keeps, content, durable: bool = False) -> Directory:
    names = dict(directory.durable) if durable else dict(directory.entries)
    if durable:
        for change in directory.pending:
            if keeps(change):
                _apply(names, change)
    nodes: dict[str, File | Directory] = {}
    for name, node in names.items():
        if isinstance(node, Directory):
            nodes[name] = _rebuilt(node, keeps, content, durable)
        else:
            nodes[name] = File(content(node), content(node))
    return Directory(nodes, dict(nodes))


@contextlib.contextmanager
def file_size_limit(size):
    """The kernel refuses to let a file of this process grow beyond `size` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
