"""The rows of the suite: what is measured, by whom, and what must be reached."""

from __future__ import annotations

import dataclasses
from typing import Any

from comparison import (
    FAST,
    LIMIT,
    OLDER,
    TAPEDIST,
    Contestant,
    Goal,
    Row,
    against,
    engine,
    fastest_limit,
    limits,
    peers,
    versions,
    within,
)
from processes import processes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the work is, in full or for the smoke test."""

    tutorial_epochs: int = 3000
    narrow_rows: int = 16_000_000
    middle_rows: int = 4_000_000
    wide_rows: int = 1_000_000
    wide: int = 64
    batch_steps: int = 3072
    fresh_steps: int = 60_000
    billion: int = 1_000_000_000
    curve: tuple[int, ...] = tuple(10**k for k in range(4, 10))
    sum_batches: tuple[tuple[int, int], ...] = tuple((b, d) for d in (1, 64) for b in (1024, 65_536, 1_048_576))


QUICK = Sizes(
    tutorial_epochs=20, narrow_rows=700_000, middle_rows=200_000, wide_rows=20_000, batch_steps=64, fresh_steps=300,
    billion=1_000_000, curve=(10_000, 600_000), sum_batches=((1024, 1),),
)  # fmt: skip


def _tutorial(sizes: Sizes) -> tuple[Row, ...]:
    n, steps = 8000, sizes.tutorial_epochs
    limit = limits("stream", n, 1, steps)
    return (
        Row(
            "tutorial", f"tutorial, stream: {n:,} rows, {steps:,} epochs, steady state", n * steps, "rows",
            (
                *versions(steps, n_samples=n, full_batch_engine="stream"),
                *peers(
                    {"n": n, "d": 1, "steps": steps}, "jax", "numpy", "torch", "keras", "eager",
                    torch=300, keras=256, eager=60,
                ),
                *limit,
            ),
            (within(1, OLDER), within(0.9, OLDER, FAST), against("JAX", 1)),
        ),
        Row(
            "tutorial_moments", f"tutorial, moments: a pass over {n:,} rows and {steps:,} epochs", n * steps, "rows",
            (*versions(steps, kind="pass", n_samples=n, full_batch_engine="moments"), *limit),
        ),
        Row(
            "moments_epochs", f"tutorial, moments: {steps:,} epochs after the pass", steps, "epochs",
            (*versions(steps, n_samples=n, full_batch_engine="moments"), *limit),
        ),
    )  # fmt: skip


def _stream(name: str, title: str, n: int, d: int, goals: tuple[Goal, ...], *others: Contestant, **options: Any) -> Row:
    """Epochs over `n` rows that are held in memory, by each version of tapedist and `others`."""
    epochs = 5
    if "table" not in options:
        options |= {"n_samples": n, "num_features": d}
    return Row(
        name, f"{n:,} rows, d = {d}, {title}: {epochs} epochs", n * epochs, "rows",
        (*versions(epochs, full_batch_engine="stream", **options), *others),
        (within(1.15, OLDER), within(0.9, OLDER, FAST), *goals),
    )  # fmt: skip


def _streams(sizes: Sizes) -> tuple[Row, ...]:
    narrow, middle, wide, d = sizes.narrow_rows, sizes.middle_rows, sizes.wide_rows, sizes.wide
    half = Goal(
        "fast: at least half the C limit", (FAST, *LIMIT), lambda s, _: fastest_limit(s) / s[FAST], lambda v: v >= 0.5
    )
    twice = against("JAX", 2)

    def others(n: int, d: int, **at_most: int) -> tuple[Contestant, ...]:
        task = {"n": n, "d": d, "steps": 5}
        c_program = limits("stream", n, d, 5) if d in (1, 64) else ()
        return (*peers(task, "jax", "numpy", "torch", **at_most), *c_program)

    bytes_ = max(2**22, wide * (d + 1) * 4)
    bus = Contestant("memory bus", "limit", (0, ("bandwidth", bytes_)))
    share = Goal(
        "share of the memory bus", (TAPEDIST, "memory bus"),
        lambda s, _: 100 * s["memory bus"] / bytes_ * wide * (d + 1) * 4 * 5 / s[TAPEDIST], None, "%",
    )  # fmt: skip
    return (
        _stream("stream_narrow", "held", narrow, 1, (twice, half), *others(narrow, 1, torch=2)),
        _stream("stream_middle", "held", middle, 8, (against("JAX", 1),), *others(middle, 8)),
        _stream("stream_wide", "held", wide, d, (twice, share), *others(wide, d), bus),
        _stream("stream_huber", "held, huber", middle, 8, (), loss="huber"),
        _stream("stream_weights", "arrays with weights", middle, 8, (), in_memory=True, weighted=True),
        _stream("stream_float64", "arrays of float64", wide, d, (), in_memory=True, dtype="float64"),
        _stream(
            "stream_parquet", "of a Parquet table, read in every epoch", middle, 8, (), table=(middle, 8), cache="none"
        ),
        _stream("streamed_narrow", "made anew in every epoch", narrow, 1, (), cache="none"),
    )


def _second_moments(sizes: Sizes) -> tuple[Row, ...]:
    return tuple(
        _moments_of(sizes.wide_rows, d, dtype, most)
        for d, dtype, most in (
            (8, "float32", 1.1),
            (8, "float64", 1.1),
            (sizes.wide, "float32", 2.0),
            (sizes.wide, "float64", 3.0),
        )
    )


def _moments_of(n: int, d: int, dtype: str, most: float) -> Row:
    """Second moments of arrays in memory; exact ones take at most `most` x the time of 0.1."""
    task = {"kind": "moments", "n": n, "d": d, "steps": 1}
    in_float64: tuple[Contestant, ...] = ()
    goals = (within(most, OLDER),)
    if dtype == "float64":
        in_float64 = (
            Contestant("NumPy normal equations", "numpy", task),
            Contestant("scikit-learn LinearRegression", "sklearn", task),
            Contestant("oneDAL", "onedal", task),
        )
        if d > 8:
            goals += (against("NumPy normal equations", 1, FAST), against("oneDAL", 0.8, FAST))
    config = {"n_samples": n, "num_features": d, "dtype": dtype, "full_batch_engine": "moments"}
    return Row(
        f"moments_{d}_{dtype}", f"second moments of {n:,} {dtype} rows in memory, d = {d}", n, "rows",
        (*versions(1, kind="pass", in_memory=True, **config), *in_float64),
        goals,
        rounds=5,
    )  # fmt: skip


def _mini_batch(sizes: Sizes) -> tuple[Row, ...]:
    n, batch, fresh = 1024 * 1024, 1024, sizes.fresh_steps
    raw = Goal(
        "at least 75 % of the raw generator's rate", (TAPEDIST, "raw generator"),
        lambda s, _: 100 * s["raw generator"] / s[TAPEDIST], lambda v: v >= 75, "%",
    )  # fmt: skip
    config = {"n_samples": 10**12, "cache": "none", "mode": "mini_batch", "batch_size": batch}
    return (
        _batches("mini_batch_cached", n, 1, batch, sizes.batch_steps, (against("Keras fit", 100),), "keras", "eager"),
        _batches("mini_batch_wide", n // 16, sizes.wide, batch, sizes.batch_steps, ()),
        Row(
            "mini_batch_fresh", f"mini batch, B = {batch:,}, new rows: {fresh:,} steps", batch * fresh, "rows",
            (
                *versions(fresh, **config),
                Contestant("raw generator", TAPEDIST, {"kind": "rows", "n": batch * fresh, "d": 1}),
                *peers({"kind": "fresh", "batch": batch, "steps": fresh, "d": 1}, "jax", "numpy"),
            ),
            (raw,),
        ),
    )  # fmt: skip


def _batches(name: str, n: int, d: int, batch: int, steps: int, goals: tuple[Goal, ...], *slow_peers: str) -> Row:
    """Mini-batches of rows that are held in memory."""
    task = {"n": n, "d": d, "batch": batch, "steps": steps}
    config = {"n_samples": n, "num_features": d, "mode": "mini_batch", "batch_size": batch, "cache": "device"}
    return Row(
        name, f"mini batch, B = {batch:,}, d = {d}, cached rows: {steps:,} steps", steps, "steps",
        (
            *versions(steps, **config),
            *peers(task, "jax", "numpy", "torch", *slow_peers, torch=300, keras=1024, eager=60),
            *limits("minibatch", n, d, batch, steps),
        ),
        (within(1, OLDER), within(0.9, OLDER, FAST), against("JAX", 1), *goals),
    )  # fmt: skip


def _sums(sizes: Sizes) -> tuple[Row, ...]:
    rows = []
    for batch, d in sizes.sum_batches:
        # A few batches, so that small ones do not sit in the first-level cache, and large ones fit into memory.
        n = batch * max(1, min(64, 2**24 // (batch * d)))
        steps = max(4, min(2048, 2**26 // (batch * (d + 1))))
        task = {"kind": "plain", "n": n, "d": d, "batch": batch, "steps": steps}
        config = {"n_samples": n, "num_features": d, "mode": "mini_batch", "batch_size": batch, "cache": "device"}
        cost = Goal("cost of exact sums", ("exact", "XLA"), lambda s, _: s["exact"] / s["XLA"], None)
        rows.append(
            Row(
                f"sums_{batch}_{d}", f"exact sums, {batch:,} rows a step, d = {d}", steps, "steps",
                (
                    engine("exact", steps, arithmetic="exact", **config),
                    engine("fast", steps, arithmetic="fast", **config),
                    Contestant("XLA", TAPEDIST, task),
                    *peers(task | {"kind": "jax"}, "jax"),
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
                engine(f"R = {r}", steps, n_samples=8000, full_batch_engine="stream", runs_in=f"{TAPEDIST}/{r}")
                for r in (1, 2, 4)
            ),
            rounds=3,
        ),
    )  # fmt: skip


def _curve(sizes: Sizes) -> tuple[Row, ...]:
    rows = []
    for n in sizes.curve:
        cold = n >= 10**9
        batch_steps = max(1, min(n, 32_000_000) // 1024)
        full = {"n_samples": n, "full_batch_engine": "stream"}
        contestants = [
            engine("stream, cached", 1, **full),
            engine("stream, streamed", 1, cache="none", **full),
            engine("moments, the pass", 1, kind="pass", n_samples=n, full_batch_engine="moments"),
            engine("mini batch, new rows", batch_steps, n_samples=n, mode="mini_batch", batch_size=1024, cache="none"),
        ]
        if n * 8 > 4 * 2**30:
            contestants = contestants[1:]  # More than `--cache=auto` would hold.
        for contestant in contestants[:-1]:  # The last one is warmed up by less than it measures.
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
    sizes = QUICK if quick else Sizes()
    return (
        *_tutorial(sizes), *_streams(sizes), *_second_moments(sizes), *_mini_batch(sizes), *_sums(sizes),
        *_replicas(sizes), *processes(sizes.billion), *_curve(sizes),
    )  # fmt: skip
