"""A pass that did not sum every row once is refused with its counts, by every engine, and nothing of it is applied.

The known-answer test would find some of these faults first; it is left out where a pass is to find them.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preforked import preforked_python

from tapedist.errors import MissingRowsError

# On two logical CPUs: what the exchange of sums loses, and what a pipeline leaves out.
_DRIVER = """
import contextlib, importlib, json, sys
from unittest import mock

import numpy as np

import tapedist.runtime_flags
import tensorflow as tf

from tapedist.config import TrainConfig
from tapedist.data import pipeline
from tapedist.errors import TapedistError
from tapedist.run.train import train
from tapedist.training import known_answer, moment_steps, replicas, steps
from tapedist.training.trainer import Trainer
from topology import constants

add, distribute, on_host, take = replicas.all_added, pipeline.distribute, pipeline.host_elements, Trainer._take
taken = []

def times_on_the_first(sums, factor):
    context = tf.distribute.get_replica_context()
    return tf.where(tf.equal(context.replica_id_in_sync_group, 0), factor * sums, sums)

def lossy(sums):
    return add(times_on_the_first(sums, tf.zeros([], sums.dtype)))

def doubled(sums):
    return add(times_on_the_first(sums, tf.constant(2, sums.dtype)))

def shorten(plan):
    '''Each element has a row less of each slot.'''
    first_rows = plan.first_rows

    def fewer(element, replica):
        first, counts = first_rows(element, replica)
        return first, counts - (counts > 0)

    object.__setattr__(plan, "first_rows", fewer)

def short(strategy, source, plan, **rest):
    shorten(plan)
    return distribute(strategy, source, plan, **rest)

def short_on_host(source, plan, **rest):
    shorten(plan)
    return on_host(source, plan, **rest)

def short_test(strategy, source, plan, **rest):
    return (short if plan.split == "test" else distribute)(strategy, source, plan, **rest)

def exchanged(fault, *, known):
    found = [(module, "all_added", fault) for module in (replicas, steps, moment_steps)]
    return found if known else [*found, (known_answer, "_refuse_fault", lambda *_: None)]

FAULTS = {
    "": [],
    "lossy": exchanged(lossy, known=False),
    "doubled": exchanged(doubled, known=False),
    "known lossy": exchanged(lossy, known=True),
    "short": [(pipeline, "distribute", short), (pipeline, "host_elements", short_on_host)],
    "test": [(pipeline, "distribute", short_test)],
}

def noting(self, state, result, *rest):
    taken.append(len(result.records))
    take(self, state, result, *rest)

found = {}
with mock.patch.object(Trainer, "_take", noting):
    for name, (config, values, fault) in json.load(sys.stdin).items():
        taken.clear()
        with constants(values), contextlib.ExitStack() as stack:
            for patch in FAULTS[fault]:
                stack.enter_context(mock.patch.object(*patch))
            try:
                found[name] = [train(TrainConfig(**config)).digest, 0, sum(taken)]
            except TapedistError as error:
                found[name] = [str(error), error.exit_code, sum(taken)]
print(json.dumps(found))
"""

ROWS = 1203
SMALL = {
    "n_samples": ROWS, "num_epochs": 3, "learning_rate": 0.01, "test_fraction": 0.0, "statistics": "false",
    "plots": False,
}  # fmt: skip
STREAM = {**SMALL, "full_batch_engine": "stream"}
BATCHES = {**SMALL, "mode": "mini_batch", "batch_size": 390}
BLOCKS = {
    "tapedist.data.orders:RESIDENT_BYTES": 0,
    "tapedist.data.orders:TILE_ROWS": 64,
    "tapedist.data.orders:MOST_PRODUCT_ROWS": 64,
    "tapedist.data.orders:BLOCK_BYTES": 512,
}
NONE_HELD = {"tapedist.training.engines:_RESIDENT_BYTES": 0}
FORMS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "resident": (STREAM, {}),
    "held": ({**STREAM, "cache": "device"}, BLOCKS),
    "streamed": ({**STREAM, "cache": "none"}, BLOCKS),
    "moments": ({**SMALL, "full_batch_engine": "moments"}, BLOCKS),
    "whole moments": ({**SMALL, "full_batch_engine": "moments"}, {}),
    "batches": (BATCHES, {}),
    "streamed batches": (BATCHES, NONE_HELD),
}


def _jobs(table: Path, fault: str, **where: Any) -> dict[str, Any]:
    """Each form on synthetic rows and on a table's with weights."""
    weighted = {"data": str(table), "target": "y", "weight": "w", "standardize": "false", "split": "index", **where}
    plain = {name: ({**config, **where}, values, fault) for name, (config, values) in FORMS.items()}
    return plain | {
        f"weighted {name}": ({**config, "n_samples": 10_000, **weighted}, values, fault)
        for name, (config, values) in FORMS.items()
    }


