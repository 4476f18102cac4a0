#!/usr/bin/env python3
"""What a second process costs: one process on two cores against two processes on one core each.

    python scripts/bench/workers.py [--n_samples=64000000] [--epochs=60] [--rounds=3]

Both run `tapedist train` on the same rows, held in memory, with the `stream` engine; their rates are those of
`metrics.jsonl`, the median over the epochs after the first tenth. The turns alternate. Prints a JSON object: the rates
in rows per second, their ratio, and whether all digests were equal.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from tapedist.cluster.network import PortReservation


def _start(words: list[str], cores: set[int], cluster: dict[str, Any] | None) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TF_CONFIG"}
    if cluster:
        environment["TF_CONFIG"] = json.dumps(cluster)
    return subprocess.Popen(
        [sys.executable, "-m", "tapedist", "train", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def _measured(arguments: argparse.Namespace, workers: list[set[int]]) -> tuple[float, str]:
    """`(rows per second, digest)` of one run, with a process on each of these sets of cores."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"--run_dir={folder}/run", f"--n_samples={arguments.n_samples}", f"--num_epochs={arguments.epochs}",
            "--test_fraction=0", "--full_batch_engine=stream", "--cache=device", "--learning_rate=0.01",
            "--log_every_epochs=1", "--plots=false",
        ]  # fmt: skip
        if len(workers) == 1:
            processes = [_start(words, workers[0], None)]
        else:
            ports = PortReservation(len(workers))
            addresses = [f"127.0.0.1:{port}" for port in ports.ports]
            processes = [
                _start(words, cores, {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
                for rank, cores in enumerate(workers)
            ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"tapedist train left with {codes}")
        rows = [json.loads(line) for line in pathlib.Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        rates = [row["examples_per_sec"] for row in rows if row["epoch"] > arguments.epochs // 10]
        digest = json.loads(pathlib.Path(folder, "run", "model.json").read_text())["digest"]
        return statistics.median(filter(None, rates)), digest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_samples", type=int, default=64_000_000)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    one, two = sorted(os.sched_getaffinity(0))[:2]
    layouts = {"one process, two cores": [{one, two}], "two processes, a core each": [{one}, {two}]}
    rates: dict[str, list[float]] = {name: [] for name in layouts}
    digests = set()
    for _ in range(arguments.rounds):
        for name, workers in layouts.items():
            rate, digest = _measured(arguments, workers)
            rates[name].append(rate)
            digests.add(digest)
            print(f"{name}: {rate / 1e6:.0f} M rows/s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    alone, together = medians.values()
    print(
        json.dumps(
            {"rows_per_sec": medians, "ratio": together / alone, "one_digest": len(digests) == 1} | vars(arguments)
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
