"""Two checkpoints on a file system in memory, for tests to load and damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fake_filesystem import FakeFileSystem

from tapedist.storage.checkpoints import Checkpoint, CheckpointStore

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
    assert checkpoint is not None
    assert checkpoint.step == step
    expected = arrays(step)
    assert checkpoint.arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint.arrays[name], np.asarray(array), strict=True)


def two_saved() -> FakeFileSystem:
    """A file system with the checkpoints `OLD` and `NEW`."""
    fs = FakeFileSystem()
    fs.mkdir(DIRECTORY.parent)
    for step in (10, 20):
        CheckpointStore(directory=DIRECTORY, fs=fs).save(arrays(step), step=step, meta={"n": step})
    assert set(fs.listdir(DIRECTORY)) == {OLD, NEW}
    return fs


def load(fs: FakeFileSystem, warned: list[str]) -> Checkpoint | None:
    return CheckpointStore(directory=DIRECTORY, fs=fs, warn=warned.append).load()
