"""What is loaded is what was saved, or an older save: damage is noticed, said, and never believed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_filesystem import FakeFileSystem, File

from tapedist.errors import InputError, StateError, StorageError
from tapedist.training.checkpoint_format import decode_manifest, encode_manifest, pack_arrays
from tapedist.training.checkpoints import Checkpoint, CheckpointStore

DIRECTORY = Path("/run/checkpoints")
OLD, NEW = "00000001-step-10", "00000002-step-20"


def arrays(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "parameters": rng.normal(size=9),
        "slots": rng.normal(size=(2, 9)),
        "step": np.int64(step),
        "dtype32": np.float32([step]),
        "empty": np.zeros((0, 3)),
    }


def assert_is(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None and checkpoint.step == step
    expected = arrays(step)
    assert checkpoint.arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint.arrays[name], np.asarray(array), strict=True)


@pytest.fixture
def warned() -> list[str]:
    return []


@pytest.fixture
def fs() -> FakeFileSystem:
    """A file system with the checkpoints `OLD` and `NEW`."""
    fs = FakeFileSystem()
    fs.mkdir(DIRECTORY.parent)
    for step in (10, 20):
        CheckpointStore(directory=DIRECTORY, fs=fs).save(arrays(step), step=step, meta={"n": step})
    assert set(fs.listdir(DIRECTORY)) == {OLD, NEW}
    return fs


def load(fs: FakeFileSystem, warned: list[str]) -> Checkpoint | None:
    return CheckpointStore(directory=DIRECTORY, fs=fs, warn=warned.append).load()


def assert_falls_back(fs: FakeFileSystem, what: object) -> str:
    """The old checkpoint is loaded, with one warning, which is returned."""
    warned: list[str] = []
    checkpoint = load(fs, warned)
    assert checkpoint is not None and checkpoint.step == 10, what
    assert len(warned) == 1 and NEW in warned[0] and "\n" not in warned[0], what
    return warned[0]


# Round trips.


def test_what_was_saved_is_loaded(tmp_path: Path, warned: list[str]) -> None:
    store = CheckpointStore(directory=tmp_path / "checkpoints", warn=warned.append)
    assert store.load() is None
    meta = {"fingerprint": "f" * 64, "shapes": {"parameters": [9]}, "learning_rate": 0.1, "name": "ü\n", "none": None}
    path = store.save(arrays(7), step=7, meta=meta)
    checkpoint = CheckpointStore(directory=tmp_path / "checkpoints", warn=warned.append).load()
    assert_is(checkpoint, 7)
    assert checkpoint is not None and checkpoint.meta == meta and checkpoint.path == path
    checkpoint.arrays["parameters"][0] = 1.0  # Writable: it is the caller's own copy.
    assert not warned


def test_numpy_alone_reads_it_and_the_manifest_names_its_bytes(tmp_path: Path) -> None:
    path = CheckpointStore(directory=tmp_path / "c").save(arrays(7), step=7, meta={"k": 1})
    with np.load(path / "state.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["slots"], arrays(7)["slots"], strict=True)
    manifest = json.loads((path / "manifest.json").read_text())
    state = (path / "state.npz").read_bytes()
    assert (manifest["schema"], manifest["serial"], manifest["step"], manifest["meta"]) == (1, 1, 7, {"k": 1})
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
    assert checkpoint is not None and checkpoint.meta == {"again": True}
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


# Damage.


def test_every_bit_of_the_manifest_matters(fs: FakeFileSystem) -> None:
    path = DIRECTORY / NEW / "manifest.json"
    sound = fs.read(path)
    for position in range(len(sound)):
        for bit in range(8):
            damaged = bytearray(sound)
            damaged[position] ^= 1 << bit
            fs.put(path, bytes(damaged))
            assert_falls_back(fs, (position, bit))
    assert len(sound) * 8 >= 2_000


@pytest.mark.parametrize("chunk", range(8))
def test_any_flipped_bit_of_the_state_is_noticed(fs: FakeFileSystem, chunk: int) -> None:
    path = DIRECTORY / NEW / "state.npz"
    sound = fs.read(path)
    for position in random.Random(chunk).sample(range(8 * len(sound)), 250):
        damaged = bytearray(sound)
        damaged[position // 8] ^= 1 << position % 8
        fs.put(path, bytes(damaged))
        assert_falls_back(fs, position)


@pytest.mark.parametrize("file", ["state.npz", "manifest.json"])
def test_any_other_length_is_noticed(fs: FakeFileSystem, file: str) -> None:
    sound = fs.read(DIRECTORY / NEW / file)
    for length in range(len(sound)):
        fs.put(DIRECTORY / NEW / file, sound[:length])
        assert_falls_back(fs, length)
    for extra in (b"\0", b"\n", b" ", sound):
        fs.put(DIRECTORY / NEW / file, sound + extra)
        assert_falls_back(fs, extra)


@pytest.mark.parametrize("file", ["state.npz", "manifest.json"])
def test_a_file_of_another_checkpoint_is_noticed(fs: FakeFileSystem, file: str, warned: list[str]) -> None:
    old, new = fs.read(DIRECTORY / OLD / file), fs.read(DIRECTORY / NEW / file)
    fs.put(DIRECTORY / NEW / file, old)
    assert_falls_back(fs, file)
    fs.put(DIRECTORY / OLD / file, new)
    with pytest.raises(StateError, match="none can be trusted"):
        load(fs, warned)
    assert len(warned) == 2


def test_two_checkpoints_that_changed_names_are_noticed(fs: FakeFileSystem, warned: list[str]) -> None:
    entries = fs.root.entries["run"].entries["checkpoints"].entries
    entries[OLD], entries[NEW] = entries[NEW], entries[OLD]
    with pytest.raises(StateError, match="none can be trusted"):
        load(fs, warned)
    assert "is of save 1, step 10" in warned[0]


@pytest.mark.parametrize("files", [(), ("state.npz",), ("manifest.json",)], ids=["empty", "state", "manifest"])
def test_a_half_written_directory_is_noticed(fs: FakeFileSystem, files: tuple[str, ...]) -> None:
    for file in {"state.npz", "manifest.json"} - set(files):
        fs.unlink(DIRECTORY / NEW / file)
    assert "cannot be read (No such file" in assert_falls_back(fs, files)


def test_a_file_in_place_of_a_checkpoint_is_noticed(fs: FakeFileSystem) -> None:
    fs.root.entries["run"].entries["checkpoints"].entries[NEW] = File(b"")
    assert "Not a directory" in assert_falls_back(fs, NEW)


def test_nothing_good_is_never_a_fresh_start(fs: FakeFileSystem, warned: list[str]) -> None:
    for name in (OLD, NEW):
        fs.put(DIRECTORY / name / "state.npz", b"")
    with pytest.raises(
        StateError, match="'/run/checkpoints': there are some, and none can be trusted; restore"
    ) as caught:
        load(fs, warned)
    assert caught.value.exit_code == 3
    assert [NEW in warned[0], OLD in warned[1], len(warned)] == [True, True, 2]


def test_leftovers_of_a_crashed_first_save_are_a_fresh_start(warned: list[str]) -> None:
    fs = FakeFileSystem()
    for path in (DIRECTORY.parent, DIRECTORY, DIRECTORY / f"tmp-{OLD}"):
        fs.mkdir(path)
    assert load(fs, warned) is None
    fs.mkdir(DIRECTORY / f"removed-{OLD}")
    with pytest.raises(StateError):
        load(fs, warned)


def test_a_later_schema_is_refused_even_when_an_older_checkpoint_is_there(
    fs: FakeFileSystem, warned: list[str]
) -> None:
    state = fs.read(DIRECTORY / NEW / "state.npz")
    fs.put(DIRECTORY / NEW / "manifest.json", encode_manifest(serial=2, step=20, state=state, meta={}, schema=2))
    with pytest.raises(StateError, match="has schema 2, this version knows up to 1; continue with the version"):
        load(fs, warned)


def forged(state: bytes, **changes: object) -> bytes:
    """A manifest with a right SHA-256 of its own and other fields changed (or dropped, by `...`)."""
    body = decode_manifest(encode_manifest(serial=2, step=20, state=state, meta={}))
    body.update(changes)
    body = {key: value for key, value in body.items() if value is not ...}
    plain = json.dumps(body, indent=1).encode() + b"\n"
    body["sha256"] = hashlib.sha256(plain).hexdigest()
    return json.dumps(body, indent=1).encode() + b"\n"


@pytest.mark.parametrize(
    "changes",
    [
        {key: value}
        for key in ("schema", "serial", "step", "files", "meta")
        for value in (
            ...,
            None,
            "1",
            [],
            {},
            -1,
            0,
            1.5,
            {"state.npz": {}},
            {"../state.npz": {"size": 1, "sha256": ""}},
        )
        if (key, value) != ("meta", {}) and not (key == "meta" and isinstance(value, dict))
    ],
    ids=str,
)
def test_a_forged_manifest_is_refused(fs: FakeFileSystem, changes: dict[str, object]) -> None:
    fs.put(DIRECTORY / NEW / "manifest.json", forged(fs.read(DIRECTORY / NEW / "state.npz"), **changes))
    assert_falls_back(fs, changes)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b'"x"',
        b"{}",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"sha256": NaN}',
    ],
    ids=range(11),
)
def test_a_manifest_that_is_none_is_refused(fs: FakeFileSystem, text: bytes) -> None:
    fs.put(DIRECTORY / NEW / "manifest.json", text)
    assert "manifest.json is damaged" in assert_falls_back(fs, text[:20])


def test_a_pickle_is_never_loaded(fs: FakeFileSystem) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (pytest.fail, ("the pickle was loaded",))

    buffer = io.BytesIO()
    np.savez(buffer, parameters=np.array([Bomb()], dtype=object))
    state = buffer.getvalue()
    fs.put(DIRECTORY / NEW / "state.npz", state)
    fs.put(DIRECTORY / NEW / "manifest.json", forged(state))
    assert "does not hold plain arrays" in assert_falls_back(fs, "pickle")


# Real disks and processes.

_SAVER = """
import sys, itertools
import numpy as np
from pathlib import Path
from tapedist.training.checkpoints import CheckpointStore
store = CheckpointStore(directory=Path(sys.argv[1]))
found = store.load()
for step in itertools.count(found.step + 1 if found else 1):
    store.save({"parameters": np.full(20_000, float(step)), "step": np.int64(step)}, step=step, meta={"step": step})
    print(step, flush=True)
"""


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(command, text=True, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


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
        assert checkpoint is not None and checkpoint.step >= claimed
        assert checkpoint.meta == {"step": checkpoint.step} and checkpoint.arrays["step"] == checkpoint.step
        assert (checkpoint.arrays["parameters"] == checkpoint.step).all()
    assert not warned


def test_a_file_size_limit_is_exit_6_and_the_previous_checkpoint_stays(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    CheckpointStore(directory=directory).save({"x": np.zeros(10)}, step=1, meta={})
    code = """
import sys, numpy as np
from pathlib import Path
from tapedist.errors import StorageError
from tapedist.training.checkpoints import CheckpointStore
try:
    CheckpointStore(directory=Path(sys.argv[1])).save({"x": np.zeros(100_000)}, step=2, meta={})
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    limit = (100_000, 100_000)
    with python(code, directory, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)) as process:
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
    assert len(warned) == 1 and "cannot be removed" in warned[0]
    assert store.load().step == 4


def test_no_tensorflow_is_needed() -> None:
    code = "import sys, tapedist.training.checkpoints, tapedist.run_folder; sys.exit('tensorflow' in sys.modules)"
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
    assert checkpoint is not None and checkpoint.step >= claimed
