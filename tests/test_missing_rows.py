"""A pass that did not sum every row once is refused with its counts, by every engine, and nothing of it is applied."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from warm import warm_python

from tapedist.errors import MissingRowsError

# On two logical CPUs: what the exchange of sums loses, and what a pipeline leaves out.
_DRIVER = """
import contextlib, importlib, json, sys
from unittest import mock

import numpy as np

import tapedist.numerics
import tensorflow as tf

from tapedist.config import TrainConfig
from tapedist.data import pipeline
from tapedist.errors import TapedistError
from tapedist.run import train
from tapedist.training import partials
from tapedist.training.trainer import Trainer
from topology import constants

gather, distribute, take = partials.gather, pipeline.distribute, Trainer._take
taken = []

def lossy(found, *, num_shards):
    '''Padding in the place of a shard, as where members come in another order than was thought.'''
    whole = gather(found, num_shards=num_shards)
    return tf.tensor_scatter_nd_update(whole, [[9]], tf.zeros([1, found.shape[1]], tf.float64))

def misplaced(found, *, num_shards):
    '''The replicas in another order: padding comes in, and the shards that it pushes out are cut off.'''
    width = found.shape[0]
    return tf.roll(gather(found, num_shards=3 * width), width, axis=0)[:num_shards]

def doubled(found, *, num_shards):
    whole = gather(found, num_shards=num_shards)
    return tf.tensor_scatter_nd_add(whole, [[8]], whole[9:10])

def short(strategy, source, plan, *, elements, dtype, parallel):
    '''Each element has a row less of each shard.'''
    first_rows = plan.first_rows

    def fewer(element, replica):
        first, counts = first_rows(element, replica)
        return first, counts - (counts > 0)

    object.__setattr__(plan, "first_rows", fewer)
    return distribute(strategy, source, plan, elements=elements, dtype=dtype, parallel=parallel)

def short_test(strategy, source, plan, **rest):
    return (short if plan.split == "test" else distribute)(strategy, source, plan, **rest)

FAULTS = {
    "lossy": (partials, "gather", lossy),
    "misplaced": (partials, "gather", misplaced),
    "doubled": (partials, "gather", doubled),
    "short": (pipeline, "distribute", short),
    "test": (pipeline, "distribute", short_test),
}

def noting(self, state, result, limit):
    taken.append(len(result.records))
    take(self, state, result, limit)

found = {}
with mock.patch.object(Trainer, "_take", noting):
    for name, (config, values, fault) in json.load(sys.stdin).items():
        taken.clear()
        with constants(values), mock.patch.object(*FAULTS[fault]) if fault else contextlib.nullcontext():
            try:
                found[name] = [train(TrainConfig(**config)).digest, 0, sum(taken)]
            except TapedistError as error:
                found[name] = [str(error), error.exit_code, sum(taken)]
print(json.dumps(found))
"""

ROWS = 1203  # Shard 9 of 16 has some of them in every form.
SMALL = {
    "n_samples": ROWS, "num_epochs": 3, "learning_rate": 0.01, "test_fraction": 0.0, "statistics": "false",
    "plots": False,
}  # fmt: skip
STREAM = {**SMALL, "full_batch_engine": "stream"}
BATCHES = {**SMALL, "mode": "mini_batch", "batch_size": 390}
BLOCKS = {
    "tapedist.data.blocks:RESIDENT_BYTES": 0,
    "tapedist.data.blocks:NARROW_TILE_ROWS": 64,
    "tapedist.data.blocks:BLOCK_BYTES": 256,
}
NONE_HELD = {"tapedist.training.engines.batches:_RESIDENT_BYTES": 0}
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
    if fault == "doubled":
        return plain
    return plain | {
        f"weighted {name}": ({**config, "n_samples": 10_000, **weighted}, values, fault)
        for name, (config, values) in FORMS.items()
    }


def _run(jobs: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [*warm_python(), "-c", _DRIVER],
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


def test_padding_of_even_shards_counts_for_nothing(table: Path):
    """It has a shard's shape, and where all shards are equally long no row is compared with their lengths."""
    even = table.with_name("even.csv")
    even.write_text("".join(table.read_text().splitlines(keepends=True)[:1201]))
    where = {"strategy": "mirrored", "num_virtual_devices": 3}
    forms = {
        "resident": ({**STREAM, "n_samples": 1200}, {}),
        "in a loop": ({**STREAM, "n_samples": 160_000}, {}),  # Too many for one kernel.
        "batches": ({**BATCHES, "n_samples": 1200, "batch_size": 400}, {}),
        "streamed batches": ({**BATCHES, "n_samples": 1200, "batch_size": 400}, NONE_HELD),
    }
    weighted = {"data": str(even), "target": "y", "weight": "w", "standardize": "false", "split": "index"}
    jobs = {name: ({**config, **where}, values, "misplaced") for name, (config, values) in forms.items()}
    jobs |= {
        f"weighted {name}": ({**forms[name][0], **where, "n_samples": 10_000, **weighted}, {}, "misplaced")
        for name in ("resident", "batches")
    }
    found = _run(jobs)
    for name, (words, code, applied) in found.items():
        counts = re.match(r"(\d+) rows were summed where the train split has (\d+) to sum", words)
        assert counts, f"{name}: {words}"
        assert int(counts[1]) == int(counts[2]) * 14 // 16, name  # Two of three times six places are padding.
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
