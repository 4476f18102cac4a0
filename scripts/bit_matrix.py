#!/usr/bin/env python3
"""Trains many configs in many surroundings, and holds every digest against the reference's.

    scripts/bit_matrix.py --output=scripts/matrix/results/matrix.md [--configs=core] [--only=threads,devices]
    scripts/bit_matrix.py --numpy=/path/to/folder/with/another/numpy ...

First each config is trained on one device and recomputed by `tapedist verify`, which is plain NumPy. Then it is trained
again in each of the surroundings: devices, workers, threads, instruction sets, libraries of linear algebra, NumPy
versions, sizes of tiles and blocks, and stopped in the middle and taken up by other devices. The document is written
anew after each of them. Exit status 1 if a digest differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from matrix.configs import CORE, configs, write_tables

from tapedist.runtime_flags import XLA_FLAGS

REPO = Path(__file__).resolve().parent.parent
WORKER = REPO / "scripts" / "matrix" / "worker.py"
_SMALL = {
    "tapedist.data.orders:RESIDENT_BYTES": 0,
    "tapedist.data.orders:TILE_ROWS": 256,
    "tapedist.data.orders:PRODUCT_BYTES": 16384,
    "tapedist.data.orders:BLOCK_BYTES": 8192,
    "tapedist.training.engines:_SUPERBATCH_BYTES": 4096,
}
_TILES = dict.fromkeys(("TILE_ROWS", "LEAST_PRODUCT_ROWS", "MOST_PRODUCT_ROWS"), 80)
# What a config needs beyond the default surroundings to be cut into many pieces costs minutes with many rows.
_MANY_ROWS = ("above 4 MiB", "above 4 MiB moments", "above 4 MiB batches", "synthetic above 4 MiB")


@dataclasses.dataclass(frozen=True)
class Surrounding:
    """Where all configs are trained once more.

    Attributes:
        env: added to the environment.
        words: added to each config.
        constants: see `worker.py`.
        intra_op: TensorFlow's threads.
        cores: of the process; 0 for all.
        launch: words of `tapedist launch`, for a cluster.
        core: whether only `CORE` is trained here, since each of many processes compiles everything.
        few_rows: whether configs of many rows are left out.
    """

    env: dict[str, str] = dataclasses.field(default_factory=dict)
    words: tuple[str, ...] = ()
    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    intra_op: int = 0
    cores: int = 0
    launch: tuple[str, ...] = ()
    core: bool = False
    few_rows: bool = False


def surroundings(numpy: str) -> dict[str, Surrounding]:
    """By name; `numpy` is a folder that holds another version of it, or nothing."""
    found = {
        f"{count} devices": Surrounding(words=("--strategy=mirrored", f"--num_virtual_devices={count}"))
        for count in (2, 3, 5, 8)
    }
    found |= {f"{count} threads": Surrounding(intra_op=count) for count in (1, 2, 8)}
    found["one core"] = Surrounding(cores=1)
    for isa in ("SSE4_2", "AVX", "AVX2", "AVX512"):
        found[f"instructions {isa}"] = Surrounding(env={"XLA_FLAGS": f"{XLA_FLAGS} --xla_cpu_max_isa={isa}"})
    found["vectors of 512 bits"] = Surrounding(env={"XLA_FLAGS": f"{XLA_FLAGS} --xla_cpu_prefer_vector_width=512"})
    found["XLA's own passes"] = Surrounding(env={"XLA_FLAGS": "--xla_disable_hlo_passes="})
    for kind in ("Prescott", "Nehalem", "Sandybridge", "Haswell"):
        found[f"OpenBLAS {kind}"] = Surrounding(env={"OPENBLAS_CORETYPE": kind})
    disabled = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX2 FMA3"
    found["NumPy without AVX2, AVX-512 and FMA"] = Surrounding(env={"NPY_DISABLE_CPU_FEATURES": disabled})
    if numpy:
        version = next(Path(numpy).glob("numpy-*.dist-info")).name.split("-")[1].removesuffix(".dist")
        found[f"NumPy {version}"] = Surrounding(env={"PYTHONPATH": numpy})
    found["streamed in small blocks"] = Surrounding(words=("--cache=none",), constants=_SMALL, few_rows=True)
    found["held in small blocks"] = Surrounding(words=("--cache=device",), constants=_SMALL, few_rows=True)
    tiles = {f"tapedist.data.orders:{name}": value for name, value in _TILES.items()}
    found["tiles of 80 rows"] = Surrounding(constants=tiles, few_rows=True)
    found |= {
        "1 worker": Surrounding(launch=("--num_workers=1",), core=True),
        "2 workers": Surrounding(launch=("--num_workers=2",)),
        "4 workers": Surrounding(launch=("--num_workers=4",), core=True),
        "12 workers": Surrounding(launch=("--num_workers=12",), core=True),
        "2 workers of 2 devices": Surrounding(launch=("--num_workers=2", "--virtual_devices_per_worker=2"), core=True),
    }
    return found


class Matrix:
    """The configs, and what they came to.

    Args:
        chosen: name -> words.
        folder: for tables and runs.
        output: the document.
    """

    def __init__(self, chosen: dict[str, list[str]], folder: Path, output: Path):
        self._configs, self._folder, self._output = chosen, folder, output
        self._wanted: dict[str, str] = {}
        self._seconds = 0.0
        self._rows: list[tuple[str, int, list[str], float]] = []
        self._counts = 0
        self._begun = dt.datetime.now(dt.UTC)

    @property
    def failed(self) -> bool:
        return any(wrong for _, _, wrong, _ in self._rows)

    def against_the_reference(self) -> None:
        """Trains each config on one device, and recomputes it."""
        kept = {name: [*words, f"--run_dir={self._folder / name}"] for name, words in self._configs.items()}
        started = time.monotonic()
        self._wanted = self._run(kept, Surrounding())
        equal = self._run(kept, Surrounding(), verify=True)
        wrong = [f"{name}: {line}" for name, line in equal.items() if line != "equal"]
        self._note("one device, recomputed by the reference", len(kept), wrong, started)

    def once_more(self, name: str, where: Surrounding, part: slice) -> None:
        """Trains `part` of the configs in other surroundings."""
        chosen = {
            config: [*words, *where.words]
            for config, words in [*self._configs.items()][slice(None) if where.core else part]
            if (not where.core or config in CORE) and not (where.few_rows and config in _MANY_ROWS)
        }
        started = time.monotonic()
        self._compare(name, self._run(chosen, where), started)

    def stopped_and_taken_up(self) -> None:
        """Stops each run twice where it stands, and goes on with other devices."""
        name = "stopped on 3 devices, again on 2, ended on 1"
        chosen = {config: words for config, words in self._configs.items() if config not in _MANY_ROWS}
        started, stopped = time.monotonic(), []
        found: dict[str, str] = {}
        constants = {**_SMALL, "tapedist.training.block_pass:_VISITS_PER_CALL": 1}
        for devices, asks in ((3, 12), (2, 25), (0, 0)):
            on = ["--strategy=mirrored", f"--num_virtual_devices={devices}"] if devices else []
            more = [*on, "--cache=none", "--checkpoint_every_steps=0"]
            words = {
                config: [*words, *more, f"--run_dir={self._folder}/s-{config}"] for config, words in chosen.items()
            }
            found = self._run(words, Surrounding(constants=constants), stop_after=asks)
            stopped.append(sum(line == "stopped" for line in found.values()))
        self._compare(f"{name} ({stopped[0]} and {stopped[1]} runs stopped)", found, started)

    def _compare(self, name: str, found: dict[str, str], started: float) -> None:
        wrong = [f"{config}: {digest}" for config, digest in found.items() if digest != self._wanted[config]]
        self._note(name, len(found), wrong, started)

    def _run(self, chosen: dict[str, list[str]], where: Surrounding, **order: Any) -> dict[str, str]:
        """What a process, or a cluster of them, prints of each config."""
        with tempfile.NamedTemporaryFile("w", suffix=".json", dir=self._folder, delete=False) as file:
            json.dump({"configs": chosen, "constants": where.constants, "intra_op": where.intra_op, **order}, file)
        program = [sys.executable, "-W", "ignore", str(WORKER)]
        words = [*program, "train", file.name]
        if where.launch:
            code = (
                "import sys; from tapedist.cluster.launch import LaunchConfig, main; from tapedist.flags import "
                "CommandLine; sys.exit(main(CommandLine(LaunchConfig, sys.argv[1:], rest='worker_argv').options(), "
                f"program={tuple(program)!r}))"
            )
            words = [sys.executable, "-c", code, *where.launch, f"--log_dir={file.name}.logs", "--", "train", file.name]
        env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **where.env}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [where.env.get("PYTHONPATH"), str(REPO)]))
        cores = sorted(os.sched_getaffinity(0))[: where.cores] if where.cores else None
        words = ["taskset", "-c", ",".join(map(str, cores)), *words] if cores else words
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, cwd=self._folder)
        lines = (line.removeprefix("[0] ").partition("\t") for line in done.stdout.splitlines() if "\t" in line)
        found = {name: line for name, _, line in lines if name in chosen}
        missing = done.stderr.strip().splitlines()[-1:] or ["nothing was printed"]
        return {name: found.get(name, f"ended with {done.returncode}: {missing[0]}") for name in chosen}

    def _note(self, name: str, count: int, wrong: list[str], started: float) -> None:
        seconds = time.monotonic() - started
        self._rows.append((name, count, wrong, seconds))
        self._counts += count
        print(f"{name}: {count - len(wrong)} of {count} equal, {seconds:.0f} s", *wrong, sep="\n  ", flush=True)
        self._output.parent.mkdir(parents=True, exist_ok=True)
        self._output.write_text(self._document())

    def _document(self) -> str:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("tensorflow", "numpy", "pyarrow"))
        commit = subprocess.run(
            ["git", "-C", str(REPO), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        wrong = sum(len(bad) for _, _, bad, _ in self._rows)
        count = f"{len(self._configs)} configs in {len(self._rows)} surroundings, {self._counts} runs"
        lines = [
            "# The bit matrix",
            "",
            f"`scripts/bit_matrix.py`, {self._begun:%Y-%m-%d %H:%M} UTC, commit {commit}: {count}, **{wrong} of other "
            f"bits**. {_machine()}; Python {platform.python_version()}, {versions}.",
            "",
            "| surroundings | runs | of the digest of the reference | seconds |",
            "|---|---|---|---|",
            *(f"| {name} | {count} | {count - len(bad)} | {secs:.0f} |" for name, count, bad, secs in self._rows),
            "",
            *(f"* {name}: {line}" for name, _, bad, _ in self._rows for line in bad),
            "",
            "| config | `tapedist train` | digest |",
            "|---|---|---|",
        ]
        for name, words in self._configs.items():
            told = " ".join(word.replace(f"{self._folder}/", "") for word in words[:-2])
            lines.append(f"| {name} | `{told}` | {self._wanted.get(name, '')[:12]} |")
        return "\n".join([*lines, ""])


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(': ')[2]}, {os.cpu_count()} cores"
    return platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the document")
    parser.add_argument("--configs", choices=("all", "core"), default="all")
    parser.add_argument(
        "--share", type=int, default=1, help="each surrounding trains every so manieth config, in turns"
    )
    parser.add_argument("--only", default="", help="parts of names of surroundings, with commas between")
    parser.add_argument(
        "--numpy", default="", help="a folder with another NumPy: pip install --target FOLDER numpy==..."
    )
    parser.add_argument("--processes", type=int, default=2, help="surroundings at a time")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tables(folder)
        chosen = {
            config: words
            for config, words in configs(folder).items()
            if told.configs == "all" or config in CORE
        }  # fmt: skip
        matrix = Matrix(chosen, folder, told.output)
        matrix.against_the_reference()
        only = told.only.split(",")
        found = {name: where for name, where in surroundings(told.numpy).items() if any(part in name for part in only)}
        with ThreadPoolExecutor(told.processes) as pool:
            parts = [slice(number % told.share, None, told.share) for number in range(len(found))]
            list(pool.map(matrix.once_more, found.keys(), found.values(), parts))
        if any(part in "stopped" for part in only):
            matrix.stopped_and_taken_up()
    return int(matrix.failed)


if __name__ == "__main__":
    sys.exit(main())
