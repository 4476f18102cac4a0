"""The work of tapedist's engines, for this version and for 0.1 alike: what differs between them is how one is made."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from peer import RATE, Work, make_rows

# What both versions know of a task's config.
DEFAULTS = {"test_fraction": 0.0, "learning_rate": RATE}


def engine_work(task: Mapping[str, Any], make: Callable[[], Any], run_steps: Callable[..., Any]) -> Work:
    """Steps of an engine.

    Args:
        task: `kind` "engine", or "pass" where all that the engine has learned from the rows is forgotten before;
            `steps`, `features`, and `config` with fields of `TrainConfig`; `table`, rows and features of what
            `config.data` names, if it does.
        make: the engine that `train` would run.
        run_steps: `(engine, state, step, number of steps) -> result`.
    """
    if task["table"]:
        _write_table(*task["table"], pathlib.Path(task["config"]["data"]))
    engine = make()
    untouched = dict(vars(engine))
    # A run goes on where the last one ended, as training does: to begin anew would make a new input pipeline.
    ends = itertools.count(task["steps"], task["steps"])

    def run() -> dict[str, Any]:
        if task["kind"] == "pass":
            vars(engine).clear()
            vars(engine).update(untouched)
        end, state, records = next(ends), np.zeros(task["features"] + 1), np.zeros([1, 2])
        step = end - task["steps"]
        while step < end:
            result = run_steps(engine, state, step, end - step)
            state, step, records = result.state, step + result.applied, result.records
        loss = float(records[-1, 0] / records[-1, 1])
        return {"weight": float(state[0]), "bias": float(state[-1]), "loss": loss}

    return Work(run, note=f"{engine.name}: {engine.reason}")


def _write_table(n: int, d: int, path: pathlib.Path) -> None:
    """Writes `n` float32 rows, unless that has been done."""
    if path.exists():
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    x, y = make_rows(n, d)
    columns = {f"x{j}": column for j, column in enumerate(x.reshape(n, -1).T)}
    pq.write_table(pa.table({**columns, "y": y}), path)


def columns_of(task: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
    """`(x [n, d], y [n][, w [n]])` of a task whose rows are arrays in memory."""
    config = task["config"]
    x, y = make_rows(config["n_samples"], config.get("num_features", 1), config.get("dtype", "float32"))
    weights = [np.random.default_rng(1).uniform(0.5, 2, len(y)).astype(y.dtype)] if task["weighted"] else []
    return x.reshape(len(y), -1), y, *weights
