"""Exact resume: a run that was stopped or killed anywhere ends with the bits and the rows of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from scripts.fault_injection.outcome import outcome
from tapedist.config import TrainConfig
from tapedist.errors import InputError, Interrupted, StateError
from tapedist.storage.checkpoint_format import decode_manifest, encode_manifest

# Constants that make small data take the paths of large data: many blocks, many rounds, many transfers.
SMALL = {
    "tapedist.data.orders.TILE_ROWS": 64,
    "tapedist.data.orders.MOST_PRODUCT_ROWS": 64,
    "tapedist.data.orders.BLOCK_BYTES": 256,
    "tapedist.data.orders.RESIDENT_BYTES": 0,
    "tapedist.training.engines._SUPERBATCH_BYTES": 8192,
}
COMMON = {
    "n_samples": 10_000,
    "log_every_epochs": 1,
    "eval_every_epochs": 2,
    "steps_per_call": 3,
    "plots": False,
}
BATCHES = {"mode": "mini_batch", "batch_size": 900, "num_epochs": 5, "learning_rate": 0.01}
STREAM = {"full_batch_engine": "stream", "num_epochs": 7, "learning_rate": 0.1}
# name -> (constants, settings). The step at which each is stopped falls inside an epoch where it can.
MODES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "resident": ({}, STREAM | {"num_epochs": 40}),
    "held": (SMALL, STREAM | {"num_epochs": 40, "cache": "device", "optimizer": "adam"}),
    "streamed": (SMALL, STREAM | {"cache": "none", "optimizer": "nesterov"}),
    "streamed_auto": (SMALL, STREAM | {"cache": "none", "learning_rate": "auto"}),
    "moments": (SMALL, {"full_batch_engine": "moments", "num_epochs": 40, "learning_rate": 0.1}),
    "batches": ({}, BATCHES | {"optimizer": "momentum", "l2": 0.1}),
    "streamed_batches": (SMALL, BATCHES | {"optimizer": "adam", "cache": "none", "shuffle": "rows"}),
}


class StopAfter:
    """Stands in for the signals: asks for a stop once it has been asked so often."""

    def __init__(self, asks: int):
        self.asks = asks

    def __call__(self, **_: Any) -> StopAfter:
        return self

    def __enter__(self) -> StopAfter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def deferred(self) -> StopAfter:
        return self

    @property
    def signum(self) -> int | None:
        self.asks -= 1
        return signal.SIGTERM if self.asks < 0 else None


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Trains in this process, as one of `MODES`, with some settings changed."""
    from tapedist.run import train

    def call(mode: str, run_dir: Path, *, stop_after: int = 10**9, **settings: Any) -> Any:
        constants, own = MODES[mode]
        with monkeypatch.context() as patch:
            for name, value in constants.items():
                patch.setattr(name, value)
            patch.setattr(train, "StopSignals", StopAfter(stop_after))
            return train.train(TrainConfig(run_dir=str(run_dir), **(COMMON | own | settings)))

    return call


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """`mode -> outcome` of a run that nobody stopped, and copies of its folder at each of its saves."""
    from tapedist.run import train
    from tapedist.run.saved_run import SavedRun

    root, known = tmp_path_factory.mktemp("undisturbed"), {}
    save = SavedRun.save

    def train_once(mode: str) -> dict[str, Any]:
        if mode in known:
            return known[mode]
        constants, own = MODES[mode]
        run_dir, copies = root / mode, []

        def save_and_copy(store: SavedRun, *args: Any, **kwargs: Any) -> None:
            save(store, *args, **kwargs)
            copies.append(shutil.copytree(run_dir, root / f"{mode}-{len(copies)}"))

        patches = [mock.patch(name, value) for name, value in constants.items()]
        with _Patches(patches), mock.patch.object(SavedRun, "save", save_and_copy):
            settings = COMMON | own | {"checkpoint_every_steps": 4}
            result = train.train(TrainConfig(run_dir=str(run_dir), **settings))
        known[mode] = {"outcome": outcome(run_dir), "copies": copies, "folder": run_dir, "history": _rows(result)}
        return known[mode]

    return train_once


class _Patches:
    """Enters several patches at once."""

    def __init__(self, patches: list[Any]):
        self.patches = patches

    def __enter__(self) -> None:
        for patch in self.patches:
            patch.start()

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()


