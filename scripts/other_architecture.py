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
        absl-py 'etils[epy]' pyarrow rich
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
        form = ref.quadratic_form(
            ref.moments(ref.moment_integers([chunk], columns), columns), fit_intercept=config.fit_intercept
        )
        steps = ref.moment_epochs(form, theta, problem)
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
    names = WAYS if way == "tensorflow" else ()
    versions = [f"NumPy {np.__version__}", *(f"TensorFlow {metadata.version(name)}" for name in names[1:])]
    print(f"# {platform.machine()}: Python {platform.python_version()}, {', '.join(versions)}", flush=True)
    for config in CONFIGS:
        digest = by_tensorflow(config) if way == "tensorflow" else by_reference(config)
        print(f"{config.name}\t{digest}", flush=True)


@dataclasses.dataclass(frozen=True)
class Column:
    """What one process printed: its machine and versions, name -> digest, and how it ended if not well."""

    way: str
    machine: str
    versions: str
    digests: dict[str, str]
    seconds: float
    end: str


def column(way: str, interpreter: list[str], packages: str, limit: float) -> Column:
    env = {**os.environ, "PYTHONPATH": packages or os.environ.get("PYTHONPATH", ""), "PYTHONNOUSERSITE": "1"}
    words, end, started = [*interpreter, "-W", "ignore", __file__, "digests", f"--with={way}"], "", time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(words, env=env, stdout=out, stderr=err, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code, end = 0, f"stopped after {limit:.0f} s"
        out.seek(0), err.seek(0)
        lines = out.read().splitlines()
        if code:
            end = f"ended with {code}: {(err.read().strip().splitlines() or ['nothing was said'])[-1]}"
    machine, _, versions = next((line[2:] for line in lines if line.startswith("# ")), "unknown: ").partition(": ")
    digests = dict(line.split("\t") for line in lines if "\t" in line)
    print(f"{machine}, {way}: {len(digests)} digests, {time.monotonic() - started:.0f} s {end}", flush=True)
    return Column(way, machine, versions, digests, time.monotonic() - started, end)


def document(columns: list[Column], emulator: str) -> tuple[str, bool]:
    """The document, and whether all digests are there and equal."""
    wanted = columns[0].digests
    right = [sum(c.digests.get(config.name) == wanted.get(config.name, "") for config in CONFIGS) for c in columns]
    commit = subprocess.run(["git", "-C", str(REPO), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    version = subprocess.run([emulator, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    lines = [
        f"# Digests on {columns[-1].machine}",
        "",
        f"`scripts/other_architecture.py compare`, {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC, commit "
        f"{commit.stdout.strip()}. {columns[-1].machine} is emulated: {version}. Configs are {ROWS} synthetic rows each; "
        "the script has the rest of their settings, and how the folders of the emulated programs are made. Digests, of "
        "which the table has 16 digits, are compared whole with those of the first column.",
        "",
        "| machine | trained by | versions | equal | seconds | end |",
        "|---|---|---|---|---|---|",
        *(
            f"| {c.machine} | {c.way} | {c.versions} | {count} of {len(CONFIGS)} | {c.seconds:.0f} | {c.end or 'well'} |"
            for c, count in zip(columns, right, strict=True)
        ),
        "",
        f"| config | {' | '.join(f'{c.machine} {c.way}' for c in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for config in CONFIGS:
        digests = (c.digests.get(config.name, "none") for c in columns)
        lines.append(f"| {config.name} | {' | '.join(f'`{digest[:16]}`' for digest in digests)} |")
    return "\n".join([*lines, ""]), all(count == len(CONFIGS) for count in right)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digests", "compare"))
    parser.add_argument("--with", dest="way", choices=WAYS, default="", help="of compare: only this; by default both")
    parser.add_argument("--emulator", help="words that start the other architecture's Python")
    parser.add_argument("--packages", default="", help="the folder of its packages")
    parser.add_argument("--output", type=Path, help="the document")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of each process")
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
    text, equal = document(columns, emulator[0])
    told.output.parent.mkdir(parents=True, exist_ok=True)
    told.output.write_text(text)
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
