"""The bit matrix: many configs, each with one digest over replica counts, memory forms and threads.

Sizes shrink so that small data takes the paths of large data: many tiles, blocks, rounds and transfers.
"""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
from topology import run_jobs

BLOCKS = {
    "tapedist.data.orders:RESIDENT_BYTES": 0,
    "tapedist.data.orders:TILE_ROWS": 128,
    "tapedist.data.orders:MOST_PRODUCT_ROWS": 128,
    "tapedist.data.orders:PRODUCT_BYTES": 16384,
    "tapedist.data.orders:BLOCK_BYTES": 8192,
}
# Of models of which nothing is known, whose bits follow the rows of a tile.
LONG_TILES = {"tapedist.training.engine_setup:_MODULE_TILES": 2}
TRANSFERS = {"tapedist.training.engines:_SUPERBATCH_BYTES": 4096}
STREAM = {"mode": "full_batch", "full_batch_engine": "stream", "num_epochs": 6, "n_samples": 3201}
MINI = {"mode": "mini_batch", "num_epochs": 2, "n_samples": 1201, "batch_size": 96}


def _job(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    common = {"learning_rate": 0.01, "log_every_epochs": 1, "seed": 5, "test_fraction": 0.0, "statistics": "false"}
    return {"config": {**common, **config}, **more}


def _full(**settings: Any) -> dict[str, dict[str, Any]]:
    """Full batch on a split at hand, and on blocks that are held or streamed."""
    config = {**STREAM, **settings}
    return {
        "resident": _job(config),
        "held": _job({**config, "cache": "device"}, constants=BLOCKS),
        "streamed": _job({**config, "cache": "none"}, constants=BLOCKS),
    }


def _mini(**settings: Any) -> dict[str, dict[str, Any]]:
    config = {**MINI, **settings}
    return {
        "resident": _job({**config, "cache": "device"}),
        "streamed": _job({**config, "cache": "none"}, constants=TRANSFERS),
    }


def _wide_net(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    config = {**config, "num_features": 64, "learning_rate": 1e-9}
    return _job(config, model="wide_layers", **more)


# Axis after axis around a middle, with what the axes might do to each other: wide rows and doubles, odd batches. Every
# case meets every form of memory; a part of them meets replicas, for which every program is compiled again.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "full d=1": _full(),
    "full d=9": _full(num_features=9),
    "full d=17 float64 adam": _full(num_features=17, dtype="float64", optimizer="adam"),
    "full d=64 nesterov l2": _full(num_features=64, optimizer="nesterov", l2=0.1, n_samples=6403),
    "full d=3 huber": _full(num_features=3, loss="huber"),
    "full even d=3": _full(num_features=3, n_samples=3200),
    "full few rows": _full(num_features=3, n_samples=2, optimizer="momentum"),
    "mini d=1 B=5": _mini(batch_size=5, n_samples=301),
    "mini d=3 B=1000 float64 adam": _mini(
        batch_size=1000, num_features=3, dtype="float64", optimizer="adam", n_samples=2083
    ),
    "mini d=9 B=96": _mini(num_features=9),
    "mini even": _mini(n_samples=1152),
    "mini d=17 B=96 absolute": _mini(num_features=17, loss="absolute", optimizer="momentum"),
    "mini d=64 B=96 l2": _mini(num_features=64, l2=0.1),
    "mini d=64 B=1000 float64": _mini(num_features=64, batch_size=1000, dtype="float64", n_samples=2083),
    "mini in order, no intercept": _mini(shuffle="none", fit_intercept=False, num_features=3),
    "mini rows": {"streamed": _job({**MINI, "shuffle": "rows", "num_features": 3}, constants=TRANSFERS)},
    "moments d=1": {"moments": _job({**STREAM, "full_batch_engine": "moments"}, constants=BLOCKS)},
    "moments d=17 adam": {
        "moments": _job(
            {**STREAM, "full_batch_engine": "moments", "num_features": 17, "optimizer": "adam"}, constants=BLOCKS
        ),
        "whole": _job({**STREAM, "full_batch_engine": "moments", "num_features": 17, "optimizer": "adam"}),
    },
    "weighted full": {name: {**job, "source": "weighted"} for name, job in _full(standardize="false").items()},
    "weighted mini": {
        name: {**job, "source": "weighted"} for name, job in _mini(standardize="false", shuffle="batches").items()
    },
    "own net full": {name: {**job, "source": "curve", "model": "two_layers"} for name, job in _full().items()},
    "own net mini": {
        name: {**job, "source": "weighted", "model": "two_layers"} for name, job in _mini(shuffle="batches").items()
    },
}
OTHERS = {
    # Products of matrices share their sums out to threads unless they are short.
    "moments d=64": {
        "moments": _job(
            {**STREAM, "full_batch_engine": "moments", "num_features": 64, "n_samples": 6403}, constants=BLOCKS
        ),
        "whole": _job({**STREAM, "full_batch_engine": "moments", "num_features": 64, "n_samples": 6403}),
    },
    # Tiles of 1,601 rows: long products, unless they are summed in pieces.
    "own net d=64": {
        "resident": _wide_net(STREAM, constants=LONG_TILES),
        "held": _wide_net({**STREAM, "cache": "device"}, constants=LONG_TILES | BLOCKS),
    },
    "own net d=64 mini": {"resident": _wide_net({**MINI, "batch_size": 1200}, constants=LONG_TILES)},
}
# Many replicas; a replica's programs are compiled for it, so few of both.
MANY = {
    "full d=17 float64 adam on many": {"held": _full(num_features=17, dtype="float64", optimizer="adam")["held"]},
    "mini d=3 B=1000 float64 adam on many": {
        "streamed": _mini(batch_size=1000, num_features=3, dtype="float64", optimizer="adam", n_samples=2083)[
            "streamed"
        ]
    },
}


def _flat(cases: dict[str, dict[str, dict[str, Any]]], *, without: str = "") -> dict[str, Any]:
    """The jobs of some cases; a full batch on blocks may leave out the form of which the rest is known on others."""
    return {
        f"{case}/{form}": job
        for case, forms in cases.items()
        for form, job in forms.items()
        if not ("held" in forms and form == without)
    }


TOPOLOGIES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "default": ({}, _flat(CASES | OTHERS | MANY)),
    "mirrored on 2": (
        {"replicas": 2},
        _flat(dict(list(CASES.items())[::4]), without="streamed"),
    ),
    "mirrored on 3": ({"replicas": 3}, _flat(dict(list(CASES.items())[2::4]), without="held")),
    "mirrored on 4": ({"replicas": 4}, _flat(MANY)),
    "8 threads": ({"intra_op": 8}, _flat({name: case for name, case in (CASES | OTHERS).items() if "d=64" in name})),
}


