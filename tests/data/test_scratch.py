"""Rows of a table that do not fit into memory: a scratch file that leaves nothing behind, or decoding in each pass."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import own_tables
import pytest

from tapedist.config import TrainConfig
from tapedist.data import catalog
from tapedist.data.tables import store
from tapedist.errors import StorageError
from tapedist.run.train import train

# Of bad rows, and of how far so few epochs come.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

_BUDGET = 2000  # Bytes, of which the rows here need some 30,000.
_FULL_BATCH = {"num_epochs": 7, "learning_rate": 0.1}
_MINI_BATCH = {"mode": "mini_batch", "batch_size": 64, "num_epochs": 2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One table with some bad cells, in three formats."""
    folder, columns = tmp_path_factory.mktemp("tables"), own_tables.columns()
    columns["rooms"][[3, 70, 699]] = np.nan
    columns["price"][5] = np.inf
    return {
        "csv": own_tables.write_csv(folder / "t.csv", columns),
        "parquet": own_tables.write_parquet(folder / "t.parquet", columns),
        "npz": own_tables.write_npz(folder / "t.npz", columns),
    }


def _digest(data: Path, place: str, **settings: Any) -> str:
    base = {"target": "price", "features": own_tables.NAMES[:3], "statistics": "false", "on_bad_rows": "drop"}
    opened: list[str] = []
    original = catalog.open_table

    def open_table(*args: Any, **options: Any) -> Any:
        table = original(*args, **options, memory_budget=2**29 if place == "memory" else _BUDGET)
        opened.append(table.storage)
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "open_table", open_table)
        if place == "nowhere":
            patch.setattr(store, "_SPARE_BYTES", 2**62)
        result = train(TrainConfig(data=data, **{**base, **settings}))
    assert opened == [place]
    return result.digest


@pytest.mark.parametrize(
    "settings",
    [
        {**_FULL_BATCH, "weight": "times"},
        {**_FULL_BATCH, "full_batch_engine": "stream", "on_bad_rows": "mean", "cache": "none"},
        {
            **_FULL_BATCH,
            "full_batch_engine": "stream",
            "split": "index",
            "on_bad_rows": "mean",
        },
        {**_MINI_BATCH, "shuffle": "none", "weight": "times", "cache": "none"},
    ],
    ids=["moments", "stream", "index", "mini-batch"],
)
def test_one_digest_wherever_rows_are_kept(tables: dict[str, Path], settings: dict[str, Any]):
    places = [("csv", "memory"), ("csv", "scratch file"), ("parquet", "scratch file"), ("npz", "nowhere")]
    digests = {(name, place): _digest(tables[name], place, **settings) for name, place in [*places, ("csv", "nowhere")]}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("shuffle", ["rows", "batches"])
def test_shuffled_rows_come_from_a_scratch_file_or_not_at_all(tables: dict[str, Path], shuffle: str):
    settings = {**_MINI_BATCH, "shuffle": shuffle, "cache": "none"}
    memory, scratch = (_digest(tables["csv"], place, **settings) for place in ("memory", "scratch file"))
    assert memory == scratch
    with pytest.raises(StorageError, match=r"--scratch_dir=.* GiB free, .*; give a folder with more room"):
        _digest(tables["csv"], "nowhere", **settings)


_COMMAND = """
import functools, sys
from tapedist import cli
from tapedist.data import catalog
from tapedist.data.tables import store
catalog.open_table = functools.partial(catalog.open_table, memory_budget=2000)
store._SPARE_BYTES = int(sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
"""


def _flags(data: Path, folder: Path) -> list[str]:
    return [
        "train", f"--data={data}", "--target=price", "--features=area,rooms,age", "--on_bad_rows=drop",
        f"--scratch_dir={folder}", "--mode=mini_batch", "--batch_size=64", "--learning_rate=1e-9", "--statistics=false",
        "--plots=false", "--cache=none",
    ]  # fmt: skip


def test_too_small_a_disk_through_the_command(tables: dict[str, Path], tmp_path: Path, run_python: Any):
    flags = _flags(tables["parquet"], tmp_path)
    done = run_python("-c", _COMMAND, str(2**62), *flags, "--num_epochs=1", "--shuffle=rows")
    assert done.code == 6
    (line,) = done.errors
    assert f"--scratch_dir={tmp_path}: has " in line
    done = run_python("-c", _COMMAND, str(2**62), *flags, "--num_epochs=1", "--shuffle=none")
    assert done.code == 0, done.err
    assert "is decoded anew in each pass; give a folder with more room" in done.out


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at a process by /proc")
def test_nothing_is_left_behind_after_a_kill(tables: dict[str, Path], tmp_path: Path):
    command = [sys.executable, "-c", _COMMAND, "1000", *_flags(tables["csv"], tmp_path), "--num_epochs=1e9"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    try:
        assert process.stdout
        assert any("Epoch: " in line for line in process.stdout)
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        assert f"{tmp_path}/" in mapped  # It is used, and has no name already.
        assert os.listdir(tmp_path) == []
    finally:
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile(tables: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """The first look finds room, a later one none: what was written goes, and the answer is the same."""
    looks = iter([0, 0, 2**62])
    original = store.ScratchFolder.check_room
    monkeypatch.setattr(store.ScratchFolder, "check_room", lambda self, size: original(self, next(looks, 2**62)))
    source = catalog.open_table(str(tables["csv"]), target="price", on_bad_rows="drop", memory_budget=_BUDGET)
    assert source.storage == "nowhere"
    monkeypatch.undo()
    kept = catalog.open_table(str(tables["csv"]), target="price", on_bad_rows="drop")
    for split in ("train", "test"):
        np.testing.assert_array_equal(
            source.rows(split, range(source.num_rows(split)))[0], kept.rows(split, range(kept.num_rows(split)))[0]
        )
