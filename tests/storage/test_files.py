"""Small files are replaced whole, and the real file system does what the fake one promises."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from fake_filesystem import FakeFileSystem, Fault, outcome

from tapedist.errors import StorageError
from tapedist.storage.files import POSIX, write_atomic


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    for text in ("old", "ü" * 100_000, ""):
        write_atomic(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["done.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("kind", ["CRASH", "EIO", "ENOSPC", "EACCES", "LATE", "SHORT"])
@pytest.mark.parametrize("old", [None, b"old"], ids=["first", "again"])
def test_a_small_file_is_old_or_new_after_any_fault(old: bytes | None, kind: str) -> None:
    path = Path("/run/done.json")
    start = FakeFileSystem()
    start.mkdir(path.parent)
    if old is not None:
        start.put(path, old)
    trial = start.copy()
    write_atomic(path, "new", trial)
    for at in range(len(trial.log)):
        fs = start.copy()
        fs.inject(Fault(at, kind))
        error = outcome(write_atomic, path, "new", fs)
        if isinstance(error, StorageError):
            assert "cannot write '/run/done.json'" in str(error)
        undone = (kind, trial.log[at]) == ("LATE", "unlink")  # There was nothing to remove.
        assert (error is None) == (kind == "SHORT" or undone)
        fs.inject(None)
        for found in [fs, *fs.crashes(seed=at)]:
            names = found.listdir(path.parent)
            content = found.read(path) if path.name in names else None
            assert content == b"new" if error is None else content in (old, b"new"), (kind, trial.log[at])


def test_a_small_file_without_a_folder_is_exit_6(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write '.*done.json': No such file or directory; .* start again"):
        write_atomic(tmp_path / "missing" / "done.json", "{}")


def test_the_real_file_system_follows_no_link_when_it_lists(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert POSIX.listdir(tmp_path) == ["link"]
    with pytest.raises(NotADirectoryError):
        POSIX.listdir(tmp_path / "link")
