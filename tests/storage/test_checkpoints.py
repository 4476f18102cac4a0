"""What is loaded is what was saved, on a real disk as in memory, whatever ends the process or the space."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoint_samples import DIRECTORY, NEW, OLD, arrays, assert_is, load, two_saved
from fake_filesystem import FakeFileSystem

from tapedist.errors import InputError, StateError, StorageError
from tapedist.storage.checkpoint_format import pack_arrays
from tapedist.storage.checkpoints import CheckpointStore


@pytest.fixture
def warned() -> list[str]:
    return []


@pytest.fixture
def fs() -> FakeFileSystem:
    return two_saved()


def test_what_was_saved_is_loaded(tmp_path: Path, warned: list[str]) -> None:
    store = CheckpointStore(directory=tmp_path / "checkpoints", warn=warned.append)
    assert store.load() is None
    meta = {"fingerprint": "f" * 64, "shapes": {"parameters": [9]}, "learning_rate": 0.1, "name": "ü\n", "none": None}
    path = store.save(arrays(7), step=7, meta=meta)
    checkpoint = CheckpointStore(directory=tmp_path / "checkpoints", warn=warned.append).load()
    assert_is(checkpoint, 7)
    assert checkpoint is not None
    assert checkpoint.meta == meta
    assert checkpoint.path == path
    checkpoint.arrays["parameters"][0] = 1.0  # Writable: it is the caller's own copy.
    assert not warned


def test_numpy_alone_reads_it_and_the_manifest_names_its_bytes(tmp_path: Path) -> None:
    path = CheckpointStore(directory=tmp_path / "c").save(arrays(7), step=7, meta={"k": 1})
    with np.load(path / "state.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["slots"], arrays(7)["slots"], strict=True)
    manifest = json.loads((path / "manifest.json").read_text())
    state = (path / "state.npz").read_bytes()
    assert (manifest["schema"], manifest["serial"], manifest["step"], manifest["meta"]) == (2, 1, 7, {"k": 1})
    assert manifest["files"] == {"state.npz": {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}}


def test_the_bytes_depend_on_the_values_only() -> None:
    state = arrays(7)
    packed = pack_arrays(state)
    assert pack_arrays(dict(reversed(state.items()))) == packed
    assert pack_arrays({**state, "slots": np.asfortranarray(state["slots"])}) == packed
    assert pack_arrays({**state, "slots": state["slots"].astype(">f8")}) == packed
    assert pack_arrays({**state, "slots": state["slots"][:, ::-1]}) != packed


def test_saving_a_step_again_keeps_both_and_loads_the_later(fs: FakeFileSystem, warned: list[str]) -> None:
    store = CheckpointStore(directory=DIRECTORY, fs=fs)
    store.save(arrays(20), step=20, meta={"again": True})
    checkpoint = load(fs, warned)
    assert_is(checkpoint, 20)
    assert checkpoint is not None
    assert checkpoint.meta == {"again": True}
    assert set(fs.listdir(DIRECTORY)) == {NEW, "00000003-step-20"}


@pytest.mark.parametrize("keep", [2, 3, 5])
def test_the_newest_are_kept(keep: int) -> None:
    fs = FakeFileSystem()
    fs.mkdir(DIRECTORY.parent)
    store = CheckpointStore(directory=DIRECTORY, keep=keep, fs=fs)
    for step in range(8):
        store.save({}, step=step, meta={})
        assert sorted(int(name.split("-")[-1]) for name in fs.listdir(DIRECTORY)) == [*range(step + 1)][-keep:]


def test_a_damaged_checkpoint_does_not_count_as_kept(fs: FakeFileSystem, warned: list[str]) -> None:
    fs.put(DIRECTORY / NEW / "state.npz", b"")
    store = CheckpointStore(directory=DIRECTORY, fs=fs, warn=warned.append)
    assert store.load().step == 10
    store.save(arrays(15), step=15, meta={})
    assert set(fs.listdir(DIRECTORY)) == {OLD, NEW, "00000003-step-15"}
    assert_is(load(fs, []), 15)  # The newest save, though a later step lies there.
    store.save(arrays(18), step=18, meta={})
    assert set(fs.listdir(DIRECTORY)) == {"00000003-step-15", "00000004-step-18"}
    assert len(warned) == 1


def test_what_cannot_be_stored_touches_nothing(fs: FakeFileSystem) -> None:
    store = CheckpointStore(directory=DIRECTORY, fs=fs)
    fs.inject(None)
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        store.save({"x": np.array([None])}, step=1, meta={})
    with pytest.raises(ValueError, match="JSON"):
        store.save({}, step=1, meta={"x": float("nan")})
    with pytest.raises(TypeError, match="JSON"):
        store.save({}, step=1, meta={"x": b""})
    assert fs.log == []


def test_fewer_than_two_are_refused() -> None:
    with pytest.raises(InputError, match="keep=1: must be at least 2"):
        CheckpointStore(directory=DIRECTORY, keep=1)


_SAVER = """
import sys, itertools
import numpy as np
from pathlib import Path
from tapedist.storage.checkpoints import CheckpointStore
store = CheckpointStore(directory=Path(sys.argv[1]))
found = store.load()
for step in itertools.count(found.step + 1 if found else 1):
    store.save({"parameters": np.full(20_000, float(step)), "step": np.int64(step)}, step=step, meta={"step": step})
    print(step, flush=True)
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(command, text=True, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_sigkill_at_random_moments_of_a_process_that_saves(tmp_path: Path, warned: list[str]) -> None:
    rng, claimed = random.Random(0), 0
    for _ in range(6):
        with python(_SAVER, tmp_path / "checkpoints") as process:
            assert process.stdout is not None
            for _ in range(rng.randint(1, 8)):
                claimed = int(process.stdout.readline())
            time.sleep(rng.random() * 0.02)  # Into the middle of a save.
            process.kill()
            claimed = max([claimed, *map(int, process.stdout.read().split())])
        checkpoint = CheckpointStore(directory=tmp_path / "checkpoints", warn=warned.append).load()
        assert checkpoint is not None
        assert checkpoint.step >= claimed
        assert checkpoint.meta == {"step": checkpoint.step}
        assert checkpoint.arrays["step"] == checkpoint.step
        assert (checkpoint.arrays["parameters"] == checkpoint.step).all()
    assert not warned


def test_a_file_size_limit_is_exit_6_and_the_previous_checkpoint_stays(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    CheckpointStore(directory=directory).save({"x": np.zeros(10)}, step=1, meta={})
    code = """
import resource, sys
import numpy as np
from pathlib import Path
from tapedist.errors import StorageError
from tapedist.storage.checkpoints import CheckpointStore
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    CheckpointStore(directory=Path(sys.argv[1])).save({"x": np.zeros(100_000)}, step=2, meta={})
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    with python(code, directory) as process:
        output, errors = process.communicate()
    assert (process.returncode, errors) == (6, "")
    assert "File too large; raise the file-size limit (ulimit -f) and start again" in output
    assert os.listdir(directory) == ["00000001-step-1"]
    store = CheckpointStore(directory=directory)
    assert store.load().step == 1
    store.save({"x": np.zeros(100_000)}, step=2, meta={})
    assert store.load().step == 2


def test_a_full_disk_is_exit_6_and_the_previous_checkpoint_stays(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {mounted.stderr.strip()}")
    try:
        store = CheckpointStore(directory=disk / "checkpoints")
        store.save({"x": np.zeros(10_000)}, step=1, meta={})
        (disk / "filler").write_bytes(bytes(850 * 1024))
        with pytest.raises(StorageError, match="No space left on device; free some space and start again"):
            store.save({"x": np.zeros(20_000)}, step=2, meta={})
        assert os.listdir(disk / "checkpoints") == ["00000001-step-1"]
        assert store.load().step == 1
        (disk / "filler").unlink()
        store.save({"x": np.zeros(20_000)}, step=2, meta={})
        assert store.load().step == 2
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_in_place_of_the_folder_is_exit_6_and_exit_3(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        CheckpointStore(directory=tmp_path / "checkpoints").save({}, step=1, meta={})
    with pytest.raises(StateError, match="cannot be listed"):
        CheckpointStore(directory=tmp_path / "checkpoints").load()


def test_nothing_is_removed_through_a_link(tmp_path: Path, warned: list[str]) -> None:
    store = CheckpointStore(directory=tmp_path / "checkpoints", warn=warned.append)
    path = store.save({}, step=1, meta={})
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    for step in (2, 3, 4):
        store.save({}, step=step, meta={})
    assert sorted(os.listdir(elsewhere)) == ["manifest.json", "state.npz"]
    assert len(warned) == 1
    assert "cannot be removed" in warned[0]
    assert store.load().step == 4


def test_no_tensorflow_is_needed() -> None:
    code = (
        "import sys, tapedist.storage.checkpoints, tapedist.storage.run_folder; sys.exit('tensorflow' in sys.modules)"
    )
    with python(code) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors


def test_an_interrupt_at_any_moment_leaves_a_state_that_loads(tmp_path: Path) -> None:
    """A signal that ends the process in Python's own way leaves what `load` accepts, too."""
    with python(_SAVER, tmp_path / "checkpoints") as process:
        assert process.stdout is not None
        claimed = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        claimed = max([claimed, *map(int, process.stdout.read().split())])
    checkpoint = CheckpointStore(directory=tmp_path / "checkpoints").load()
    assert checkpoint is not None
    assert checkpoint.step >= claimed