@pytest.fixture(scope="session")
def outcomes() -> dict[str, dict[str, Any]]:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = {name: pool.submit(run_jobs, jobs, **where) for name, (where, jobs) in TOPOLOGIES.items()}
        return {name: run.result() for name, run in runs.items()}


@pytest.mark.parametrize("topology", [name for name in TOPOLOGIES if name != "default"])
def test_a_topology_changes_no_bit(outcomes: dict[str, dict[str, Any]], topology: str):
    assert outcomes[topology].keys() == TOPOLOGIES[topology][1].keys()
    different = [
        name
        for name, found in outcomes[topology].items()
        if (found["digest"], found["rows"]) != (outcomes["default"][name]["digest"], outcomes["default"][name]["rows"])
    ]
    assert not different


@pytest.mark.parametrize("case", CASES | OTHERS)
def test_where_rows_are_kept_changes_no_bit(outcomes: dict[str, dict[str, Any]], case: str):
    found = [outcome for name, outcome in outcomes["default"].items() if name.startswith(case + "/")]
    assert len({outcome["digest"] for outcome in found}) == 1
    assert len({str(outcome["rows"]) for outcome in found}) == 1


def test_the_forms_are_those_that_the_cases_name(outcomes: dict[str, dict[str, Any]]):
    engines = {
        "resident": {"ResidentEngine", "ResidentBatches"},
        "held": {"HeldEngine"},
        "streamed": {"StreamedEngine", "StreamedBatches"},
        "moments": {"MomentsEngine"},
        "whole": {"MomentsEngine"},
    }
    for name, outcome in outcomes["default"].items():
        assert outcome["engine"] in engines[name.split("/")[1]], name
