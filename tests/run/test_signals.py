"""Signals in every phase of a run: what there is to save is saved, the exit code names the signal."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preforked import preforked_python

from scripts.fault_injection.outcome import outcome
from tapedist.config import TrainConfig
from tapedist.errors import Interrupted
from tapedist.process import StopSignals, Terminated, signals_raise

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
SETTINGS: dict[str, Any] = {
    "full_batch_engine": "stream",
    "n_samples": 500,
    "num_epochs": 30,
    "steps_per_call": 4,
    "eval_every_epochs": 5,
    "checkpoint_every_steps": 8,
}


def test_the_first_signal_raises_where_nothing_is_lost() -> None:
    for number in SIGNALS:
        with StopSignals() as stop, pytest.raises(Interrupted, match="what the run has saved stays") as caught:
            signal.raise_signal(number)
        assert stop.signum == number
        assert caught.value.signum == number
        assert caught.value.exit_code == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_library_that_takes_it_for_its_own_error(number: signal.Signals) -> None:
    def library() -> None:
        try:
            signal.raise_signal(number)
        except Interrupted:
            raise TypeError("'NoneType' object cannot be interpreted as an integer") from None

    with pytest.raises(Interrupted) as caught, StopSignals():
        library()
    assert caught.value.signum == number
    assert isinstance(caught.value.__cause__, TypeError)


def test_an_import_that_takes_it_for_its_own_error() -> None:
    """Modules of C turn what is raised while they are made into an ImportError."""

    def importing() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Terminated:
            raise ImportError("initialization failed") from None

    with pytest.raises(Terminated) as caught, signals_raise():
        importing()
    assert caught.value.signum == signal.SIGTERM
    with pytest.raises(ImportError), signals_raise():  # One that nobody caused by a signal is what it is.
        raise ImportError("initialization failed")


def test_a_noted_signal_waits_for_the_end() -> None:
    ended = []

    def noted_part(stop: StopSignals) -> None:
        with stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            assert stop.signum == signal.SIGTERM
            signal.raise_signal(signal.SIGTERM)
            ended.append(True)

    with StopSignals() as stop, pytest.raises(Interrupted):
        noted_part(stop)
    assert ended
    with StopSignals() as stop, stop.deferred():
        assert stop.signum is None


def test_what_the_noted_part_raises_goes_first() -> None:
    def failing_part(stop: StopSignals) -> None:
        with stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            raise ZeroDivisionError

    with StopSignals() as stop, pytest.raises(ZeroDivisionError):
        failing_part(stop)


def test_a_second_interrupt_leaves_at_once() -> None:
    def impatient_user(first: signal.Signals) -> None:
        with StopSignals() as stop, stop.deferred():
            signal.raise_signal(first)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("still here")

    for first in SIGNALS:
        with pytest.raises(KeyboardInterrupt):
            impatient_user(first)


def test_several_processes_always_note() -> None:
    with StopSignals(always_noted=True) as stop:
        signal.raise_signal(signal.SIGTERM)
        with stop.deferred():
            pass
        assert stop.signum == signal.SIGTERM


def test_handlers_come_back_and_other_threads_have_none() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    inside: list[Any] = []

    def in_thread() -> None:
        with StopSignals():
            inside.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert inside == before
    with StopSignals():
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tapedist.run import train

    run_dir = tmp_path_factory.mktemp("undisturbed")
    train.train(TrainConfig(run_dir=str(run_dir), **SETTINGS))
    return outcome(run_dir)


# Where in the program a phase is met: `module:name` of a function that the phase calls, and which of its calls.
PHASES = {
    "opening the data": ("tapedist.run.train:open_source", 1),
    "loading the rows": ("tapedist.training.engines:full_batch", 1),
    "the first step": ("tapedist.training.engines:ResidentEngine.run", 1),
    "training": ("tapedist.training.engines:ResidentEngine.run", 4),
    "telling": ("tapedist.results.monitor:Monitor.advance", 5),
    # The first are those of the folder's mark, the flags and the environment.
    "the first save": ("tapedist.storage.files:PosixFileSystem.rename", 4),
    "taking the folder over": ("tapedist.run.saved_run:_write_settings", 1),
    "saving": ("tapedist.storage.files:PosixFileSystem.sync", 12),
    "testing": ("tapedist.training.trainer:Trainer._test_row", 3),
    "closing": ("tapedist.training.trainer:Trainer.close", 1),
    "plotting": ("tapedist.results.figures:draw", 1),
    "the last file": ("tapedist.results.result:TrainResult.summary", 2),
}


def _signal_at(patch: pytest.MonkeyPatch, place: str, call: int, number: int) -> list[str]:
    """Has this process receive a signal when a function is called; the list tells that it was."""
    import importlib

    module, _, name = place.partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls, struck = getattr(owner, last), [0], []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            struck.append(place)
            signal.raise_signal(number)
        return original(*args, **kwargs)

    patch.setattr(owner, last, signalled)
    return struck


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase(phase: str, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tapedist.run import train

    config = TrainConfig(run_dir=str(tmp_path / "run"), **SETTINGS)
    number = SIGNALS[list(PHASES).index(phase) % len(SIGNALS)]
    before = [signal.getsignal(number) for number in SIGNALS]
    with monkeypatch.context() as patch:
        struck = _signal_at(patch, *PHASES[phase], number)
        with pytest.raises(Interrupted) as caught:
            train.train(config)
    assert struck
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not (tmp_path / "run" / "done.json").exists()
    if phase not in ("opening the data", "loading the rows", "taking the folder over"):
        assert list((tmp_path / "run" / "checkpoints").glob("0*/manifest.json"))
    train.train(config)
    assert outcome(tmp_path / "run") == undisturbed


# Rows that are streamed in several rounds a pass, in both splits: small blocks, so that few rows fill many.
BLOCKS = {
    "tapedist.data.orders.TILE_ROWS": 64,
    "tapedist.data.orders.MOST_PRODUCT_ROWS": 64,
    "tapedist.data.orders.BLOCK_BYTES": 1024,
    "tapedist.data.orders.RESIDENT_BYTES": 0,
}
STREAMED: dict[str, Any] = {
    "full_batch_engine": "stream",
    "cache": "none",
    "n_samples": 10_000,
    "learning_rate": 0.1,
    "test_fraction": 0.5,
    "num_epochs": 1,
    "eval_every_epochs": 1,
    "early_stop_gradient_norm": 1e-12,
    "checkpoint_every_secs": 0,
    "statistics": "false",
    "plots": False,
}


def test_every_pass_over_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of steps, of test rows, of rules that stop and of the closing rows are broken off alike."""
    from tapedist.run import train
    from tapedist.training.block_pass import BlockPass

    original, passes, calls = BlockPass.run, [0], [0]

    def run_pass(self: BlockPass, add: Callable[..., Any], *, interrupted: Callable[[], bool]) -> Any:
        passes[0] += 1
        here = passes[0]

        def counted(*words: Any) -> Any:
            if here == strike:
                calls[0] += 1
                signal.raise_signal(signal.SIGTERM)
            return add(*words)

        return original(self, counted, interrupted=interrupted)

    for name, value in BLOCKS.items():
        monkeypatch.setattr(name, value)
    monkeypatch.setattr(BlockPass, "run", run_pass)
    strike = 0
    train.train(TrainConfig(run_dir=str(tmp_path / "undisturbed"), **STREAMED))
    undisturbed, count = outcome(tmp_path / "undisturbed"), passes[0]
    assert count >= 5
    for strike in range(1, count + 1):
        passes[0], calls[0] = 0, 0
        config = TrainConfig(run_dir=str(tmp_path / str(strike)), **STREAMED)
        with pytest.raises(Interrupted, match="stopped by SIGTERM after"):
            train.train(config)
        assert calls[0] == 1  # Of as many turns as there are shards.
        assert passes[0] == strike
        train.train(config)
        assert outcome(tmp_path / str(strike)) == undisturbed


