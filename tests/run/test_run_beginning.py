"""The beginning of a run in its folder: what is written at once, and when an earlier run there may go."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.fault_injection.outcome import outcome
from tapedist.config import TrainConfig
from tapedist.data import source
from tapedist.errors import InputError, StorageError
from tapedist.flags import CommandLine
from tapedist.run import saved_run
from tapedist.storage.run_folder import RunFolder

SETTINGS: dict[str, Any] = {"n_samples": 500, "num_epochs": 20, "full_batch_engine": "stream", "plots": False}


def _train(run_dir: Path, *, loss: Any = None, **settings: Any) -> Any:
    from tapedist.run import train

    return train.train(TrainConfig(run_dir=str(run_dir), **(SETTINGS | settings)), loss=loss)


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    _train(tmp_path / "run")
    return tmp_path / "run"


def test_a_killed_run_says_what_it_was(child_env: dict[str, str], tmp_path: Path) -> None:
    words = [f"--run_dir={tmp_path / 'run'}", "--full_batch_engine=stream", "--num_epochs=1e8", "--seed=7"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tapedist", "train", *words],
        env={**child_env, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert any(line.startswith("Training samples:") for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = RunFolder.find(tmp_path / "run")
    assert CommandLine(TrainConfig, [f"--flagfile={folder.flags}"]).options() == CommandLine(
        TrainConfig, words
    ).options().resolved().with_arithmetic("default")
    assert json.loads(folder.environment.read_text())["replicas"] == 1
    assert not folder.done.exists()


def test_a_resumed_run_tells_its_new_place(finished: Path) -> None:
    folder = RunFolder.find(finished)
    folder.environment.write_text("{")
    _train(finished)  # It is finished: nothing begins.
    assert folder.environment.read_text() == "{"
    _train(finished, num_epochs=30)
    assert json.loads(folder.environment.read_text())["strategy"] == "default"
    assert "--num_epochs=30" in folder.flags.read_text()


@pytest.mark.parametrize("file", ["config.flags", "env.json", "done.json"])
def test_a_crash_between_the_files_refuses_no_resume(
    file: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saved_run.write_atomic

    def write_but_one(path: Path, text: str) -> None:
        if path.name == file:
            raise StorageError("here it ends")
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(saved_run, "write_atomic", write_but_one)
        with pytest.raises(StorageError, match="here it ends"):
            _train(finished, num_epochs=30)
    assert not (finished / "done.json").exists()
    _train(finished, num_epochs=30)
    _train(tmp_path / "undisturbed", num_epochs=30)
    assert outcome(finished)["done"] == outcome(tmp_path / "undisturbed")["done"]


def _absolute(y_hat: Any, y: Any) -> Any:
    import tensorflow as tf

    return tf.abs(y_hat - y)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"full_batch_engine": "moments"}, "--full_batch_engine=moments: cannot serve"),
        ({"learning_rate": "auto", "full_batch_engine": "auto"}, "--learning_rate=auto: is known only"),
        ({"stop_at_se": 1.0}, "--stop_at_se=1.0: needs a linear model"),
    ],
)
def test_a_run_that_cannot_begin_leaves_the_earlier_one(settings: dict[str, Any], match: str, finished: Path) -> None:
    before = _files(finished)
    with pytest.raises(InputError, match=match):
        _train(finished, loss=_absolute, resume="never", **settings)
    assert _files(finished) == before


def test_a_bad_table_leaves_the_earlier_run(finished: Path, tmp_path: Path) -> None:
    before = _files(finished)
    (tmp_path / "bad.csv").write_text("x,y\n1,2\n3,four\n")
    with pytest.raises(InputError, match="four"):
        _train(finished, resume="never", data=str(tmp_path / "bad.csv"), target="y")
    assert _files(finished) == before


def test_a_crash_while_the_earlier_run_goes_refuses_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove: Callable[..., None] = shutil.rmtree

    def remove_half(path: Path) -> None:
        checkpoint = next(path.iterdir())
        remove(checkpoint)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_half)
        patch.setattr("tapedist.storage.run_folder.os.getpid", lambda: 999_999_999)  # Of a process that is no more.
        with RunFolder.open(finished) as folder, pytest.raises(KeyboardInterrupt):
            folder.clear()
    assert list(finished.glob(".tapedist-999999999-checkpoints"))
    _train(finished, seed=3)
    assert not list(finished.glob(".tapedist-*"))
    _train(tmp_path / "undisturbed", seed=3)
    assert outcome(finished) == outcome(tmp_path / "undisturbed")


def test_no_worker_is_asked_for_a_stop_while_the_chief_writes_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chief alone reads rows for report and figures; a question to all workers would wait for the others."""
    from tapedist.run import train

    asked, write, writing = [0, 0], saved_run.SavedRun._write_results, [False]

    def ask(*_: Any) -> bool:
        asked[writing[0]] += 1
        return False

    def write_results(*arguments: Any) -> None:
        writing[0] = True
        assert not source.check_stop()  # As a pass over rows would ask.
        write(*arguments)
        writing[0] = False

    monkeypatch.setattr(train, "check_stop", ask)
    monkeypatch.setattr(saved_run.SavedRun, "_write_results", write_results)
    table = tmp_path / "table.csv"
    table.write_text("x,y\n" + "".join(f"{i},{3 * i + i % 2}\n" for i in range(200)))
    config = TrainConfig(data=str(table), target="y", run_dir=str(tmp_path / "run"), plots=True)
    assert train.train(config).digest
    assert asked[False] > 0
    assert asked[True] == 0
