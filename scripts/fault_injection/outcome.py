"""What a finished run is judged by, and what was found over all runs."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np

_WALL_CLOCK = ("time", "examples_per_sec")


def outcome(run_dir: Path) -> dict[str, object]:
    """All of a finished run that must not depend on what it went through."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = max((run_dir / "checkpoints").iterdir(), key=lambda path: path.name)
    with np.load(last / "state.npz") as state:
        arrays = {name: state[name].tobytes() for name in state.files if name != "metrics_position"}
    return {
        "metrics": [{name: value for name, value in row.items() if name not in _WALL_CLOCK} for row in rows],
        "done": json.loads((run_dir / "done.json").read_text()),
        "model": json.loads((run_dir / "model.json").read_text()),
        "state": arrays,
    }


@dataclasses.dataclass
class Tally:
    """What was done and found, over all runs.

    Attributes:
        wanted: faults that are to fall.
        faults: `(mode, kind)` -> faults that fell.
        compared: mode -> finished runs that were held against the undisturbed one.
        starts: processes started, but for the undisturbed runs.
        leaving_secs: from each SIGTERM or SIGINT to the end of the process.
        failures: a line each.
    """

    wanted: int
    faults: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    compared: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    starts: int = 0
    leaving_secs: list[float] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> int:
        return self.wanted - sum(self.faults.values())