def _start(child_env: dict[str, str], *words: str, warm: bool = True) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*(preforked_python() if warm else [sys.executable]), "-m", "tapedist", "train", *words],
        env={**child_env, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _await(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not happened():
        assert process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_while_tensorflow_is_imported(number: signal.Signals, child_env: dict[str, str], tmp_path: Path) -> None:
    process = _start(child_env, f"--run_dir={tmp_path / 'run'}", warm=False)

    def importing() -> bool:
        maps = Path(f"/proc/{process.pid}/maps")
        return maps.exists() and "tensorflow" in maps.read_text()

    if sys.platform == "linux":
        _await(importing, process)
    else:
        _await((tmp_path / "run" / ".tapedist").exists, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert err == f"tapedist: error: stopped by {number.name}\n"


def test_who_handles_or_ignores_a_signal_keeps_it() -> None:
    got: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR1)}
    signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGHUP)
        assert (got, stop.signum) == ([signal.SIGUSR1], None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_pool_of_processes_hears_of_a_stop() -> None:
    stopped = pickle.loads(pickle.dumps(Interrupted(signal.SIGHUP, " early")))
    assert (str(stopped), stopped.signum, stopped.exit_code) == ("stopped by SIGHUP early", signal.SIGHUP, 129)


def test_nohup_goes_on(child_env: dict[str, str], tmp_path: Path) -> None:
    words = ["nohup", *preforked_python(), "-m", "tapedist", "train", f"--run_dir={tmp_path}", "--num_epochs=100000000"]
    process = subprocess.Popen(
        [*words, "--full_batch_engine=stream", "--learning_rate=0.1"],
        env={**child_env, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert any(line.startswith("Epoch: 0,") for line in process.stdout)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_the_command_saves_and_leaves(number: signal.Signals, child_env: dict[str, str], tmp_path: Path) -> None:
    process = _start(
        child_env,
        f"--run_dir={tmp_path}",
        "--full_batch_engine=stream",
        "--num_epochs=100000000",
        warm=number != signal.SIGTERM,
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("Epoch: 0,"):
            break
    assert os.listdir(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    (line,) = err.splitlines()
    assert line.startswith(f"tapedist: error: stopped by {number.name} after ")
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert line == f"tapedist: error: stopped by {number.name} after {checkpoint.name.split('-')[-1]} updates"


# Passes over rows that would take many minutes: each is a phase that must hear a signal.
LONG = {
    "the standardize pass": ["--standardize=true"],
    "the learning-rate pass": ["--learning_rate=auto"],
    "the test evaluation": ["--test_fraction=0.99999", "--num_epochs=1", "--full_batch_engine=stream", "--cache=none"],
    "the closing evaluation": ["--num_epochs=0", "--test_fraction=0", "--full_batch_engine=stream", "--cache=none"],
    "the statistics pass": ["--stop_at_se=1", "--mode=mini_batch"],
}


@pytest.mark.parametrize("phase", LONG)
def test_long_passes_of_a_real_process(phase: str, child_env: dict[str, str], tmp_path: Path) -> None:
    begins = "Training samples:" if "evaluation" in phase else "Engine:" if "statistics" in phase else "Strategy:"
    process = _start(
        child_env, f"--run_dir={tmp_path / 'run'}", "--n_samples=100000000000", "--cache=none", *LONG[phase]
    )
    assert process.stdout
    assert any(line.startswith(begins) for line in process.stdout)
    time.sleep(1)  # To be inside the pass; whenever it comes, the signal must be heard.
    number = SIGNALS[list(LONG).index(phase) % 5]
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert [line for line in err.splitlines() if "error" in line] == err.splitlines()[-1:]
    assert not (tmp_path / "run" / "done.json").exists()
