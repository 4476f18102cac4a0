"""A save that is stopped or failed at any file operation loses nothing: the state found is the old or the new one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_filesystem import Crash, FakeFileSystem, Fault, outcome

from tapedist.errors import StateError, StorageError
from tapedist.storage.checkpoints import CheckpointStore

RUN = Path("/run")
NEW = 40  # The step of the save under test.
# Steps of the saves before it; the third save is the first that prunes, the fourth prunes what no store has verified.
SCENARIOS = {"first": (), "second": (10,), "third, prunes": (10, 20), "fourth, prunes": (10, 20, 30)}
LEFTOVERS = ("tmp-00000001-step-5", "removed-00000001-step-5")


def arrays(step: int) -> dict[str, np.ndarray]:
    return {"parameters": np.arange(3.0) + step / 7, "step": np.int64(step)}


def store(fs: FakeFileSystem) -> tuple[CheckpointStore, list[str]]:
    warned: list[str] = []
    return CheckpointStore(directory=RUN / "checkpoints", fs=fs, warn=warned.append), warned


def save(fs: FakeFileSystem, step: int) -> None:
    store(fs)[0].save(arrays(step), step=step, meta={"fingerprint": f"of {step}"})


def loaded_step(fs: FakeFileSystem, *, quietly: bool = False) -> int | None:
    """The step of what is loaded, after holding all of it against what was saved at that step."""
    reader, warned = store(fs)
    checkpoint = reader.load()
    assert not (quietly and warned), warned
    if checkpoint is None:
        return None
    expected = arrays(checkpoint.step)
    assert checkpoint.arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint.arrays[name], array, strict=True)
    assert checkpoint.meta == {"fingerprint": f"of {checkpoint.step}"}
    return checkpoint.step


def prepared(steps: tuple[int, ...], leftovers: bool = False) -> FakeFileSystem:
    fs = FakeFileSystem()
    fs.mkdir(RUN)
    fs.sync_directory(Path("/"))
    for step in steps:
        save(fs, step)
    if leftovers and steps:
        for name in LEFTOVERS:
            fs.mkdir(RUN / "checkpoints" / name)
            fs.put(RUN / "checkpoints" / name / "state.npz", b"half")
    return fs.copy()


def operations(fs: FakeFileSystem) -> list[str]:
    """The operations of one undisturbed save of step `NEW`."""
    trial = fs.copy()
    save(trial, NEW)
    return trial.log


def assert_recovers(fs: FakeFileSystem, step: int = NEW + 10) -> None:
    """The next save works, survives a crash at once, and leaves only checkpoints behind."""
    save(fs, step)
    assert loaded_step(fs) == step
    names = fs.listdir(RUN / "checkpoints")
    assert not [name for name in names if not name[0].isdigit()]
    assert len(names) <= 3, "two sound ones, and at most one damaged between them"
    assert loaded_step(next(fs.crashes(seed=0))) == step


@pytest.mark.parametrize("leftovers", [False, True], ids=["clean", "leftovers"])
@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_a_crash_at_any_operation_leaves_the_old_or_the_new_state(steps: tuple[int, ...], leftovers: bool) -> None:
    start = prepared(steps, leftovers)
    log = operations(start)
    old = steps[-1] if steps else None
    cases, outcomes = 0, set()
    for at in range(len(log) + 1):
        fs = start.copy()
        fs.inject(Fault(at, "CRASH"))
        if at < len(log):
            with pytest.raises(Crash):
                save(fs, NEW)
        else:
            save(fs, NEW)
        for found in fs.crashes(seed=at):
            step = loaded_step(found, quietly=True)  # No crash leaves a damaged checkpoint where one is looked for.
            assert step in (old, NEW), f"crash before operation {at} ({log[at - 1 :][:2]})"
            if at == len(log):
                assert step == NEW, "save() had returned"
            assert_recovers(found)
            outcomes.add(step)
            cases += 1
    assert outcomes == {old, NEW}
    assert cases >= 90


@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_a_killed_process_and_then_a_crash_of_the_next_one(steps: tuple[int, ...]) -> None:
    """What a killed process left unsynced may still vanish under its successor, which must not rely on it."""
    start = prepared(steps)
    old = steps[-1] if steps else None
    cases = 0
    for first in range(len(operations(start))):
        fs = start.copy()
        fs.inject(Fault(first, "CRASH"))
        with pytest.raises(Crash):
            save(fs, NEW)
        fs.inject(None)
        killed = loaded_step(fs)
        assert killed in (old, NEW)
        save(fs, NEW + 1)
        for found in fs.crashes(seed=first, limit=8):
            assert loaded_step(found, quietly=True) == NEW + 1, "the second save() had returned"
            cases += 1
    assert cases >= len(operations(start))


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "EACCES", "LATE", "SHORT", "LYING"])
@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_a_fault_at_any_operation_is_reported_and_loses_nothing(
    steps: tuple[int, ...], kind: str, sticky: bool
) -> None:
    start = prepared(steps, leftovers=True)
    log = operations(start)
    old = steps[-1] if steps else None
    failures = 0
    for at in range(len(log)):
        fs = start.copy()
        writer, warned = store(fs)
        fs.inject(Fault(at, kind, sticky))
        where = f"{kind} at operation {at} ({log[at]})"
        error = outcome(writer.save, arrays(NEW), step=NEW, meta={"fingerprint": f"of {NEW}"})
        saved = error is None
        if not saved:
            failures += 1
            assert error.exit_code == 6, where
            assert str(error).isprintable(), where
            assert "/run/checkpoints" in str(error), where
        fs.inject(None)
        assert fs.open_files == 0, where
        step = loaded_step(fs)
        assert step == NEW if saved else step in (old, NEW), where
        for found in fs.crashes(seed=at, limit=4):
            assert loaded_step(found) == NEW if saved else loaded_step(found) in (old, NEW), where
        if saved and kind not in ("SHORT", "LYING") and (kind, log[at]) != ("LATE", "mkdir"):
            assert warned, f"{where}: neither failed nor said"
        if not saved and not sticky and step == old and "unlink" not in log[at]:
            names = fs.listdir(RUN / "checkpoints") if steps else []
            assert not [name for name in names if name.startswith("tmp-0000000" + str(len(steps) + 1))], where
        # The same process may try again: nothing it remembers of the failed attempt is in its way.
        writer.save(arrays(NEW + 1), step=NEW + 1, meta={"fingerprint": f"of {NEW + 1}"})
        assert loaded_step(fs) == NEW + 1, where
        assert [name for name in fs.listdir(RUN / "checkpoints") if not name[0].isdigit()] == [], where
    assert len(log) >= 18
    assert (failures == 0) == (kind == "SHORT" and not sticky)  # What is left over is written next.


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize("kind", ["EIO", "EACCES"])
def test_a_fault_while_loading_never_looks_like_a_fresh_start(kind: str, sticky: bool) -> None:
    fs = prepared((10, 20))
    log = fs.log
    loaded_step(fs)
    refused = 0
    for at in range(len(log)):
        fs.inject(Fault(at, kind, sticky))
        reader, warned = store(fs)
        try:
            checkpoint = reader.load()
        except StateError:
            refused += 1
        else:
            assert checkpoint is not None
            assert (checkpoint.step == 20) == (not warned)
    assert refused == (len(log) if sticky else 1)  # A list of names that cannot be read is refused even once.


def test_a_disk_that_never_works_is_reported_and_holds_nothing() -> None:
    for kind in ("EIO", "ENOSPC", "EACCES", "EROFS", "EDQUOT", "EFBIG"):
        fs = prepared(())
        fs.inject(Fault(0, kind, sticky=True))
        with pytest.raises(
            StorageError, match=r"cannot save a checkpoint in '/run/checkpoints': .*; .* and start again"
        ):
            save(fs, NEW)
        fs.inject(None)
        assert loaded_step(fs) is None


def test_what_cannot_be_removed_is_said_once_by_each_process() -> None:
    fs = prepared((10, 20, 30))
    writer, warned = store(fs)
    fs.put(RUN / "checkpoints" / "00000002-step-20" / "notes", b"")
    for step in (40, 50, 60):
        writer.save(arrays(step), step=step, meta={"fingerprint": f"of {step}"})
    assert len(warned) == 1
    assert "00000002-step-20" in warned[0]
    assert "did not write" in warned[0]
    assert fs.read(RUN / "checkpoints" / "00000002-step-20" / "notes") == b""
    assert loaded_step(fs) == 60


def test_the_fake_forgets_what_was_not_synced() -> None:
    """The double itself: without it, every test above would pass for any order of operations."""
    fs = FakeFileSystem()
    fd = fs.create(Path("/a"))
    fs.write(fd, memoryview(b"12"))
    found = [crashed.root.entries for crashed in fs.crashes(seed=0)]
    assert {entries["a"].data if "a" in entries else None for entries in found} == {None, b"", b"1", b"12", b"\x002"}
    fs.sync(fd)
    fs.sync_directory(Path("/"))
    fs.rename(Path("/a"), Path("/b"))
    found = [crashed.root.entries for crashed in fs.crashes(seed=0)]
    assert sorted((name, file.data) for entries in found for name, file in entries.items()) == [
        ("a", b"12"),
        ("b", b"12"),
    ]
