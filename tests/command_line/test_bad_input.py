"""What users meet, row by row: paths, values, machines and stored state that a run cannot or can barely use.

Commands run in this process (`command`) where nothing but the command is asked, because TensorFlow takes seconds to
start; flags, tables and cluster settings have files of their own.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished

from tapedist import cli
from tapedist.config import TrainConfig
from tapedist.errors import InputError

SMALL = ["--full_batch_engine=stream", "--n_samples=500", "--num_epochs=30", "--plots=false"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """`tapedist WORDS` in this process."""

    def run(*words: str) -> Finished:
        capsys.readouterr()
        code = cli.main(list(words))
        said = capsys.readouterr()
        return Finished(code, said.out, said.err, 0.0)

    return run


def _refused(finished: Finished, code: int, *parts: str) -> None:
    assert finished.code == code, finished.err
    (line,) = finished.err.splitlines()
    assert line.startswith("tapedist: error: ")
    assert line.isprintable()
    for part in parts:
        assert part in line


# Flags that need TensorFlow to be judged.


def test_mirrored_without_devices(command: Callable[..., Finished], tmp_path: Path) -> None:
    _refused(
        command("train", "--strategy=mirrored", f"--run_dir={tmp_path / 'a' / 'b'}"),
        2,
        "--strategy=mirrored: needs a GPU",
        "--num_virtual_devices=N",
    )
    assert list(tmp_path.iterdir()) == []  # Nothing created.


def test_more_logical_devices_than_this_process_has(command: Callable[..., Finished], tmp_path: Path) -> None:
    import tensorflow as tf

    tf.config.list_logical_devices()  # TensorFlow has started, with one.
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    _refused(command("train", "--num_virtual_devices=3", f"--run_dir={run_dir}"), 2, "--num_virtual_devices=3", "new")
    assert list(run_dir.iterdir()) == []  # Nothing changed.


def test_virtual_shards_are_gone(
    command: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "--virtual_shards=3: is gone, because sums no longer depend on how rows are divided; drop it"
    _refused(command("train", "--virtual_shards=3"), 2, said)
    monkeypatch.chdir(tmp_path)
    Path("old.flags").write_text("--seed=1\n--virtual_shards=3\n")
    _refused(command("train", "--flagfile=old.flags"), 2, f"old.flags:2: {said}")


def test_the_folder_of_an_older_run_is_still_read(command: Callable[..., Finished], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert command("train", "--n_samples=50", "--num_epochs=3", f"--run_dir={run_dir}", "--plots=false").code == 0
    with open(run_dir / "config.flags", "a") as stored:
        stored.write("--virtual_shards=16\n")
    for words in (["report", f"--run_dir={run_dir}"], ["evaluate", f"--run_dir={run_dir}"]):
        finished = command(*words)
        assert finished.code == 0, finished.err


def test_no_tpu(command: Callable[..., Finished]) -> None:
    _refused(command("train", "--strategy=tpu"), 2, "--strategy=tpu: no TPU is attached", "--tpu=local")


def test_a_batch_above_the_rows_is_one_step(command: Callable[..., Finished]) -> None:
    finished = command("train", "--mode=mini_batch", "--n_samples=100", "--num_epochs=3", "--batch_size=1000")
    assert (finished.code, finished.err) == (0, "")
    assert "Notice: --batch_size=1000 is above the 80 training rows: every epoch is one step\n" in finished.out


@pytest.mark.parametrize("mode", ["full_batch", "mini_batch"])
def test_no_epochs_evaluate_the_initial_parameters(mode: str, tmp_path: Path) -> None:
    from tapedist.run import train

    result = train.train(
        TrainConfig(mode=mode, num_epochs=0, n_samples=1000, init="zeros", plots=False, run_dir=str(tmp_path))
    )
    assert result.steps == 0
    assert result.parameters.tolist() == [0.0, 0.0]
    assert result.test_loss is not None
    assert result.test_loss > 50
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["split"]) for row in rows][-1] == (0, "test")
    assert json.loads((tmp_path / "done.json").read_text())["steps"] == 0


def test_resume_must_with_nothing_there(command: Callable[..., Finished], tmp_path: Path) -> None:
    _refused(command("train", "--resume=must", f"--run_dir={tmp_path / 'new'}"), 2, "--resume=must: ")
    assert list(tmp_path.iterdir()) == []


# Paths.


@pytest.fixture
def run_dir(command: Callable[..., Finished], tmp_path: Path) -> Path:
    assert command("train", *SMALL, f"--run_dir={tmp_path / 'run'}").code == 0
    return tmp_path / "run"


def test_bad_run_dirs(command: Callable[..., Finished], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "out").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    for name, part in {
        "file": "is a file",
        "file/below": "is a file",
        "full": "is not empty and not a run folder (it holds 'thesis.doc')",
        "links/out": "leads outside",
        "a\x00b": "control characters",
        "a\nb": "control characters",
        "\x1b[2J": "control characters",
    }.items():
        _refused(command("train", *SMALL, f"--run_dir={tmp_path / name}"), 2, "--run_dir=", part)
    _refused(command("train", "--run_dir=gs://bucket/run"), 2, "--run_dir=gs://bucket/run", "copy it out")
    assert sorted(tmp_path.rglob("*")) == before


def test_another_config(command: Callable[..., Finished], run_dir: Path) -> None:
    finished = command("train", *SMALL, f"--run_dir={run_dir}", "--learning_rate=0.5", "--dtype=float64")
    _refused(finished, 3, "learning_rate: stored 0.001, asked 0.5", 'dtype: stored "float32", asked "float64"')
    assert command("train", *SMALL, f"--run_dir={run_dir}", "--cache=none", "--strategy=default").code == 0


def test_twenty_starts_in_one_folder(child_env: dict[str, str], tmp_path: Path) -> None:
    words = ["--full_batch_engine=stream", "--num_epochs=1000000000", "--plots=false", f"--run_dir={tmp_path / 'run'}"]
    starts = [
        subprocess.Popen(
            [sys.executable, "-m", "tapedist", "train", *words],
            env=child_env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(20)
    ]  # fmt: skip
    try:
        # The nineteenth that leaves is the last: the one that trains goes on for ever.
        left = _first_to_leave(starts, 19)
        (trains,) = (start for start in starts if start not in left)
        assert trains.poll() is None
        host = os.uname().nodename
        for start in left:
            assert start.returncode == 2
            assert start.stderr
            (line,) = start.stderr.read().splitlines()
            assert line.startswith("tapedist: error: --run_dir=")
            assert f"is in use by the process with pid {trains.pid} on host {host!r}" in line
        trains.send_signal(signal.SIGTERM)
        assert trains.wait(120) == 143
    finally:
        for start in starts:
            start.kill()
            start.communicate()


def _first_to_leave(starts: list[subprocess.Popen[str]], count: int) -> list[subprocess.Popen[str]]:
    watched = {os.pidfd_open(start.pid): start for start in starts}
    left: list[subprocess.Popen[str]] = []
    import select

    poll = select.poll()
    for descriptor in watched:
        poll.register(descriptor, select.POLLIN)
    while len(left) < count:
        ready = poll.poll(300_000)
        assert ready
        for descriptor, _ in ready:
            poll.unregister(descriptor)
            watched[descriptor].wait()
            left.append(watched[descriptor])
    for descriptor in watched:
        os.close(descriptor)
    return left


# Values.


def _train_on(x: Any, y: Any, *, train: int, **settings: Any) -> Any:
    from sample_sources import ArraySource

    from tapedist.run.train import train as fit

    defaults: dict[str, Any] = {"num_epochs": 20, "learning_rate": 0.01, "plots": False}
    x = np.asarray(x, np.float64)
    source = ArraySource(x.reshape(len(x), -1), np.asarray(y, np.float64), train=train)
    return fit(TrainConfig(**(defaults | settings)), source=source)


@pytest.mark.parametrize("engine", ["stream", "moments"])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([2.0], [3.0]),
        ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]),
        ([4.0, 4.0, 4.0, 4.0], [1.0, 2.0, 3.0, 4.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]], [1.0, 2.0, 4.0]),
        ([[1.0, 0.0, 2.0, 5.0]], [1.0]),
    ],
    ids=["one row", "y equal", "x equal", "all zero", "collinear", "more parameters than rows"],
)
def test_where_the_answer_is_undefined_it_trains(x: Any, y: Any, engine: str, tmp_path: Path) -> None:
    result = _train_on(x, y, train=len(y), full_batch_engine=engine, run_dir=str(tmp_path), dtype="float64")
    assert np.isfinite(result.parameters).all()
    assert result.train_loss <= result.history[0].loss
    assert result.test_loss is None
    for name in ("model.json", "done.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)  # Neither NaN nor infinity.


@pytest.mark.parametrize("arithmetic", ["exact", "fast"])
def test_a_few_rows_are_summed(arithmetic: str) -> None:
    x, y = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0])
    result = _train_on(x, y, train=3, arithmetic=arithmetic, dtype="float64", init="zeros", standardize="false")
    weight = bias = 0.0
    for _ in range(20):
        error = weight * x + bias - y
        weight, bias = weight - 0.01 * np.mean(2 * error * x), bias - 0.01 * np.mean(2 * error)
    np.testing.assert_allclose(result.parameters, [weight, bias], rtol=1e-12)


def test_a_last_batch_of_one_row() -> None:
    x, y = np.arange(5.0), np.array([1.0, 3.0, 2.0, 5.0, 4.0])
    settings = {"dtype": "float64", "init": "zeros", "standardize": "false", "shuffle": "none", "num_epochs": 3}
    result = _train_on(x, y, train=5, mode="mini_batch", batch_size=2, **settings)
    weight = bias = 0.0
    for _ in range(3):
        for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
            error = weight * x[rows] + bias - y[rows]
            weight, bias = weight - 0.01 * np.mean(2 * error * x[rows]), bias - 0.01 * np.mean(2 * error)
    np.testing.assert_allclose(result.parameters, [weight, bias], rtol=1e-12)
    assert result.steps == 9


def test_large_offsets_are_standardized_away() -> None:
    tiny = np.linspace(-1, 1, 50)
    result = _train_on(1e9 + tiny, 3 * tiny, train=50, standardize="true", num_epochs=2000, dtype="float64")
    assert result.weights[0] == pytest.approx(3, rel=1e-5)


def test_squares_that_overflow() -> None:
    x, y = np.array([1e150, -1e160, 1e155]), np.array([1.0, 2.0, 3.0])
    for engine in ("stream", "moments"):
        with pytest.raises(InputError, match=r"overflow.*--standardize"):
            _train_on(x, y, train=3, dtype="float64", standardize="false", full_batch_engine=engine)


@pytest.mark.parametrize(
    ("size", "dtype", "column"), [(1e150, "float64", "x"), (-3e149, "float64", "y"), (1e19, "float32", "x")]
)
@pytest.mark.parametrize("mode", ["--full_batch_engine=stream", "--full_batch_engine=moments", "--mode=mini_batch"])
def test_squares_of_a_table_that_overflow(
    command: Callable[..., Finished], tmp_path: Path, mode: str, size: float, dtype: str, column: str
) -> None:
    """Refused before any update, even where the first loss is still finite."""
    rows = [(0.5, 1.5), (-1.0, 2.0), (1.0, -0.25), (0.25, 1.0)]
    scaled = [(x * size, y) if column == "x" else (x, y * size) for x, y in rows]
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"{x!r},{y!r}\n" for x, y in scaled))
    flags = [f"--data={tmp_path}/t.csv", "--target=y", f"--dtype={dtype}", "--standardize=false", mode]
    finished = command("train", *flags, f"--run_dir={tmp_path}/run", "--test_fraction=0", "--init=zeros")
    _refused(finished, 2, f"column {column} holds numbers up to", f"overflow {dtype}", "--standardize")
    assert not list(tmp_path.glob("run/metrics.jsonl"))


@pytest.mark.parametrize("words", [["--full_batch_engine=stream"], ["--mode=mini_batch", "--batch_size=100"]])
def test_too_high_a_learning_rate(words: list[str], command: Callable[..., Finished], tmp_path: Path) -> None:
    flags = [*words, "--n_samples=500", "--plots=false", "--steps_per_call=2", f"--run_dir={tmp_path}"]
    finished = command("train", *flags, "--learning_rate=3", "--num_epochs=3000", "--checkpoint_every_steps=2")
    _refused(finished, 4, "diverged after ", "the last good loss was ")
    assert not (tmp_path / "done.json").exists()
    checkpoints = list((tmp_path / "checkpoints").glob("0*"))
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        with np.load(checkpoint / "state.npz") as state:
            assert np.isfinite(state["vector"]).all()


# Machine.


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Limits the size of files that this process writes, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root may mount a small disk, where mounting is allowed at all")
    yield disk
    subprocess.run(["umount", disk], check=True)


LONG = ["--full_batch_engine=stream", "--n_samples=500", "--num_epochs=3000", "--log_every_epochs=1", "--plots=false"]
SAVING = ["--checkpoint_every_steps=100", "--steps_per_call=50"]


def _check_what_is_left(run_dir: Path) -> int:
    """The step of the newest checkpoint, which is sound; every whole line of the metrics is true up to there."""
    from tapedist.storage.checkpoints import CheckpointStore

    checkpoint = CheckpointStore(directory=run_dir / "checkpoints").load()
    assert checkpoint is not None
    metrics = (run_dir / "metrics.jsonl").read_bytes()[: int(checkpoint.arrays["metrics_position"])]
    rows = [json.loads(line) for line in metrics.splitlines()]
    assert [row["step"] for row in rows] == list(range(checkpoint.step))
    assert not (run_dir / "done.json").exists()
    return checkpoint.step


def _resumed_equals(command: Callable[..., Finished], run_dir: Path, other: Path) -> None:
    from scripts.fault_injection.outcome import outcome

    assert command("train", *LONG, *SAVING, f"--run_dir={run_dir}").code == 0
    assert command("train", *LONG, f"--run_dir={other}").code == 0
    assert outcome(run_dir) == outcome(other)


def test_file_size_limit(
    command: Callable[..., Finished], file_size_limit: Callable[[int], None], tmp_path: Path
) -> None:
    file_size_limit(100_000)
    finished = command("train", *LONG, *SAVING, f"--run_dir={tmp_path / 'run'}")
    _refused(finished, 6, "File too large", "ulimit -f")
    assert "Learned" not in finished.out
    assert 0 < _check_what_is_left(tmp_path / "run") < 3000
    file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    _resumed_equals(command, tmp_path / "run", tmp_path / "other")


def test_disk_full(command: Callable[..., Finished], small_disk: Path, tmp_path: Path) -> None:
    finished = command("train", *LONG, *SAVING, f"--run_dir={small_disk / 'run'}")
    _refused(finished, 6, "No space left on device", "free some space")
    assert "Learned" not in finished.out
    assert 0 < _check_what_is_left(small_disk / "run") < 3000
    moved = shutil.copytree(small_disk / "run", tmp_path / "run")
    _resumed_equals(command, moved, tmp_path / "other")


def _in_shell(line: str, env: dict[str, str], cwd: Path) -> Finished:
    done = subprocess.run(["bash", "-c", line], env=env, cwd=cwd, capture_output=True, text=True, check=False)
    return Finished(done.returncode, done.stdout, done.stderr, 0.0)


def test_a_foreign_shell_and_a_closed_output(
    child_env: dict[str, str], command: Callable[..., Finished], tmp_path: Path
) -> None:
    """No HOME, another locale and time zone, a reader that goes away: the same files, and nothing on stderr."""
    foreign = {name: value for name, value in child_env.items() if name not in ("HOME", "TF_CPP_MIN_LOG_LEVEL")}
    foreign |= {"TZ": "Pacific/Kiritimati", "LANG": "xx", "PYTHONWARNINGS": "ignore"}
    words = [*SMALL[:-1], "--log_every_epochs=1", f"--run_dir={tmp_path / 'foreign'}"]
    locale = "LC_ALL=tr_TR.UTF-8"  # Set behind the shell, which has its own opinion of it.
    line = f"env {locale} {sys.executable} -m tapedist train {' '.join(words)} | head -n 1; exit ${{PIPESTATUS[0]}}"
    finished = _in_shell(line, foreign, tmp_path)
    assert (finished.code, finished.err) == (0, "")
    assert len(finished.out.splitlines()) == 1
    assert command("train", *words[:-1], f"--run_dir={tmp_path / 'here'}").code == 0
    models = [json.loads((tmp_path / name / "model.json").read_text()) for name in ("foreign", "here")]
    assert models[0] == models[1]
    assert list((tmp_path / "foreign" / "plots").iterdir())


def test_a_full_disk_behind_the_output(
    child_env: dict[str, str], command: Callable[..., Finished], tmp_path: Path
) -> None:
    """Training goes on without its lines; an evaluation has nothing but them."""
    train = f"{sys.executable} -m tapedist train {' '.join(SMALL[:-1])} --plots=false --run_dir=run >/dev/full"
    assert _in_shell(train, child_env, tmp_path).code == 0
    evaluate = _in_shell(f"{sys.executable} -m tapedist evaluate --run_dir=run >/dev/full", child_env, tmp_path)
    assert evaluate.code == 6
    assert evaluate.err.startswith("tapedist: error: standard output: cannot be written: ")
    assert evaluate.err.count("\n") == 1


@pytest.mark.parametrize("megabytes", [600, 3000])
def test_memory_limit(megabytes: int, child_env: dict[str, str], tmp_path: Path) -> None:
    line = f"ulimit -v {megabytes * 1024}; exec {sys.executable} -m tapedist train --run_dir=run"
    _refused(_in_shell(line, child_env, tmp_path), 2, "memory")


# Stored state.


def _newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").iterdir())


def test_damaged_state(command: Callable[..., Finished], run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, f"--run_dir={run_dir}", "--num_epochs=40", "--checkpoint_every_steps=5"]
    assert command("train", *flags).code == 0
    digest = json.loads((run_dir / "done.json").read_text())["digest"]
    state = _newest(run_dir) / "state.npz"
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2])
    finished = command("train", *flags)
    assert finished.code == 0
    (warning,) = finished.err.splitlines()
    assert warning.startswith("tapedist: warning: checkpoint ")
    assert json.loads((run_dir / "done.json").read_text())["digest"] == digest
    for checkpoint in (run_dir / "checkpoints").iterdir():
        (checkpoint / "manifest.json").write_text("{}")
    finished = command("train", *flags)
    assert finished.code == 3
    assert finished.errors[-1].endswith("restore the folder from a copy, or train into another --run_dir")


def test_state_of_a_later_version(command: Callable[..., Finished], run_dir: Path) -> None:
    marker = run_dir / ".tapedist"
    content = json.loads(marker.read_text())
    marker.write_text(json.dumps(content | {"schema": content["schema"] + 1}))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    _refused(command("train", *SMALL, f"--run_dir={run_dir}"), 3, "was made by a later version")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_state_of_another_shape(command: Callable[..., Finished], run_dir: Path) -> None:
    finished = command("train", *SMALL, f"--run_dir={run_dir}", "--num_features=3")
    _refused(finished, 3, "num_features: stored 1, asked 3")
