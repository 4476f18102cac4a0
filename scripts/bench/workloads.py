"""The rows of the suite: what is measured, by whom, and what must be reached.

A row's contestants do the same work and take turns. `at_most` bounds the steps of peers that need no more to be timed;
their seconds are scaled to all steps.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Medians = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Who does a row's work, and how.

    Attributes:
        name: shown in the table.
        runs_in: a peer's name, "limit" (the C program) or "process" (a whole process).
        task: a peer's task, the C program's words, or the process's command.
        work: units of work, where they differ from the row's.
    """

    name: str
    runs_in: str
    task: Any
    work: float | None = None


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a row must reach.

    Attributes:
        text: the goal in words.
        needs: contestants whose medians it compares; without one of them it is left open.
        value: what was reached, from the medians in seconds (and, for `outcome` goals, from the outcomes).
        reached: whether that is enough; None where it is only reported.
    """

    text: str
    needs: tuple[str, ...]
    value: Callable[[Medians, Mapping[str, Any]], float]
    reached: Callable[[float], bool] | None
    unit: str = "x"


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: for `--only`.
        title: for people.
        work: units of work of one measurement.
        unit: what they are.
        contestants: who takes part.
        goals: what must be reached.
        rounds: measurements of each contestant; None takes the suite's number.
        single_calls: whether a measurement is one call, however short.
    """

    name: str
    title: str
    work: float
    unit: str
    contestants: tuple[Contestant, ...]
    goals: tuple[Goal, ...] = ()
    rounds: int | None = None
    single_calls: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the work is, in full or for the smoke test."""

    tutorial_epochs: int = 3000
    narrow_rows: int = 16_000_000
    wide_rows: int = 1_000_000
    wide: int = 64
    batch_steps: int = 3072
    fresh_steps: int = 60_000
    billion: int = 1_000_000_000
    curve: tuple[int, ...] = tuple(10**k for k in range(4, 10))
    shard_batches: tuple[tuple[int, int], ...] = tuple((b, d) for d in (1, 64) for b in (1024, 65_536, 1_048_576))


QUICK = Sizes(
    tutorial_epochs=20, narrow_rows=700_000, wide_rows=20_000, batch_steps=64, fresh_steps=300, billion=1_000_000,
    curve=(10_000, 600_000), shard_batches=((1024, 1),),
)  # fmt: skip

LIMIT = ("C/OpenMP, 1 thread", "C/OpenMP, all threads")
TAPEDIST = "tapedist"


def _engine(name: str, steps: int, *, kind: str = "engine", runs_in: str = TAPEDIST, **config: Any) -> Contestant:
    in_memory = config.pop("in_memory", False)
    task = {"kind": kind, "steps": steps, "config": config, "in_memory": in_memory}
    return Contestant(name, runs_in, task)


def _peers(task: Mapping[str, Any], *names: str, **at_most: int) -> tuple[Contestant, ...]:
    labels = {"numpy": "NumPy", "jax": "JAX", "torch": "PyTorch", "eager": "eager tape loop", "keras": "Keras fit"}
    made = []
    for name in names:
        peer = "tensorflow" if name in ("eager", "keras") else name
        most = at_most.get(name, task["steps"])
        made.append(Contestant(labels[name], peer, {**task, "kind": task.get("kind", name), "at_most": most}))
    return tuple(made)


def _limits(*words: Any) -> tuple[Contestant, ...]:
    return (Contestant(LIMIT[0], "limit", (1, words)), Contestant(LIMIT[1], "limit", (0, words)))


def _limit(seconds: Medians) -> float:
    return min(seconds[name] for name in LIMIT)


def _against(other: str, least: float, mine: str = TAPEDIST) -> Goal:
    """At least `least` times as fast as `other`."""
    text = f"at least {least:g} x {other}" if least != 1 else f"no slower than {other}"
    return Goal(text, (mine, other), lambda s, _: s[other] / s[mine], lambda v: v >= least)


def _tutorial(sizes: Sizes) -> tuple[Row, ...]:
    n, steps = 8000, sizes.tutorial_epochs
    task = {"n": n, "d": 1, "steps": steps}
    limits = _limits("stream", n, 1, steps)
    within = Goal(
        "at most 1.6 x the C limit", (TAPEDIST, *LIMIT), lambda s, _: s[TAPEDIST] / _limit(s), lambda v: v <= 1.6
    )
    moments = Goal(
        "at most 0.3 x the C limit", (TAPEDIST, *LIMIT), lambda s, _: s[TAPEDIST] / _limit(s), lambda v: v <= 0.3
    )
    return (
        Row(
            "tutorial", f"tutorial, stream: {n:,} rows, {steps:,} epochs, steady state", n * steps, "rows",
            (
                _engine(TAPEDIST, steps, n_samples=n, full_batch_engine="stream"),
                *_peers(task, "jax", "numpy", "torch", "keras", "eager", torch=300, keras=256, eager=60),
                *limits,
            ),
            (_against("JAX", 1), within),
        ),
        Row(
            "tutorial_moments", f"tutorial, moments: a pass over {n:,} rows and {steps:,} epochs", n * steps, "rows",
            (_engine(TAPEDIST, steps, kind="pass", n_samples=n, full_batch_engine="moments"), *limits),
            (moments,),
        ),
        Row(
            "moments_epochs", f"tutorial, moments: {steps:,} epochs after the pass", steps, "epochs",
            (_engine(TAPEDIST, steps, n_samples=n, full_batch_engine="moments"), *limits),
        ),
    )  # fmt: skip


def _cached(sizes: Sizes) -> tuple[Row, ...]:
    epochs = 5
    narrow, wide, d = sizes.narrow_rows, sizes.wide_rows, sizes.wide
    moved = wide * (d + 1) * 4 * epochs
    bytes_ = max(2**22, wide * (d + 1) * 4)
    bus = Contestant("memory bus", "limit", (0, ("bandwidth", bytes_)))
    share = Goal(
        "at least 40 % of the memory bus", (TAPEDIST, "memory bus"),
        lambda s, _: 100 * s["memory bus"] / bytes_ * moved / s[TAPEDIST], lambda v: v >= 40, "%",
    )  # fmt: skip
    half = Goal(
        "at least half the C limit", (TAPEDIST, *LIMIT), lambda s, _: _limit(s) / s[TAPEDIST], lambda v: v >= 0.5
    )
    return (
        Row(
            "stream_narrow", f"{narrow:,} rows, d = 1, cached, stream: {epochs} epochs", narrow * epochs, "rows",
            (
                _engine(TAPEDIST, epochs, n_samples=narrow, full_batch_engine="stream"),
                *_peers({"n": narrow, "d": 1, "steps": epochs}, "jax", "numpy", "torch", torch=2),
                *_limits("stream", narrow, 1, epochs),
            ),
            (_against("JAX", 1.5), half),
        ),
        Row(
            "stream_wide", f"{wide:,} rows, d = {d}, cached, stream: {epochs} epochs", wide * epochs, "rows",
            (
                _engine(TAPEDIST, epochs, n_samples=wide, num_features=d, full_batch_engine="stream"),
                *_peers({"n": wide, "d": d, "steps": epochs}, "jax", "numpy", "torch"),
                *_limits("stream", wide, d, epochs),
                bus,
            ),
            (_against("JAX", 1.4), share),
        ),
    )  # fmt: skip


def _second_moments(sizes: Sizes) -> tuple[Row, ...]:
    n, d = sizes.wide_rows, sizes.wide
    task = {"kind": "moments", "n": n, "d": d, "steps": 1}
    config = {"n_samples": n, "num_features": d, "dtype": "float64", "full_batch_engine": "moments"}
    onedal = Goal("ratio to oneDAL (aim 1)", (TAPEDIST, "oneDAL"), lambda s, _: s["oneDAL"] / s[TAPEDIST], None)
    return (
        Row(
            "moments_wide", f"second moments of {n:,} float64 rows in memory, d = {d}", n, "rows",
            (
                _engine(TAPEDIST, 1, kind="pass", **config),
                Contestant("NumPy normal equations", "numpy", task),
                Contestant("scikit-learn LinearRegression", "sklearn", task),
                Contestant("oneDAL", "onedal", task),
            ),
            (_against("scikit-learn LinearRegression", 5), onedal),
            rounds=3,
        ),
    )  # fmt: skip


def _mini_batch(sizes: Sizes) -> tuple[Row, ...]:
    n, batch, steps, fresh = 1024 * 1024, 1024, sizes.batch_steps, sizes.fresh_steps
    task = {"n": n, "d": 1, "batch": batch, "steps": steps}
    raw = Goal(
        "at least 80 % of the raw generator's rate", (TAPEDIST, "raw generator"),
        lambda s, _: 100 * s["raw generator"] / s[TAPEDIST], lambda v: v >= 80, "%",
    )  # fmt: skip
    config = {"mode": "mini_batch", "batch_size": batch}
    return (
        Row(
            "mini_batch_cached", f"mini batch, B = {batch:,}, cached rows: {steps:,} steps", steps, "steps",
            (
                _engine(TAPEDIST, steps, n_samples=n, **config),
                *_peers(task, "jax", "numpy", "torch", "keras", "eager", torch=300, keras=1024, eager=60),
                *_limits("minibatch", n, 1, batch, steps),
            ),
            (_against("JAX", 1), _against("Keras fit", 100)),
        ),
        Row(
            "mini_batch_fresh", f"mini batch, B = {batch:,}, new rows: {fresh:,} steps", batch * fresh, "rows",
            (
                _engine(TAPEDIST, fresh, n_samples=10**12, cache="none", **config),
                Contestant("raw generator", TAPEDIST, {"kind": "rows", "n": batch * fresh, "d": 1}),
                *_peers({"kind": "fresh", "batch": batch, "steps": fresh, "d": 1}, "jax", "numpy"),
            ),
            (raw,),
        ),
    )  # fmt: skip


def _shards(sizes: Sizes) -> tuple[Row, ...]:
    rows = []
    for batch, d in sizes.shard_batches:
        # A few batches, so that small ones do not sit in the first-level cache, and large ones fit into memory.
        n = batch * max(1, min(64, 2**24 // (batch * d)))
        steps = max(4, min(2048, 2**26 // (batch * (d + 1))))
        task = {"kind": "plain", "n": n, "d": d, "batch": batch, "steps": steps}
        config = {"n_samples": n, "num_features": d, "mode": "mini_batch", "batch_size": batch, "cache": "device"}
        cost = Goal("cost of 16 shards", ("V = 16", "no shards"), lambda s, _: s["V = 16"] / s["no shards"], None)
        rows.append(
            Row(
                f"shards_{batch}_{d}", f"fixed-order sum, {batch:,} rows a step, d = {d}", steps, "steps",
                (
                    _engine("V = 16", steps, virtual_shards=16, **config),
                    _engine("V = 1", steps, virtual_shards=1, **config),
                    Contestant("no shards", TAPEDIST, task),
                    *_peers(task | {"kind": "jax"}, "jax"),
                ),
                (cost,),
                rounds=3,
            )
        )  # fmt: skip
    return tuple(rows)


def _replicas(sizes: Sizes) -> tuple[Row, ...]:
    steps = min(200, sizes.tutorial_epochs)
    return (
        Row(
            "replicas", f"tutorial, stream, on R logical CPUs: {steps} epochs", steps, "epochs",
            tuple(
                _engine(f"R = {r}", steps, n_samples=8000, full_batch_engine="stream", runs_in=f"{TAPEDIST}/{r}")
                for r in (1, 2, 4)
            ),
            rounds=3,
        ),
    )  # fmt: skip


def true_descent(epochs: int, theta: tuple[float, float], rate: float = 0.001) -> tuple[float, float]:
    """Gradient descent in float64 on the true moments of the tutorial's line: E x = 0, E x^2 = 1, E xy = 9, E y = -2.

    Args:
        epochs: updates.
        theta: weight and bias before the first.
        rate: learning rate.
    """
    w, b = theta
    for _ in range(epochs):
        w, b = w - rate * 2 * (w - 9.0), b - rate * 2 * (b + 2.0)
    return w, b


def _processes(sizes: Sizes, python: str, initial: tuple[float, float]) -> tuple[Row, ...]:
    train = (python, "-m", "tapedist", "train")
    expected = true_descent(3000, initial)

    def outcome(key: str) -> Callable[[Medians, Mapping[str, Any]], float]:
        return lambda _, outcomes: outcomes[TAPEDIST][key]

    def error(_: Medians, outcomes: Mapping[str, Any]) -> float:
        found = outcomes[TAPEDIST]
        return max(abs(found["weight"] - expected[0]), abs(found["bias"] - expected[1]))

    over = Goal(
        "at most 2 s more than importing TensorFlow", (TAPEDIST, "import tensorflow"),
        lambda s, _: s[TAPEDIST] - s["import tensorflow"], lambda v: v <= 2, "s",
    )  # fmt: skip
    huge = (
        Goal("at most 40 s", (TAPEDIST,), lambda s, _: s[TAPEDIST], lambda v: v <= 40, "s"),
        Goal("at most 2 GiB of memory", (TAPEDIST,), outcome("peak_mib"), lambda v: v <= 2048, "MiB"),
        Goal("W and b within 1e-3 of descent on the true moments", (TAPEDIST,), error, lambda v: v <= 1e-3, "off"),
    )
    return (
        Row(
            "tutorial_process", "whole `tapedist train` of the tutorial, no plots", 1, "runs",
            (
                Contestant(TAPEDIST, "process", (*train, "--noplots")),
                Contestant("import tensorflow", "process", (python, "-c", "import tensorflow")),
            ),
            (over,),
            rounds=3,
            single_calls=True,
        ),
        Row(
            "billion", f"--n_samples={sizes.billion} --num_epochs=3000, whole process", sizes.billion * 3000, "rows",
            (Contestant(TAPEDIST, "process", (*train, f"--n_samples={sizes.billion}", "--noplots")),),
            huge,
            rounds=1,
            single_calls=True,
        ),
        Row(
            "startup", "where the tutorial's seconds go, one process", 1, "runs",
            (Contestant(TAPEDIST, "process", (python, "{here}/startup.py")),),
            rounds=3,
            single_calls=True,
        ),
    )  # fmt: skip


def _curve(sizes: Sizes) -> tuple[Row, ...]:
    rows = []
    for n in sizes.curve:
        cold = n >= 10**9
        batch_steps = max(1, min(n, 32_000_000) // 1024)
        full = {"n_samples": n, "full_batch_engine": "stream"}
        contestants = [
            _engine("stream, cached", 1, **full),
            _engine("stream, streamed", 1, cache="none", **full),
            _engine("moments, the pass", 1, kind="pass", n_samples=n, full_batch_engine="moments"),
            _engine("mini batch, new rows", batch_steps, n_samples=n, mode="mini_batch", batch_size=1024, cache="none"),
        ]
        if n * 8 > 4 * 2**30:
            contestants = contestants[1:]  # More than `--cache=auto` would hold.
        for contestant in contestants:
            contestant.task["cold"] = cold
        contestants[-1] = dataclasses.replace(contestants[-1], work=min(n, batch_steps * 1024))
        rows.append(
            Row(
                f"curve_{n:.0e}".replace("+0", ""),
                f"an epoch of {n:,} rows",
                n,
                "rows",
                tuple(contestants),
                rounds=1 if cold else 3,
            )
        )
    return tuple(rows)


def rows_of(*, quick: bool) -> tuple[Row, ...]:
    """Every row of the suite, in full or for the smoke test."""
    sizes, python = QUICK if quick else Sizes(), sys.executable
    # Where a run with `--seed=0` starts: standard normal, drawn on the host.
    weight, bias = np.random.Generator(np.random.Philox(0)).standard_normal(2)
    return (
        *_tutorial(sizes), *_cached(sizes), *_second_moments(sizes), *_mini_batch(sizes), *_shards(sizes),
        *_replicas(sizes), *_processes(sizes, python, (float(weight), float(bias))), *_curve(sizes),
    )  # fmt: skip
