"""Checkpoints that survive a crash at any moment: saved whole or not at all, and verified before use.

A checkpoint is a directory `NNNNNNNN-step-S` (`NNNNNNNN` counts saves, `S` is the step) with two files:

* `state.npz`: plain arrays, readable with `numpy.load` alone;
* `manifest.json`: schema, save number, step, the caller's `meta`, size and SHA-256 of `state.npz`, and its own SHA-256.

A save writes both into `tmp-...`, syncs them, and makes them appear by one rename. Saves are ordered by their number,
not by their step: after falling back over a damaged checkpoint the next save is the newest, whatever its step.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tapedist.errors import InputError, StateError, StorageError
from tapedist.storage.checkpoint_format import (
    MANIFEST,
    STATE,
    NewerSchema,
    OlderSchema,
    Rejected,
    check_state,
    decode_manifest,
    encode_manifest,
    pack_arrays,
    unpack_arrays,
)
from tapedist.storage.files import POSIX, FileSystem, storage_error, write_synced

_logger = logging.getLogger("tapedist")

# Ours in the directory: a save being written, a checkpoint being removed, a checkpoint.
_OURS = re.compile(r"(tmp-|removed-)?[0-9]{8,18}-step-[0-9]+")


class OlderCheckpoint(StateError):
    """The newest sound checkpoint is of version 0.1, and cannot be continued."""


class Checkpoint(NamedTuple):
    """A stored state that passed every check.

    Attributes:
        arrays: the saved arrays by name, little-endian, writable.
        step: updates done when it was saved.
        meta: the caller's content, as JSON returns it (tuples are lists).
        path: its directory.
    """

    arrays: dict[str, np.ndarray]
    step: int
    meta: dict[str, Any]
    path: Path


class CheckpointStore:
    """The checkpoints of one run.

    One store at a time may write to a directory, which the lock of the run folder ensures.
    """

    def __init__(
        self,
        *,
        directory: Path,
        keep: int = 2,
        fs: FileSystem = POSIX,
        warn: Callable[[str], None] = _logger.warning,
    ):
        """Does not touch the disk.

        Args:
            directory: where the checkpoints lie; made by the first save, its parent must exist.
            keep: how many sound checkpoints a save leaves behind, itself included.
            fs: file operations.
            warn: receives each rejected checkpoint and each leftover that cannot be removed, one line once.

        Raises:
            InputError: if `keep` is below 2.
        """
        if keep < 2:
            raise InputError(f"keep={keep}: must be at least 2, so that a damaged checkpoint has one to fall back on")
        self._directory, self._keep, self._fs, self._warn = directory, keep, fs, warn
        self._anchored = False
        self._sound: set[str] = set()
        self._logged: set[str] = set()

    def save(self, arrays: Mapping[str, np.ndarray], *, step: int, meta: Mapping[str, Any]) -> Path:
        """Saves a state; on return it is on the disk, verified, and the one that `load` returns.

        Args:
            arrays: by name; no object arrays.
            step: updates done, at least 0. The same step may be saved again.
            meta: anything that JSON holds: fingerprints, versions, shapes.

        Returns:
            The checkpoint's directory.

        Raises:
            StorageError: if it cannot be written; the checkpoints before it are kept, and a later save may succeed.
            ValueError, TypeError: if `arrays` or `meta` cannot be stored; nothing was touched.
        """
        step = operator.index(step)
        assert step >= 0
        state = pack_arrays(arrays)
        encode_manifest(serial=0, step=step, state=state, meta=meta)  # Raises before anything is touched.
        try:
            # Leftovers go before the new save, so that a full disk has room for it; old checkpoints go after it.
            self._open_directory()
            names = self._names()
            self._discard(name for name in names if not _is_committed(name))
            # Above unfinished and removed ones, too, whose removal a crash may undo.
            serial = 1 + max(map(_serial, names), default=0)
            manifest = encode_manifest(serial=serial, step=step, state=state, meta=meta)
            name = _name(serial, step)
            self._commit(name, state, manifest)
        except OSError as error:
            raise storage_error("save a checkpoint in", self._directory, error) from error
        self._verify(name)
        self._prune()
        return self._directory / name

    def load(self) -> Checkpoint | None:
        """Reads the newest sound checkpoint; returns None if none was ever saved.

        Raises:
            OlderCheckpoint: if the newest sound one is of an earlier schema.
            StateError: if checkpoints are there and none is sound, or the newest sound one is of a later schema.
        """
        try:
            names = self._names()
        except OSError as error:
            raise StateError(
                f"checkpoints in {str(self._directory)!r}: cannot be listed ({error.strerror or error}); "
                "make the folder readable and start again"
            ) from error
        for name in filter(_is_committed, reversed(names)):
            shown = f"checkpoint {str(self._directory / name)!r}"
            try:
                return self._read(name)
            except NewerSchema as reason:
                raise StateError(f"{shown}: {reason}; continue with the version that wrote it") from None
            except OlderSchema as reason:
                raise OlderCheckpoint(f"{shown}: {reason}") from None
            except Rejected as reason:
                self._log(f"{shown} is not used: {reason}")
        # Damaged checkpoints are no reason to begin again from step 0; a save that never ended is.
        if any(not name.startswith("tmp-") for name in names):
            raise StateError(
                f"checkpoints in {str(self._directory)!r}: there are some, and none can be trusted; "
                "restore the folder from a copy, or train into another --run_dir"
            )
        return None

    def load_all(self) -> list[Checkpoint]:
        """Reads all checkpoints in the order of their saves; nothing is touched.

        Raises:
            StateError: if they cannot be listed, or one of them is damaged.
        """
        found = []
        try:
            for name in filter(_is_committed, self._names()):
                found.append(self._read(name))
        except OSError as error:
            raise StateError(f"checkpoints in {str(self._directory)!r}: cannot be listed ({error})") from error
        except Rejected as reason:
            raise StateError(f"checkpoint {str(self._directory / name)!r} cannot be trusted: {reason}") from None
        return found

    def _open_directory(self) -> None:
        with contextlib.suppress(FileExistsError):
            self._fs.mkdir(self._directory)
        if not self._anchored:
            # Even if it existed: the process that made it may have died before it synced the name.
            self._fs.sync_directory(self._directory.parent)
            self._anchored = True

    def _names(self) -> list[str]:
        """Names in the directory that a store makes, in the order of their saves."""
        try:
            names = self._fs.listdir(self._directory)
        except FileNotFoundError:
            return []
        return sorted(filter(_OURS.fullmatch, names), key=_serial)

    def _commit(self, name: str, state: bytes, manifest: bytes) -> None:
        temporary = self._directory / f"tmp-{name}"
        # Content, then the names of the files, then the rename, then its own name: each is durable before the next
        # begins, so that a crash at any point leaves the old set of checkpoints or the new one.
        try:
            self._fs.mkdir(temporary)
            write_synced(self._fs, temporary / STATE, state)
            write_synced(self._fs, temporary / MANIFEST, manifest)
            self._fs.sync_directory(temporary)
            self._fs.rename(temporary, self._directory / name)
        except OSError:
            with contextlib.suppress(OSError):
                self._remove(temporary.name)
            raise
        self._fs.sync_directory(self._directory)

    def _verify(self, name: str) -> None:
        """Reads back what was committed, and withdraws it if it is damaged."""
        # A disk may report a write as done and hold other bytes: better found now than by the resume.
        try:
            self._read(name)
        except Rejected as reason:
            with contextlib.suppress(OSError):
                # To "tmp-", not to "removed-", which `load` takes for a checkpoint that was there once.
                self._fs.rename(self._directory / name, self._directory / f"tmp-{name}")
                self._fs.sync_directory(self._directory)
                self._remove(f"tmp-{name}")
            raise StorageError(
                f"checkpoint {str(self._directory / name)!r}: is not on the disk as it was written ({reason}); "
                "check the disk and start again"
            ) from None

    def _prune(self) -> None:
        """Removes what is older than the newest `keep` sound checkpoints.

        Damaged ones do not count, and stay until they are older than that. The save is complete by now, so that no
        error here fails it.
        """
        try:
            names = list(filter(_is_committed, self._names()))
        except OSError as error:
            self._log(f"old checkpoints in {str(self._directory)!r} cannot be listed: {error.strerror or error}")
            return
        sound = 0
        for position in reversed(range(len(names))):
            sound += self._is_sound(names[position])
            if sound == self._keep:
                self._discard(names[:position])
                return

    def _is_sound(self, name: str) -> bool:
        if name not in self._sound:
            try:
                self._read(name)
            except Rejected as reason:
                self._log(f"checkpoint {str(self._directory / name)!r} is not used: {reason}")
        return name in self._sound

    def _discard(self, names: Iterable[str]) -> None:
        """Removes directories; failures are reported, and tried again by the next save."""
        for name in names:
            try:
                self._remove(name)
            except OSError as error:
                self._log(f"{str(self._directory / name)!r} cannot be removed: {error.strerror or error}")

    def _remove(self, name: str) -> None:
        path = self._directory / name
        files = self._fs.listdir(path)
        # Checked before anything is removed: a file of the user's is never deleted, nor half of its checkpoint.
        if not {MANIFEST, STATE}.issuperset(files):
            raise OSError(errno.ENOTEMPTY, "it holds files that tapedist did not write")
        if _is_committed(name):
            path = self._directory / f"removed-{name}"
            self._fs.rename(self._directory / name, path)
        # The manifest first: if a crash undoes the rename, what is left is rejected rather than read as sound.
        for file in sorted(files, key=lambda file: file != MANIFEST):
            self._fs.unlink(path / file)
        self._fs.rmdir(path)

    def _read(self, name: str) -> Checkpoint:
        path = self._directory / name
        manifest = decode_manifest(self._content(path / MANIFEST))
        if name != _name(manifest["serial"], manifest["step"]):
            # A directory that was renamed or copied by hand: its place in the order of saves is unknown.
            raise Rejected(f"its {MANIFEST} is of save {manifest['serial']}, step {manifest['step']}")
        state = self._content(path / STATE)
        check_state(state, manifest)
        checkpoint = Checkpoint(unpack_arrays(state), manifest["step"], manifest["meta"], path)
        self._sound.add(name)
        return checkpoint

    def _log(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            self._warn(message)

    def _content(self, path: Path) -> bytes:
        try:
            return self._fs.read(path)
        except OSError as error:
            raise Rejected(f"{path.name} cannot be read ({error.strerror or error})") from None


def _name(serial: int, step: int) -> str:
    return f"{serial:08d}-step-{step}"


def _serial(name: str) -> int:
    return int(name.split("-")[-3])


def _is_committed(name: str) -> bool:
    return name[0].isdigit()
