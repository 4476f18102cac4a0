"""`tapedist verify`: real runs are equal to the reference, and a single bit that is not is found and named."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import own_tables
import pytest
import tensorflow as tf
from conftest import REPO, Finished

from tapedist import cli
from tapedist.config import TrainConfig
from tapedist.data.array_source import ArraySource
from tapedist.errors import Interrupted
from tapedist.flags import CommandLine
from tapedist.run.train import train
from tapedist.storage.checkpoint_format import decode_manifest, encode_manifest, pack_arrays, unpack_arrays
from tapedist.training.state import digest

FEATURES = own_tables.NAMES[:3]
WEIGHTED = {"weight": "times", "standardize": "true"}
# What each run is, beside the synthetic rows or the table that it is of.
SYNTHETIC: dict[str, dict[str, Any]] = {
    "stream": {"full_batch_engine": "stream", "num_epochs": 30, "learning_rate": 0.05, "num_features": 3},
    "moments": {"num_epochs": 200, "dtype": "float64", "num_features": 3, "mean": 5.0},
    "mini-batch": {"mode": "mini_batch", "num_epochs": 3, "batch_size": 300},
    "adam with L2": {"mode": "mini_batch", "optimizer": "adam", "l2": 0.1, "num_epochs": 3, "learning_rate": 0.05},
    "standard units": {"standardize": "true", "learning_rate": "auto", "num_epochs": 9, "mean": 100.0},
    "patience": {"early_stop_patience": 2, "early_stop_every_epochs": 1, "learning_rate": 0.4, "num_epochs": 500},
    "no epoch": {"num_epochs": 0},
}
TABLE: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weights": {**WEIGHTED, "dtype": "float64"},
    "weighted stream": {**WEIGHTED, "full_batch_engine": "stream"},
    "raw units": {"standardize": "false", "learning_rate": 1e-5, "num_epochs": 20, "fit_intercept": False},
    "mini-batches": {"mode": "mini_batch", "batch_size": 64, "num_epochs": 4},
    "huber": {"loss": "huber", "huber_delta": 500.0, "weight": "times"},
    "huber in mini-batches": {"mode": "mini_batch", "loss": "huber", "huber_delta": 500.0, "num_epochs": 3},
    "adam on absolute errors": {"optimizer": "adam", "loss": "absolute", "learning_rate": 5.0, "num_epochs": 20},
    "nesterov": {"optimizer": "nesterov", "learning_rate": 0.05, "num_epochs": 20, "full_batch_engine": "stream"},
    "length of the gradient": {"early_stop_gradient_norm": 10.0, "learning_rate": 0.05, "num_epochs": 500},
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_tables.write_csv(tmp_path_factory.mktemp("tables") / "t.csv", own_tables.columns(300))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints of which the earlier one is 10 epochs before the end."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config(folder, optimizer="momentum", num_epochs=30, checkpoint_every_steps=20, learning_rate=0.01))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The same, for a test to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "spoiled"))


def config(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"run_dir": folder, "plots": False, "n_samples": 2000, **changes})


def of_table(folder: Path, table: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(run_dir=folder, plots=False, data=table, target="price", features=FEATURES, **changes)


def verify(folder: Path, *words: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """The last line: of stdout if all is equal, else the error."""
    capsys.readouterr()
    found = cli.main(["verify", f"--run_dir={folder}", *words])
    printed = capsys.readouterr()
    assert found == code, printed
    if not code:
        assert not printed.err
        return printed.out.splitlines()[-1]
    lines = printed.err.splitlines()
    assert len(lines) == 1
    return lines[0]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_tutorial_is_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [f"--flagfile={REPO / 'configs' / 'tutorial.flags'}", f"--run_dir={tmp_path / 'run'}", "--num_epochs=50"]
    train(CommandLine(TrainConfig, words).options())
    assert verify(tmp_path / "run", capsys=capsys) == (
        "equal: 00000001-step-50, model.json and 50 updates from the start, bit for bit"
    )


@pytest.mark.parametrize("name", SYNTHETIC)
def test_runs_on_synthetic_rows_are_equal(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = train(config(tmp_path / "run", **SYNTHETIC[name]))
    assert f"model.json and {result.steps} updates from the start" in verify(tmp_path / "run", capsys=capsys)
    assert bool(result.stopped) == (name == "patience")


@pytest.mark.parametrize("name", TABLE)
def test_runs_on_tables_are_equal(name: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = train(of_table(tmp_path / "run", table, **TABLE[name]))
    before = contents(tmp_path)
    assert cli.main(["verify", f"--run_dir={tmp_path / 'run'}"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("equal: ")
    asked = f"stop rule after {result.steps} updates: equal ({result.stopped})"
    assert (asked in lines) == bool(result.stopped)
    assert contents(tmp_path) == before


def test_one_run_starts_from_another(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(of_table(tmp_path / "first", table, num_epochs=5, learning_rate=0.1))
    train(of_table(tmp_path / "run", table, num_epochs=5, learning_rate=0.05, init_from=str(tmp_path / "first")))
    verify(tmp_path / "run", capsys=capsys)
    train(of_table(tmp_path / "first", table, num_epochs=6, learning_rate=0.1))
    assert "differs: settings of 00000001-step-5 from config.flags: model" in verify(
        tmp_path / "run", capsys=capsys, code=3
    )


def test_the_optimum_of_synthetic_rows_is_not_asked_for_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(config(tmp_path / "run", stop_at_se=0.1, learning_rate="auto", num_epochs=500))
    assert "its stop rule was not asked again, because" in verify(tmp_path / "run", capsys=capsys)


def test_the_last_epochs_from_a_stored_state(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert " 10 updates from the state after 20 updates" in verify(trained, "--epochs=3", capsys=capsys)
    assert " 10 updates from the state after 20 updates" in verify(trained, "--epochs=10", capsys=capsys)
    assert " 30 updates from the start" in verify(trained, "--epochs=11", capsys=capsys)


def test_what_is_interrupted_has_sums_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In the middle of a pass, and between passes."""
    for name, engine, seen in (("a", "stream", 3), ("b", "moments", 1)):
        settings = config(
            tmp_path / name, n_samples=2_000_000, full_batch_engine=engine, cache="none", num_epochs=3,
            learning_rate=0.01,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patched:
            _interrupt_after(patched, seen)
            with pytest.raises(Interrupted):
                train(settings)
        assert not (tmp_path / name / "model.json").exists()
        capsys.readouterr()
        assert cli.main(["verify", f"--run_dir={tmp_path / name}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any("rows of the next pass" in line for line in lines), lines
        (stored,) = (tmp_path / name / "checkpoints").iterdir()
        _change_state(stored, "progress.sums", lambda sums: sums[1].__setitem__(0, sums[1, 0] + 1))
        assert f"of {stored.name}" in verify(tmp_path / name, capsys=capsys, code=3)


def _interrupt_after(patched: pytest.MonkeyPatch, visits: int) -> None:
    """A signal when so many parts of passes are done."""
    from tapedist.training.block_pass import BlockPass

    patched.setattr("tapedist.training.block_pass._VISITS_PER_CALL", 1)
    whole, done = BlockPass.run, [0]

    def counted(self: BlockPass, add: Any, *, interrupted: Any) -> Any:
        def add_one(*arguments: Any) -> Any:
            done[0] += 1
            if done[0] == visits:
                signal.raise_signal(signal.SIGINT)
            return add(*arguments)

        return whole(self, add_one, interrupted=interrupted)

    patched.setattr(BlockPass, "run", counted)


# What differs.


def _change_state(checkpoint: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Changes an array of a checkpoint, and its manifest with it."""
    arrays = unpack_arrays((checkpoint / "state.npz").read_bytes())
    change(arrays[name])
    state = pack_arrays(arrays)
    (checkpoint / "state.npz").write_bytes(state)
    old = decode_manifest((checkpoint / "manifest.json").read_bytes())
    new = encode_manifest(serial=old["serial"], step=old["step"], state=state, meta=old["meta"])
    (checkpoint / "manifest.json").write_bytes(new)


def _flip_last_bit(numbers: np.ndarray, place: int) -> None:
    numbers.view(np.int64)[place] ^= 1


def test_a_model_that_was_changed_in_every_place_by_one_bit(run: Path, capsys: pytest.CaptureFixture[str]):
    model = json.loads((run / "model.json").read_text())
    bias = float(np.nextafter(model["bias"], np.inf))
    parameters = [*model["weights"], bias]
    model |= {"bias": bias, "parameters": parameters, "digest": digest(np.array(parameters))}
    (run / "model.json").write_text(json.dumps(model))
    line = verify(run, capsys=capsys, code=3)
    assert line.startswith("tapedist: error: differs: bias of model.json after 30 updates: ")
    assert line.endswith(f"stored {bias!r}, recomputed {float(np.nextafter(bias, -np.inf))!r}")
    assert "differs: bias of model.json" in verify(run, "--epochs=2", capsys=capsys, code=3)


@pytest.mark.parametrize(
    ("field", "name"), [("train_loss", "train_loss"), ("test_loss", "test_loss"), ("stopped", "stop rules")]
)
def test_other_results_of_a_model(field: str, name: str, run: Path, capsys: pytest.CaptureFixture[str]):
    model = json.loads((run / "model.json").read_text())
    model[field] = "enough" if field == "stopped" else float(np.nextafter(model[field], 0.0))
    (run / "model.json").write_text(json.dumps(model))
    assert name in verify(run, capsys=capsys, code=3)


@pytest.mark.parametrize(
    ("array", "place", "name"),
    [
        ("vector", 0, "weight of x of 00000002-step-30"),
        ("vector", 3, "slot 0 of bias of 00000002-step-30"),
        ("first_loss", 0, "the first epoch's loss of 00000002-step-30"),
        ("path", 4, "weight of x of the path in 00000002-step-30 after 20 updates"),
        ("progress.moments", 3, "second moment"),
    ],
)
def test_one_bit_of_a_checkpoint(array: str, place: int, name: str, run: Path, capsys: pytest.CaptureFixture[str]):
    _change_state(run / "checkpoints" / "00000002-step-30", array, lambda a: _flip_last_bit(a.reshape(-1), place))
    line = verify(run, capsys=capsys, code=3)
    assert "differs: " in line
    assert name in line


def test_the_first_step_that_differs_is_named(run: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("00000001-step-20", "00000002-step-30"):
        _change_state(run / "checkpoints" / name, "vector", lambda vector: _flip_last_bit(vector, 1))
    assert "bias of 00000001-step-20 after 20 updates: stored " in verify(run, capsys=capsys, code=3)
    # Taken as given, what follows from it is something else.
    assert "00000002-step-30" in verify(run, "--epochs=10", capsys=capsys, code=3)


def test_a_damaged_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]):
    state = run / "checkpoints" / "00000001-step-20" / "state.npz"
    content = bytearray(state.read_bytes())
    content[200] ^= 1
    state.write_bytes(content)
    assert "00000001-step-20' cannot be trusted: the SHA-256" in verify(run, capsys=capsys, code=3)


def test_other_settings(run: Path, capsys: pytest.CaptureFixture[str]):
    text = (run / "config.flags").read_text()
    (run / "config.flags").write_text(text.replace("learning_rate=0.01", "learning_rate=0.02"))
    assert "learning_rate: stored 0.01, asked 0.02" in verify(run, capsys=capsys, code=3)


def test_one_cell_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    columns = own_tables.columns(300)
    own_tables.write_csv(tmp_path / "t.csv", columns)
    train(of_table(tmp_path / "run", tmp_path / "t.csv", num_epochs=5, learning_rate=0.1))
    stored = json.loads((tmp_path / "run" / "model.json").read_text())["rows"]
    columns["rooms"][17] += 1
    own_tables.write_csv(tmp_path / "t.csv", columns)
    line = verify(tmp_path / "run", capsys=capsys, code=3)
    assert "differs: the rows: " in line
    assert stored[:12] in line

    # With a fingerprint that was changed too, the numbers are others.
    current = _fingerprint(tmp_path / "run")
    model = tmp_path / "run" / "model.json"
    model.write_text(model.read_text().replace(stored, current))
    for path in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        body = json.loads(path.read_text().replace(stored, current))
        del body["sha256"]
        spelled = json.dumps(body, indent=1).encode() + b"\n"
        sealed = {**body, "sha256": hashlib.sha256(spelled).hexdigest()}
        path.write_bytes(json.dumps(sealed, indent=1).encode() + b"\n")
    assert "recomputed " in verify(tmp_path / "run", capsys=capsys, code=3)


def _fingerprint(folder: Path) -> str:
    from tapedist.data.catalog import open_source
    from tapedist.run.saved_run import read_config
    from tapedist.storage.run_folder import RunFolder

    return open_source(read_config(RunFolder.find(folder))).fingerprint()


# What cannot be verified.


def _absolute(y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return tf.abs(y_hat - y)


class _Module(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable([1.0])

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return tf.linalg.matvec(x, self.w)


def _arrays() -> ArraySource:
    x = np.random.default_rng(0).normal(size=(50, 2))
    return ArraySource(x, x.sum(axis=1))


@pytest.mark.parametrize(
    ("changes", "arguments", "reason"),
    [
        ({"arithmetic": "fast"}, {}, "--arithmetic=fast, whose bits are those of its machine"),
        ({}, {"loss": _absolute}, "a loss of the caller's, of which there is no reference"),
        ({}, {"model": _Module}, "its model is not the linear one"),
        ({"learning_rate": 0.1, "n_samples": 10_000}, {"source": _arrays}, "on rows that were not kept"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_what_has_no_reference(
    changes: dict[str, Any], arguments: dict[str, Any], reason: str, finished: bool, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    if "source" in arguments:
        arguments = {"source": arguments["source"]()}
    train(config(tmp_path / "run", num_epochs=2, **changes), **arguments)
    if not finished:
        (tmp_path / "run" / "model.json").unlink()
        reason = reason.replace("on rows that were not kept", "they were not kept")
    assert reason in verify(tmp_path / "run", capsys=capsys, code=2)


def test_nothing_to_verify(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "is no run folder" in verify(tmp_path / "nowhere", capsys=capsys, code=2)
    shutil.rmtree(run / "checkpoints")
    assert verify(run, capsys=capsys).startswith("equal: model.json and 30 updates")
    (run / "model.json").unlink()
    assert "holds no checkpoint and no model" in verify(run, capsys=capsys, code=2)
    assert "--epochs=-1: must not be negative" in verify(run, "--epochs=-1", capsys=capsys, code=2)


def test_a_table_that_is_gone(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = Path(shutil.copy(table, tmp_path / "t.csv"))
    train(of_table(tmp_path / "run", copy, num_epochs=2, learning_rate=0.1))
    copy.unlink()
    assert "t.csv" in verify(tmp_path / "run", capsys=capsys, code=2)


# The process.


def test_no_tensorflow(trained: Path, table: Path, tmp_path: Path, run_python: Callable[..., Finished]):
    train(of_table(tmp_path / "run", table, mode="mini_batch", num_epochs=2))
    script = "import sys; from tapedist.cli import main; code = main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    for folder in (trained, tmp_path / "run"):
        finished = run_python("-c", script, "verify", f"--run_dir={folder}")
        assert finished.code == 0, finished.err
        assert "tensorflow" not in finished.out.split()


def test_it_can_be_broken_off(tmp_path: Path, child_env: dict[str, str]):
    train(config(tmp_path / "run", full_batch_engine="stream", n_samples=20_000, num_epochs=20_000, learning_rate=0.01))
    command = [sys.executable, "-m", "tapedist", "verify", f"--run_dir={tmp_path / 'run'}"]
    with subprocess.Popen(
        command, env=child_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Who runs tests in the background ignores the signal, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline().startswith("rows: equal")
        time.sleep(1)  # Importing is behind it, in which a module of NumPy's may take the signal for its own failure.
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "tapedist: error: stopped by SIGINT\n"