def _rows(result: Any) -> list[tuple[Any, ...]]:
    return [(row.step, row.epoch, row.split, row.loss, row.penalty) for row in result.history]


def _stopped_until_done(train: Callable[..., Any], mode: str, run_dir: Path, stops: Iterator[int]) -> tuple[Any, int]:
    """Resumes and is stopped again until the run is done: `(result, how often it was stopped)`."""
    count = 0
    for asks in stops:
        try:
            return train(mode, run_dir, stop_after=asks), count
        except Interrupted:
            count += 1
    raise AssertionError("never done")


@pytest.mark.parametrize("mode", MODES)
def test_stopped_runs_end_like_undisturbed_ones(
    mode: str, train: Callable[..., Any], undisturbed: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    wanted = undisturbed(mode)
    result, stops = _stopped_until_done(train, mode, tmp_path / "run", iter([2, 5, 10**9]))
    assert stops == 2
    assert outcome(tmp_path / "run") == wanted["outcome"]
    assert _rows(result) == wanted["history"]


@pytest.mark.parametrize(("mode", "stop_after"), [("streamed", 2), ("moments", 2), ("streamed_auto", 9)])
def test_a_stop_inside_a_pass_keeps_the_pass(
    mode: str, stop_after: int, train: Callable[..., Any], undisturbed: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    import numpy as np

    with pytest.raises(Interrupted):
        train(mode, tmp_path / "run", stop_after=stop_after)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    with np.load(checkpoint / "state.npz") as state:
        (left,) = state["progress.remaining"].tolist()  # One replica goes through the rows in their order.
        assert 0 < left[0] < left[1]
        assert state["step"] == 0
        assert np.any(state["progress.sums"])
    train(mode, tmp_path / "run")
    assert outcome(tmp_path / "run") == undisturbed(mode)["outcome"]


@pytest.mark.parametrize("mode", MODES)
def test_killed_runs_end_like_undisturbed_ones(
    mode: str, train: Callable[..., Any], undisturbed: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    wanted = undisturbed(mode)
    copies = wanted["copies"]
    assert len(copies) >= 2
    killed = shutil.copytree(copies[len(copies) // 2], tmp_path / "run")
    with open(killed / "metrics.jsonl", "a") as metrics:
        metrics.write('{"time": 1.0, "step": 10000, "epoch": 10000, "split": "train", "loss": 0.5}\n{"time": 2.0, "st')
    (killed / "checkpoints" / "tmp-00000099-step-9").mkdir()
    train(mode, killed)
    assert outcome(killed) == wanted["outcome"]


def test_checkpoints_move_to_another_strategy(
    train: Callable[..., Any], undisturbed: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    from topology import run_jobs

    jobs = {}
    for mode, (constants, own) in MODES.items():
        with pytest.raises(Interrupted):
            train(mode, tmp_path / mode, stop_after=6)
        jobs[mode] = {
            "config": COMMON | own | {"run_dir": str(tmp_path / mode)},
            "constants": {":".join(name.rsplit(".", 1)): value for name, value in constants.items()},
        }
    done = run_jobs(jobs, replicas=2)
    for mode in MODES:
        wanted = undisturbed(mode)["outcome"]
        assert done[mode].get("error") is None
        assert done[mode]["digest"] == wanted["model"]["digest"]
        assert outcome(tmp_path / mode) == wanted


@pytest.mark.parametrize("mode", ["resident", "batches"])
def test_more_epochs_continue_a_finished_run(mode: str, train: Callable[..., Any], tmp_path: Path) -> None:
    train(mode, tmp_path / "long", num_epochs=9)
    train(mode, tmp_path / "grown", num_epochs=4)
    assert json.loads((tmp_path / "grown" / "done.json").read_text())["epochs"] == 4
    with pytest.raises(Interrupted):
        train(mode, tmp_path / "grown", num_epochs=9, stop_after=2)
    assert not (tmp_path / "grown" / "done.json").exists()
    train(mode, tmp_path / "grown", num_epochs=9)
    assert outcome(tmp_path / "grown") == outcome(tmp_path / "long")
    steps = [(row["step"], row["split"]) for row in outcome(tmp_path / "grown")["metrics"]]
    assert len(steps) == len(set(steps))
    with pytest.raises(StateError, match=r"--num_epochs=3: the run in .* has done 9 already"):
        train(mode, tmp_path / "grown", num_epochs=3)


@pytest.fixture
def finished(undisturbed: Callable[[str], dict[str, Any]], tmp_path: Path) -> Path:
    return shutil.copytree(undisturbed("resident")["folder"], tmp_path / "finished")


def test_a_finished_run_is_left_as_it_is(
    finished: Path, train: Callable[..., Any], undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    result = train("resident", finished)
    assert _rows(result) == undisturbed("resident")["history"]
    assert result.test_loss == undisturbed("resident")["outcome"]["done"]["test_loss"]
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b'{"digest": "another", "stopped": ""}'])
def test_a_damaged_mark_is_made_again(
    content: bytes, finished: Path, train: Callable[..., Any], undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    (finished / "done.json").write_bytes(content)
    train("resident", finished)
    assert outcome(finished) == undisturbed("resident")["outcome"]


def test_another_answer_is_refused_and_another_place_is_not(finished: Path, train: Callable[..., Any]) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(
        StateError, match=r"learning_rate: stored 0\.1, asked 0\.2; .*seed: stored 0, asked 7|seed.*rate"
    ):
        train("resident", finished, learning_rate=0.2, seed=7)
    with pytest.raises(StateError, match="full_batch_engine"):
        train("resident", finished, full_batch_engine="moments")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    train("resident", finished, cache="none", steps_per_call=7, checkpoint_every_secs=1.0, resume="must")


def test_resume_must_and_never(
    finished: Path, train: Callable[..., Any], undisturbed: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"--resume=must: .* holds no checkpoint yet"):
        train("resident", tmp_path / "empty", resume="must")
    assert os.listdir(tmp_path / "empty") == []
    (finished / "mine.txt").write_text("kept")
    result = train("resident", finished, resume="never", learning_rate=0.2)
    assert result.digest != undisturbed("resident")["outcome"]["done"]["digest"]
    assert (finished / "mine.txt").read_text() == "kept"
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == len(result.history)


def test_a_run_of_0_1_is_refused_with_the_way_on(finished: Path, train: Callable[..., Any], tmp_path: Path) -> None:
    for folder in (finished / "checkpoints").iterdir():
        saved = decode_manifest((folder / "manifest.json").read_bytes())
        state, told = (folder / "state.npz").read_bytes(), {name: saved[name] for name in ("serial", "step", "meta")}
        (folder / "manifest.json").write_bytes(encode_manifest(state=state, schema=1, **told))
    with pytest.raises(StateError, match=r"version 0\.1, whose arithmetic was another; go on from its param") as caught:
        train("resident", finished)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert f" --init_from={finished} " in str(caught.value)
    for name in ("checkpoints", "events"):  # Nothing but the model is needed.
        shutil.copytree(finished / name, tmp_path / name)
        shutil.rmtree(finished / name)
    for name in ("config.flags", "done.json", "env.json", "metrics.jsonl"):
        (finished / name).unlink()
    assert train("resident", tmp_path / "new", init_from=str(finished), num_epochs=1).steps == 1
    shutil.copytree(tmp_path / "checkpoints", finished / "checkpoints")
    (finished / "model.json").unlink()
    with pytest.raises(StateError, match=r"version 0\.1.*the run never finished.*begin anew by --resume=never"):
        train("resident", finished)
    train("resident", finished, resume="never")


def test_lost_checkpoints_of_a_finished_run_are_no_fresh_start(finished: Path, train: Callable[..., Any]) -> None:
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(StateError, match="its checkpoints are gone; --resume=never starts anew"):
        train("resident", finished)


def test_a_damaged_checkpoint_falls_back_with_one_warning(
    undisturbed: Callable[[str], dict[str, Any]], train: Callable[..., Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    copies = undisturbed("resident")["copies"]
    damaged = shutil.copytree(copies[len(copies) // 2], tmp_path / "run")
    newest = max((damaged / "checkpoints").iterdir())
    with open(newest / "state.npz", "r+b") as file:
        file.seek(200)
        file.write(b"\x55")
    train("resident", damaged)
    assert capsys.readouterr().err.count("is not used") == 1
    assert outcome(damaged) == undisturbed("resident")["outcome"]
    for checkpoint in (damaged / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(StateError, match="none can be trusted"):
        train("resident", damaged)
