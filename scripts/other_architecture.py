#!/usr/bin/env python3
"""Trains a dozen small configs on an emulated processor too, by the reference and by TensorFlow, and compares digests.

    scripts/other_architecture.py digests [--with=tensorflow]
    scripts/other_architecture.py compare --output=scripts/matrix/results/DATE-arm64.md --packages=PACKAGES \\
        --emulator="QEMU/usr/bin/qemu-aarch64-static -L ROOT ROOT/usr/bin/python3.11"

`digests` prints `NAME<tab>DIGEST` for each config, here or anywhere; for the reference it needs NumPy only. `compare`
runs it natively and by the emulator, and writes the document; the exit status is 1 if a digest differs or is missing.

The folders can be made on Debian 12 without installing anything; apt's own state stays as it is:

    mkdir -p apt/lists/partial apt/archives/partial && touch apt/status
    OPTIONS="-o Dir::State=$PWD/apt -o Dir::State::status=$PWD/apt/status -o Dir::Cache=$PWD/apt
             -o APT::Architectures::=amd64 -o APT::Architectures::=arm64 -o APT::Install-Recommends=false"
    apt-get $OPTIONS update
    apt-get $OPTIONS install -y --download-only qemu-user-static python3.11:arm64 libstdc++6:arm64
    dpkg-deb -x apt/archives/qemu-user-static_*_amd64.deb QEMU
    for deb in apt/archives/*_arm64.deb apt/archives/*_all.deb; do dpkg-deb -x $deb ROOT; done
    pip install --target=PACKAGES --only-binary=:all: --python-version=3.11 --platform=manylinux_2_28_aarch64 \\
        --platform=manylinux_2_27_aarch64 --platform=manylinux2014_aarch64 tensorflow==2.21.0 numpy==2.4.6 \\
        absl-py 'etils[epy]' matplotlib pyarrow rich
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import itertools
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parent.parent
WAYS = ("reference", "tensorflow")
ROWS, SEED, BATCH, RATE, DELTA = 403, 11, 96, 0.02, 0.75
TRUTH = {"c": -2.0, "mean": 0.25, "std": 1.5, "noise_std": 0.5}


@dataclasses.dataclass(frozen=True)
class Config:
    """A run on synthetic rows, all of them for training; `engine` is "stream", "moments" or a shuffle of batches."""

    engine: str
    d: int
    dtype: str
    loss: str = "squared"
    optimizer: str = "sgd"
    _: dataclasses.KW_ONLY
    weighted: bool = False
    l2: float = 0.0
    fit_intercept: bool = True

    @property
    def name(self) -> str:
        more = {"weights": self.weighted, f"l2={self.l2:g}": self.l2, "no intercept": not self.fit_intercept}
        kind = self.engine if self.engine in ("stream", "moments") else f"batches, shuffle={self.engine}"
        return ", ".join([f"{kind} d={self.d} {self.dtype} {self.loss} {self.optimizer}", *filter(more.get, more)])

    @property
    def epochs(self) -> int:
        return 40 if self.engine == "moments" else 3

    @property
    def truth(self) -> dict[str, Any]:
        return {"m": tuple(1.5 - 0.25 * j for j in range(self.d)), **TRUTH}


CONFIGS = (
    Config("stream", 1, "float32"),
    Config("stream", 17, "float64", "squared", "adam"),
    Config("stream", 3, "float32", "huber", "momentum", l2=0.1),
    Config("stream", 3, "float64", "absolute", "nesterov"),
    Config("stream", 3, "float64", "huber", "adam", weighted=True),
    Config("moments", 1, "float64", "squared", "nesterov"),
    Config("moments", 3, "float32", "squared", "adam", l2=0.05),
    Config("moments", 17, "float32", "squared", "momentum", weighted=True),
    Config("rows", 1, "float32", "squared", "adam"),
    Config("batches", 3, "float64", "huber", "sgd", l2=0.1),
    Config("none", 17, "float32", "squared", "nesterov", fit_intercept=False),
    Config("batches", 3, "float32", "absolute", "momentum", weighted=True),
)


def reference() -> Any:
    """`tapedist.reference` by itself: `tapedist/__init__.py` imports more than NumPy."""
    if "tapedist" not in sys.modules:
        sys.modules["tapedist"] = package = types.ModuleType("tapedist")
        package.__path__ = [str(REPO / "tapedist")]
    import tapedist.reference

    return tapedist.reference


def rows(ref: Any, config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    x, y = ref.synthetic_rows(SEED, np.arange(ROWS), **config.truth)
    return x, y, np.arange(ROWS) % 7 / 4.0 if config.weighted else None


def by_reference(config: Config) -> str:
    ref = reference()
    kind, raw = ref.KINDS[config.dtype], rows(ref, config)
    exponent = 0 if raw[2] is None else int(np.frexp(raw[2].max())[1])
    chunk = ref.as_trained(*raw, kind, exponent)
    found = ref.ranges([raw], exponent) if config.weighted else ref.synthetic_ranges(**config.truth)
    theta = ref.initial_parameters(config.d + config.fit_intercept, init="normal", seed=SEED)
    problem = ref.Problem(
        dtype=config.dtype, loss=config.loss, delta=DELTA, fit_intercept=config.fit_intercept, l2=config.l2,
        penalized=(np.arange(len(theta)) < config.d).astype(float), optimizer=config.optimizer, rate=RATE,
    )  # fmt: skip
    count = config.epochs
    if config.engine == "moments":
        columns = ref.columns_of(found, kind)
        moments = ref.moments(ref.moment_integers([chunk], columns), columns)
        steps = ref.moment_epochs(ref.quadratic_form(moments, fit_intercept=config.fit_intercept), theta, problem)
    elif config.engine == "stream":
        steps = ref.full_batch(lambda: [chunk], theta, ref.bounds(found, kind), problem)
    else:
        count *= -(-ROWS // BATCH)
        steps = ref.mini_batch(
            lambda taken: tuple(None if column is None else column[taken] for column in chunk),
            theta, ref.bounds(found, kind), problem,
            num_rows=ROWS, batch_size=BATCH, shuffle=config.engine, seed=SEED,
        )  # fmt: skip
    return ref.digest(next(itertools.islice(steps, count - 1, None)).theta)


def by_tensorflow(config: Config) -> str:
    import tapedist

    mode: dict[str, Any] = {"full_batch_engine": config.engine}
    if config.engine not in ("stream", "moments"):
        mode = {"mode": "mini_batch", "batch_size": BATCH, "shuffle": config.engine}
    from_settings = {} if config.weighted else {"n_samples": ROWS, "num_features": config.d, **config.truth}
    source = tapedist.ArraySource(*rows(reference(), config)) if config.weighted else None
    loss = {"loss": config.loss, "huber_delta": DELTA if config.loss == "huber" else 1.0}
    return tapedist.train(
        tapedist.TrainConfig(
            **mode, **from_settings, **loss, test_fraction=0.0, seed=SEED, dtype=config.dtype, l2=config.l2,
            fit_intercept=config.fit_intercept, optimizer=config.optimizer, learning_rate=RATE, init="normal",
            standardize="false", stop_at_se=0.0, num_epochs=config.epochs, statistics="false", plots=False,
        ),
        source=source,
    ).digest  # fmt: skip


def print_digests(way: str) -> None:
    tensorflow = f", TensorFlow {metadata.version('tensorflow')}" if way == "tensorflow" else ""
    print(f"# {platform.machine()}: Python {platform.python_version()}, NumPy {np.__version__}{tensorflow}", flush=True)
    for config in CONFIGS:
        print(f"{config.name}\t{by_tensorflow(config) if tensorflow else by_reference(config)}", flush=True)


@dataclasses.dataclass(frozen=True)
class Column:
    """What one process printed: its title, versions, digests by name; and how it ended."""

    title: str
    versions: str
    digests: dict[str, str]
    end: str

    def equal(self, wanted: Column) -> int:
        return sum(self.digests.get(config.name) == wanted.digests.get(config.name, "") for config in CONFIGS)


def column(way: str, interpreter: list[str], packages: str, limit: float) -> Column:
    env = {**os.environ, "PYTHONPATH": packages or os.environ.get("PYTHONPATH", ""), "PYTHONNOUSERSITE": "1"}
    words, started = [*interpreter, "-W", "ignore", __file__, "digests", f"--with={way}"], time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code: Any = subprocess.run(words, env=env, stdout=out, stderr=err, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = "the time limit"
        out.seek(0), err.seek(0)
        lines, errors = out.read().splitlines(), err.read().strip().splitlines()
    end = f"{time.monotonic() - started:.0f} s" + (f", ended by {code}: {(errors or [''])[-1]}" if code else "")
    machine, _, versions = next((line[2:] for line in lines if line.startswith("# ")), "nothing: ").partition(": ")
    digests = dict(line.split("\t") for line in lines if "\t" in line)
    print(f"{machine} {way}: {len(digests)} digests, {end}", flush=True)
    return Column(f"{machine} {way}", versions, digests, end)


def document(columns: list[Column], emulator: str) -> str:
    version, commit = (
        subprocess.run(words, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
        for words in ([emulator, "--version"], ["git", "-C", str(REPO), "rev-parse", "--short", "HEAD"])
    )
    lines = [
        "# Digests on another architecture",
        "",
        f"`scripts/other_architecture.py compare`, {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC, commit {commit}; "
        f"emulated by {version}. The script says how the emulated programs are unpacked, and has the configs, of "
        f"{ROWS} synthetic rows each. The table has 16 digits of the digests; all 64 are compared with those of the "
        "first column.",
        "",
        "| machine, trained by | versions | equal | time |",
        "|---|---|---|---|",
        *(f"| {c.title} | {c.versions} | {c.equal(columns[0])} of {len(CONFIGS)} | {c.end} |" for c in columns),
        "",
        f"| config | {' | '.join(c.title for c in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for config in CONFIGS:
        cells = (c.digests.get(config.name, "none")[:16] for c in columns)
        lines.append(f"| {config.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digests", "compare"))
    parser.add_argument("--with", dest="way", choices=WAYS, default="", help="of compare: only this; by default both")
    parser.add_argument("--emulator", help="words that start the other architecture's Python")
    parser.add_argument("--packages", default="", help="the folder of its packages")
    parser.add_argument("--output", type=Path, help="the document")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds of each process")
    told = parser.parse_args()
    sys.path.insert(0, str(REPO))
    if told.what == "digests":
        print_digests(told.way or "reference")
        return 0
    if not (told.emulator and told.output):
        parser.error("compare: needs --emulator and --output")
    emulator = shlex.split(told.emulator)
    places = (([sys.executable], ""), (emulator, told.packages))
    ways = [told.way] if told.way else WAYS
    columns = [column(way, *place, told.limit) for place in places for way in ways]
    told.output.parent.mkdir(parents=True, exist_ok=True)
    told.output.write_text(document(columns, emulator[0]))
    return int(any(c.equal(columns[0]) < len(CONFIGS) for c in columns))


if __name__ == "__main__":
    sys.exit(main())