def _run(jobs: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [*preforked_python(), "-c", _DRIVER],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "table.csv"
    numbers = np.random.default_rng(1).normal(size=(ROWS, 2))
    lines = [f"{a:.5f},{2 * a + 0.1 * b:.5f},{0.25 * (i % 5)}" for i, (a, b) in enumerate(numbers)]  # Some weigh 0.
    path.write_text("\n".join(["a,y,w", *lines, ""]))
    return path


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("lossy", {"strategy": "mirrored", "num_virtual_devices": 2}),
        ("doubled", {"strategy": "mirrored", "num_virtual_devices": 2}),
        ("short", {"strategy": "default"}),
    ],
)
def test_every_engine_refuses_such_a_pass_and_applies_nothing(fault: str, where: dict[str, Any], table: Path):
    jobs = _jobs(table, fault, **where)
    found = _run(jobs)
    assert found.keys() == jobs.keys()
    for name, (words, code, applied) in found.items():
        counts = re.match(r"(\d+) rows were summed where the train split has (\d+) to sum; nothing of this pass", words)
        assert counts, f"{name}: {words}"
        wanted = 390 if "batches" in name else ROWS
        assert int(counts[2]) == wanted, name
        assert (int(counts[1]) > wanted) == (fault == "doubled"), f"{name}: {words}"
        assert (code, applied) == (1, 0), name


def test_the_known_answer_test_finds_what_an_exchange_loses(table: Path):
    jobs = _jobs(table, "known lossy", strategy="mirrored", num_virtual_devices=2)
    # Blocks of moments are added on the host, which no known answer goes through.
    jobs = {name: job for name, job in jobs.items() if name in ("resident", "held", "batches", "weighted streamed")}
    for name, (words, code, applied) in _run(jobs).items():
        assert words.startswith("--arithmetic=exact: a step over rows with a known answer came out different"), name
        assert (code, applied) == (2, 0), name


def test_what_whole_tiles_lack_is_counted(table: Path):
    """Where all tiles are full no row is compared with their count."""
    even = table.with_name("even.csv")
    even.write_text("".join(table.read_text().splitlines(keepends=True)[:1201]))
    where = {"strategy": "mirrored", "num_virtual_devices": 2}
    forms: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
        "resident": ({**STREAM, "n_samples": 1200}, {}),
        "in a loop": ({**STREAM, "n_samples": 160_000}, {}),
        "batches": ({**BATCHES, "n_samples": 1200, "batch_size": 400}, {}),
        "streamed batches": ({**BATCHES, "n_samples": 1200, "batch_size": 400}, NONE_HELD),
    }
    weighted = {"data": str(even), "target": "y", "weight": "w", "standardize": "false", "split": "index"}
    jobs = {name: ({**config, **where}, values, "short") for name, (config, values) in forms.items()}
    jobs |= {
        f"weighted {name}": ({**forms[name][0], **where, "n_samples": 10_000, **weighted}, {}, "short")
        for name in ("resident", "batches")
    }
    found = _run(jobs)
    for name, (words, code, applied) in found.items():
        counts = re.match(r"(\d+) rows were summed where the train split has (\d+) to sum", words)
        assert counts, f"{name}: {words}"
        assert int(counts[1]) == int(counts[2]) - 2, name  # A row of each replica.
        assert (code, applied) == (1, 0), name


def test_the_test_split_is_counted_too_and_nothing_is_wrong_otherwise(table: Path):
    where = {"strategy": "mirrored", "num_virtual_devices": 2}
    evaluation = {**BATCHES, "test_fraction": 0.3, "eval_every_epochs": 1, **where}
    jobs = {name: (config, values, "") for name, (config, values, _) in _jobs(table, "", **where).items()}
    jobs["test rows"] = (evaluation, BLOCKS, "")
    broken = {"test rows, whole": (evaluation, {}, "test"), "test rows, streamed": (evaluation, BLOCKS, "test")}
    found = _run(jobs | broken)
    for words, code, _ in (found.pop(name) for name in broken):
        assert re.match(r"\d+ rows were summed where the test split has 360 to sum; nothing of this pass", words)
        assert code == 1
    assert {code for _, code, _ in found.values()} == {0}
    assert all(applied for _, _, applied in found.values())


@pytest.mark.parametrize("found", [np.array([7.0, 8.0]), np.array([8.0, 9.0]), np.array([np.nan]), np.array([8.5])])
def test_any_other_number_is_refused(found: np.ndarray):
    from tapedist.training.steps import check_rows

    check_rows(np.full(2, 8.0), 8, "train")
    check_rows(np.array([8.0, 3.0]), np.array([8, 3, 5]), "train")
    check_rows(np.array([2.0**53]), 2**53, "train")
    with pytest.raises(MissingRowsError, match="rows were summed where the test split has 8 to sum"):
        check_rows(found, 8, "test")
