"""Training jobs in a process of its own: logical devices, threads and cores must be chosen before TensorFlow starts.

A job is a dict, because it travels as JSON:

    config      fields of `TrainConfig`
    source      name of a source of `sample_sources.py`
    model       name of a module of `sample_sources.py`, with its own loss
    constants   `module:NAME` -> value, set for this job: sizes shrink so that small data takes the paths of large data
    steps       whether to return the parameters before every update

A process runs many jobs, all on one strategy: collectives remember their group.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from preforked import preforked_python

TESTS = Path(__file__).resolve().parent


def run_jobs(jobs: Mapping[str, Any], *, replicas: int = 0, intra_op: int = 0, cores: int = 0) -> dict[str, Any]:
    """Runs jobs in a new process.

    Args:
        jobs: by name.
        replicas: logical CPUs to mirror on; 0 for the default strategy.
        intra_op: TensorFlow's threads within an operation; 0 for its default.
        cores: how many of the machine's cores the process may use; 0 for all.

    Returns:
        By job: `digest`, `rows` (metrics without times and rates, numbers in hexadecimal), `parameters`, `engine`, and
        `steps` (`[loss, parameters before the update]` for each) if asked for; or `error`, its class and words.
    """
    where = {"strategy": "mirrored", "num_virtual_devices": replicas} if replicas else {"strategy": "default"}
    placed = {name: {**job, "config": {**job["config"], **where}} for name, job in jobs.items()}
    order = {"replicas": replicas, "intra_op": intra_op, "cores": cores, "jobs": placed}
    path = os.pathsep.join(filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]))
    # On fewer cores the process starts from nothing, so that no library has counted others.
    python = [sys.executable, "-W", "ignore"] if cores else preforked_python()
    finished = subprocess.run(
        [*python, __file__],
        env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


def use_all_cores() -> None:
    """Lets this process use what the tests' processes share out among themselves; see `conftest.py`."""
    if cores := os.environ.get("TESTS_ALL_CORES"):
        os.sched_setaffinity(0, map(int, cores.split(",")))


def _main() -> None:
    order = json.load(sys.stdin)
    if not order["replicas"]:
        use_all_cores()
    if order["cores"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: order["cores"]])
    import tensorflow as tf

    if order["intra_op"]:
        tf.config.threading.set_intra_op_parallelism_threads(order["intra_op"])
    print(json.dumps({name: _outcome(job) for name, job in order["jobs"].items()}))


def _outcome(job: Mapping[str, Any]) -> dict[str, Any]:
    from tapedist.errors import TapedistError

    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(constants(job.get("constants", {})))
            steps, engines = stack.enter_context(_watched())
            started = time.process_time()
            outcome = _trained(job)
            outcome |= {"engine": engines[0], "seconds": time.process_time() - started}
            return outcome | ({"steps": steps} if job.get("steps") else {})
    except TapedistError as error:
        return {"error": f"{type(error).__name__}: {error}"}


@contextlib.contextmanager
def constants(values: Mapping[str, Any]) -> Iterator[None]:
    """While entered, sets `module:NAME` -> value."""
    with contextlib.ExitStack() as stack:
        for place, value in values.items():
            module, name = place.split(":")
            stack.enter_context(mock.patch.object(importlib.import_module(module), name, value))
        yield


def _trained(job: Mapping[str, Any]) -> dict[str, Any]:
    import sample_sources

    from tapedist.config import TrainConfig
    from tapedist.run.train import train

    extra: dict[str, Any] = {}
    if job.get("source"):
        extra["source"] = sample_sources.SOURCES[job["source"]]
    if job.get("model"):
        extra |= {"model": sample_sources.MODELS[job["model"]], "loss": sample_sources.quartic}
    result = train(TrainConfig(**job["config"]), **extra)
    return {
        "digest": result.digest,
        "parameters": result.parameters.tolist(),
        "rows": [[r.step, r.epoch, r.split, float(r.loss).hex(), float(r.penalty).hex()] for r in result.history],
        "losses": [str(result.train_loss), str(result.test_loss)],
    }


@contextlib.contextmanager
def _watched() -> Iterator[tuple[list[list[float]], list[str]]]:
    """Notes what every call of the training engine leaves, and the engines' classes."""
    from tapedist.training.trainer import Trainer

    steps: list[list[float]] = []
    engines: list[str] = []
    take, init = Trainer._take, Trainer.__init__

    def noting_take(self: Any, state: Any, result: Any, *rest: Any) -> None:
        steps.extend([float(r[0] / r[1]), *r[4:].tolist()] for r in result.records)
        take(self, state, result, *rest)

    def noting_init(self: Any, **parts: Any) -> None:
        engines.append(type(parts["engine"]).__name__)
        init(self, **parts)

    with mock.patch.object(Trainer, "_take", noting_take), mock.patch.object(Trainer, "__init__", noting_init):
        yield steps, engines


if __name__ == "__main__":
    _main()
