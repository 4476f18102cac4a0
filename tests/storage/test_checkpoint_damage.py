"""Damage is noticed, said, and never believed: what is loaded is the checkpoint before, or nothing is."""

from __future__ import annotations

import hashlib
import io
import json
import random

import numpy as np
import pytest
from checkpoint_samples import DIRECTORY, NEW, OLD, load, two_saved
from fake_filesystem import FakeFileSystem, File

from tapedist.errors import StateError
from tapedist.storage.checkpoint_format import decode_manifest, encode_manifest
from tapedist.storage.checkpoints import OlderCheckpoint


@pytest.fixture
def warned() -> list[str]:
    return []


@pytest.fixture
def fs() -> FakeFileSystem:
    return two_saved()


def assert_falls_back(fs: FakeFileSystem, what: object) -> str:
    """The old checkpoint is loaded, with one warning, which is returned."""
    warned: list[str] = []
    checkpoint = load(fs, warned)
    assert checkpoint is not None, what
    assert checkpoint.step == 10, what
    assert [NEW in warning and "\n" not in warning for warning in warned] == [True], what
    return warned[0]


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


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` after one to three cuts, copies and insertions."""
    for _ in range(rng.randint(1, 3)):
        start, end, at = (rng.randint(0, len(data)) for _ in range(3))
        start, end = min(start, end), min(max(start, end), min(start, end) + 20)
        piece = rng.choice(
            [b"", b"0", b"-", b"e9", b"\n", b" ", b"null", b"[", b"}", b'"', b"\\u0000", data[at : at + 20]]
        )
        data = data[:start] + piece + data[end:]
    return data


def test_mutated_manifests_are_noticed(fs: FakeFileSystem) -> None:
    path, rng = DIRECTORY / NEW / "manifest.json", random.Random(0)
    sound = fs.read(path)
    cases = 0
    while cases < 1_000:
        damaged = mutated(sound, rng)
        if damaged != sound:
            fs.put(path, damaged)
            assert_falls_back(fs, damaged)
            cases += 1


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
    fs.put(DIRECTORY / NEW / "manifest.json", encode_manifest(serial=2, step=20, state=state, meta={}, schema=3))
    with pytest.raises(StateError, match="has schema 3, this version knows up to 2; continue with the version"):
        load(fs, warned)


@pytest.mark.parametrize("newest", [True, False])
def test_a_checkpoint_of_0_1_is_told_from_a_damaged_one(fs: FakeFileSystem, warned: list[str], newest: bool) -> None:
    name, serial, step = (NEW, 2, 20) if newest else (OLD, 1, 10)
    state = fs.read(DIRECTORY / name / "state.npz")
    fs.put(
        DIRECTORY / name / "manifest.json", encode_manifest(serial=serial, step=step, state=state, meta={}, schema=1)
    )
    if newest:
        with pytest.raises(OlderCheckpoint, match=f"{NEW}': was saved by version 0.1, whose arithmetic was another$"):
            load(fs, warned)
        assert warned == []
    else:
        loaded = load(fs, warned)
        assert loaded is not None
        assert loaded.step == 20


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
