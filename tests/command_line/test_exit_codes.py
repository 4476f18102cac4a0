"""Each exit code of `tapedist train` by a cause that users meet; one line each, and no traceback."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from tapedist import cli

QUICK = ["train", "--full_batch_engine=stream", "--n_samples=300", "--num_epochs=20", "--plots=false"]


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = cli.main([*QUICK, *words])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return code, err.splitlines()


def _only_line(lines: list[str]) -> str:
    (line,) = lines
    assert line.startswith("tapedist: error: ")
    return line


def test_0_done_and_done_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for _ in range(2):
        assert _run(capsys, f"--run_dir={tmp_path}") == (0, [])
    assert cli.main([*QUICK, f"--run_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "Finished: this run has done its 20 epochs; more --num_epochs continue it\n" in out
    assert json.loads((tmp_path / "done.json").read_text())["digest"] in out


def test_1_a_bug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tapedist.run import train

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(train, "open_source", broken)
    code, lines = _run(capsys)
    assert code == 1
    assert _only_line(lines).startswith("tapedist: error: bug in tapedist: ZeroDivisionError: by zero; ")


def test_2_bad_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, lines = _run(capsys, "--learning_rate=-1", "--batch_size=0", f"--run_dir={tmp_path / 'new'}")
    assert code == 2
    assert len(lines) == 2
    assert not (tmp_path / "new").exists()


def test_2_out_of_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from tapedist.run import train

    def exhausted(*_: Any, **__: Any) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(train, "open_source", exhausted)
    code, lines = _run(capsys)
    assert code == 2
    assert "out of memory" in _only_line(lines)


def test_3_refused_resume(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert _run(capsys, f"--run_dir={tmp_path}")[0] == 0
    code, lines = _run(capsys, f"--run_dir={tmp_path}", "--seed=5")
    assert code == 3
    assert "seed: stored 0, asked 5" in _only_line(lines)


def test_4_diverged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, lines = _run(capsys, "--learning_rate=20", "--num_epochs=500", f"--run_dir={tmp_path}")
    assert code == 4
    assert "diverged after " in _only_line(lines)


def test_6_cannot_write(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        code, lines = _run(capsys, f"--run_dir={tmp_path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 6
    assert "cannot " in _only_line(lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_128_and_the_signal(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tapedist.results.monitor import Monitor

    advance = Monitor.advance

    def stopped(self: Monitor, **facts: Any) -> None:
        advance(self, **facts)
        signal.raise_signal(number)

    monkeypatch.setattr(Monitor, "advance", stopped)
    code, lines = _run(capsys, f"--run_dir={tmp_path}", "--steps_per_call=1")
    assert code == 128 + number
    assert _only_line(lines) == f"tapedist: error: stopped by {signal.Signals(number).name} after 1 updates"
    assert list((tmp_path / "checkpoints").glob("0*-step-1"))
