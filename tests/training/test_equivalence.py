"""The promise: one config gives the same bits on any topology, and they are the right numbers.

The acceptance config runs in both modes on every topology, in a process each; every run is held against the first one
bit by bit, and against a NumPy float64 oracle step by step.
"""

from __future__ import annotations

import concurrent.futures
import itertools
from typing import Any

import numpy as np
import pytest
from oracle import Rule, batches, descend, first_difference
from topology import run_jobs

STEPS = 200
N, SEED, BATCH = 10_007, 3, 96
TRAIN = N - N // 5
ACCEPTANCE = {
    "n_samples": N,
    "num_features": 3,
    "m": [9.0, -4.0, 0.5],
    "optimizer": "momentum",
    "learning_rate": 0.003,
    "batch_size": BATCH,
    "seed": SEED,
    "log_every_epochs": 1,
    "eval_every_epochs": 1,
    "statistics": "false",
}
# `moments` is another way to the same numbers, so it has a digest of its own.
MODES: dict[str, dict[str, Any]] = {
    "full_batch": {"mode": "full_batch", "full_batch_engine": "stream", "num_epochs": STEPS, "eval_every_epochs": 50},
    "moments": {"mode": "full_batch", "full_batch_engine": "moments", "num_epochs": STEPS, "eval_every_epochs": 50},
    "mini_batch": {"mode": "mini_batch", "num_epochs": 3},
}
TESTED = ("mini_batch", "float32")
DTYPES = {"float32": 1e-6, "float64": 1e-12}
# The same training rows without test rows, which would be compiled for every replica: one job's are enough.
NO_TEST = {"n_samples": TRAIN, "test_fraction": 0.0}
JOBS = {
    f"{mode}-{dtype}": {
        "config": {**ACCEPTANCE, **settings, "dtype": dtype, **({} if (mode, dtype) == TESTED else NO_TEST)},
        "steps": True,
    }
    for (mode, settings), dtype in itertools.product(MODES.items(), DTYPES)
    if (mode, dtype) != ("moments", "float32")  # Float64 in either case.
}
METRICS = {mode: {"config": {**ACCEPTANCE, **MODES[mode], "dtype": "float64"}} for mode in ("full_batch", "mini_batch")}
TOPOLOGIES: dict[str, dict[str, int]] = {
    "default": {},
    **{f"mirrored on {replicas}": {"replicas": replicas} for replicas in (2, 3, 5, 8)},
    **{f"{threads} intra-op threads": {"intra_op": threads} for threads in (1, 8)},
    "one core": {"cores": 1},
}
# Every replica compiles its programs: where all jobs have met few replicas, one of each kind meets many. The whole
# product of configs and surroundings is what `scripts/bit_matrix.py` is for.
FEW = ("mini_batch-float32", "full_batch-float64", "moments-float64")
MET = {name: list(JOBS) if name in ("default", "mirrored on 3") else list(FEW) for name in TOPOLOGIES}
PAIRS = [(topology, job) for topology, jobs in MET.items() for job in jobs]


@pytest.fixture(scope="session")
def outcomes() -> dict[str, dict[str, Any]]:
    """What every job gives on every topology."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = {
            name: pool.submit(
                run_jobs, {job: JOBS[job] for job in MET[name]} | ({} if topology else METRICS), **topology
            )
            for name, topology in TOPOLOGIES.items()
        }
        return {name: run.result() for name, run in runs.items()}


@pytest.mark.parametrize(("topology", "job"), PAIRS)
def test_one_digest_and_one_loss_series(outcomes: dict[str, dict[str, Any]], topology: str, job: str):
    wanted, found = outcomes["default"][job], outcomes[topology][job]
    assert found["digest"] == wanted["digest"]
    assert found["rows"] == wanted["rows"]
    assert found["losses"] == wanted["losses"]
    assert found["steps"] == wanted["steps"]


@pytest.fixture(scope="session")
def rows() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The rows of each split as the source gives them, in float64."""
    import tensorflow as tf

    from tapedist.config import TrainConfig
    from tapedist.data.catalog import open_source

    source = open_source(TrainConfig(**ACCEPTANCE))
    return {
        split: tuple(column.numpy().astype(np.float64) for column in source.take(split, tf.range(n, dtype=tf.int64)))
        for split, n in (("train", TRAIN), ("test", N - TRAIN))
    }


@pytest.fixture(scope="session")
def trajectories(rows: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, list[tuple[float, np.ndarray]]]:
    """The oracle's losses and parameters before every update."""
    x, y = rows["train"]
    orders = {
        "full_batch": itertools.repeat(np.arange(TRAIN)),
        "mini_batch": batches(TRAIN, BATCH, shuffle="batches", seed=SEED),
    }
    theta = np.random.Generator(np.random.Philox(SEED)).standard_normal(4)
    found = {
        mode: list(descend(theta, ((x[i], y[i]) for i in order), Rule("momentum", 0.003, 4), steps=STEPS))
        for mode, order in orders.items()
    }
    return {**found, "moments": found["full_batch"]}


@pytest.mark.parametrize(("topology", "job"), PAIRS)
def test_the_oracle_agrees_at_every_step(
    outcomes: dict[str, dict[str, Any]],
    trajectories: dict[str, list[tuple[float, np.ndarray]]],
    topology: str,
    job: str,
):
    mode, dtype = job.split("-")
    outcome, oracle = outcomes[topology][job], trajectories[mode]
    losses, parameters = [step[0] for step in outcome["steps"]], [step[1:] for step in outcome["steps"]]
    if mode != "mini_batch":  # Of a run of exactly 200 updates, the last parameters are the result's.
        parameters.append(outcome["parameters"])
    wanted = [theta for _, theta in oracle[: len(parameters)]]
    assert len(wanted) == STEPS + 1
    assert not first_difference(parameters, wanted, relative=DTYPES[dtype])
    np.testing.assert_allclose(losses[:STEPS], [loss for loss, _ in oracle[:STEPS]], rtol=10 * DTYPES[dtype])


def test_rows_of_metrics_mean_what_they_say(
    outcomes: dict[str, dict[str, Any]],
    rows: dict[str, tuple[np.ndarray, np.ndarray]],
    trajectories: dict[str, list[tuple[float, np.ndarray]]],
):
    found = {mode: {(r[0], r[2]): float.fromhex(r[3]) for r in outcomes["default"][mode]["rows"]} for mode in METRICS}
    oracle = trajectories["full_batch"]
    x, y = rows["test"]
    for step in range(STEPS + 1):
        assert found["full_batch"][step, "train"] == pytest.approx(oracle[step][0], rel=1e-11)
    for step in range(0, STEPS + 1, 50):
        theta = oracle[step][1]
        assert found["full_batch"][step, "test"] == pytest.approx(
            np.mean((x @ theta[:3] + theta[3] - y) ** 2), rel=1e-11
        )
    # Of mini batches: the mean over the epoch's rows, each at the parameters before its batch's update.
    sizes = [BATCH] * 83 + [TRAIN - 83 * BATCH]
    order = [len(i) for i in itertools.islice(batches(TRAIN, BATCH, shuffle="batches", seed=SEED), 84)]
    assert sorted(order) == sorted(sizes)
    mean = np.average([loss for loss, _ in trajectories["mini_batch"][:84]], weights=order)
    assert found["mini_batch"][84, "train"] == pytest.approx(mean, rel=1e-11)
