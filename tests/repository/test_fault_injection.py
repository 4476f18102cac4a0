"""The fault injection script in short: one run and one fault of each kind; and that it would find a difference."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from scripts.fault_injection import faults as module
from scripts.fault_injection.outcome import outcome
from scripts.fault_injection.process import Watch

pytestmark = pytest.mark.usefixtures("all_cores")


def test_a_short_torture(tmp_path: Path, child_env: dict[str, str]) -> None:
    words = ["--kills=1", "--saves=1", "--doubles=0", "--signals=1", "--moves=1", "--modes=resident"]
    done = subprocess.run(
        [sys.executable, REPO / "scripts" / "inject_faults.py", *words, f"--output={tmp_path / 'result.md'}"],
        env=child_env | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    text = (tmp_path / "result.md").read_text()
    assert "**0 failures.**" in text
    header, _, row = (line for line in text.splitlines() if line.startswith("|") and not line.startswith("| all"))
    cells = dict(zip((c.strip() for c in header.split("|")), (c.strip() for c in row.split("|")), strict=True))
    assert [cells[kind] for kind in ("kill", "save", "term", "move")] == ["1", "1", "1", "1"]
    assert int(cells["runs compared"]) >= 1
    assert list(tmp_path.iterdir()) == [tmp_path / "result.md"]


def test_every_blow_is_dealt_once() -> None:
    counts = {"kill": 100, "save": 10, "double": 10, "signal": 25, "move": 20}
    modes = list(module.MODES)
    scheduled = list(module.trials(counts, modes, random.Random(3)))
    assert {mode for mode, _ in scheduled} == set(modes)
    assert all(0 < len(faults) <= module.FAULTS_PER_RUN for _, faults in scheduled)
    faults = [fault for _, hand in scheduled for fault in hand]
    assert len(faults) == sum(counts.values())
    assert sum(fault.kind in ("term", "int") for fault in faults) == 25
    for mode in modes:
        phases = {fault.phase for m, hand in scheduled for fault in hand if m == mode and fault.kind in ("term", "int")}
        assert phases == {"start", "load", "train", "plot"}


def test_a_difference_is_found(tmp_path: Path) -> None:
    import numpy as np

    def finished(name: str, *, loss: float = 0.5, time: float = 1.0, slot: float = 2.0) -> Path:
        run_dir = tmp_path / name
        checkpoint = run_dir / "checkpoints" / "00000001-step-3"
        checkpoint.mkdir(parents=True)
        np.savez(checkpoint / "state.npz", vector=np.array([1.0, slot]), metrics_position=np.int64(time))
        (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "time": time}) + "\n")
        for file in ("done.json", "model.json"):
            (run_dir / file).write_text('{"digest": "d"}')
        return run_dir

    wanted = outcome(finished("wanted"))
    assert outcome(finished("later", time=7.0)) == wanted
    assert outcome(finished("slot", slot=2.5))["state"] != wanted["state"]
    assert outcome(finished("loss", loss=0.25))["metrics"] != wanted["metrics"]


def test_a_watch_names_what_is_made(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("inotify is Linux's")
    with Watch(tmp_path) as watch:
        assert watch.made(seconds=0) == []
        (tmp_path / "tmp-1").mkdir()
        (tmp_path / "b").write_text("")
        assert watch.made(seconds=5) == ["tmp-1", "b"]
