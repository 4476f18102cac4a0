"""The rows of the suite: what is measured, by whom, and what must be reached."""

from __future__ import annotations

import dataclasses

from comparison import LIMIT, TAPEDIST, Contestant, Goal, Row, against, engine, fastest_limit, limits, peers
from processes import processes


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
    sum_batches: tuple[tuple[int, int], ...] = tuple((b, d) for d in (1, 64) for b in (1024, 65_536, 1_048_576))


QUICK = Sizes(
    tutorial_epochs=20, narrow_rows=700_000, wide_rows=20_000, batch_steps=64, fresh_steps=300, billion=1_000_000,
    curve=(10_000, 600_000), sum_batches=((1024, 1),),
)  # fmt: skip


def _tutorial(sizes: Sizes) -> tuple[Row, ...]:
    n, steps = 8000, sizes.tutorial_epochs
    task = {"n": n, "d": 1, "steps": steps}
    limit = limits("stream", n, 1, steps)
    within = Goal(
        "at most 1.6 x the C limit", (TAPEDIST, *LIMIT), lambda s, _: s[TAPEDIST] / fastest_limit(s), lambda v: v <= 1.6
    )
    moments = Goal(
        "at most 0.3 x the C limit", (TAPEDIST, *LIMIT), lambda s, _: s[TAPEDIST] / fastest_limit(s), lambda v: v <= 0.3
    )
    return (
        Row(
            "tutorial", f"tutorial, stream: {n:,} rows, {steps:,} epochs, steady state", n * steps, "rows",
            (
                engine(TAPEDIST, steps, n_samples=n, full_batch_engine="stream"),
                *peers(task, "jax", "numpy", "torch", "keras", "eager", torch=300, keras=256, eager=60),
                *limit,
            ),
            (against("JAX", 1), within),
        ),
        Row(
            "tutorial_moments", f"tutorial, moments: a pass over {n:,} rows and {steps:,} epochs", n * steps, "rows",
            (engine(TAPEDIST, steps, kind="pass", n_samples=n, full_batch_engine="moments"), *limit),
            (moments,),
        ),
        Row(
            "moments_epochs", f"tutorial, moments: {steps:,} epochs after the pass", steps, "epochs",
            (engine(TAPEDIST, steps, n_samples=n, full_batch_engine="moments"), *limit),
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
        "at least half the C limit", (TAPEDIST, *LIMIT), lambda s, _: fastest_limit(s) / s[TAPEDIST], lambda v: v >= 0.5
    )
    return (
        Row(
            "stream_narrow", f"{narrow:,} rows, d = 1, cached, stream: {epochs} epochs", narrow * epochs, "rows",
            (
                engine(TAPEDIST, epochs, n_samples=narrow, full_batch_engine="stream"),
                *peers({"n": narrow, "d": 1, "steps": epochs}, "jax", "numpy", "torch", torch=2),
                *limits("stream", narrow, 1, epochs),
            ),
            (against("JAX", 1.5), half),
        ),
        Row(
            "stream_wide", f"{wide:,} rows, d = {d}, cached, stream: {epochs} epochs", wide * epochs, "rows",
            (
                engine(TAPEDIST, epochs, n_samples=wide, num_features=d, full_batch_engine="stream"),
                *peers({"n": wide, "d": d, "steps": epochs}, "jax", "numpy", "torch"),
                *limits("stream", wide, d, epochs),
                bus,
            ),
            (against("JAX", 1.4), share),
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
                engine(TAPEDIST, 1, kind="pass", in_memory=True, **config),
                Contestant("NumPy normal equations", "numpy", task),
                Contestant("scikit-learn LinearRegression", "sklearn", task),
                Contestant("oneDAL", "onedal", task),
            ),
            (against("scikit-learn LinearRegression", 5), onedal),
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
                engine(TAPEDIST, steps, n_samples=n, **config),
                *peers(task, "jax", "numpy", "torch", "keras", "eager", torch=300, keras=1024, eager=60),
                *limits("minibatch", n, 1, batch, steps),
            ),
            (against("JAX", 1), against("Keras fit", 100)),
        ),
        Row(
            "mini_batch_fresh", f"mini batch, B = {batch:,}, new rows: {fresh:,} steps", batch * fresh, "rows",
            (
                engine(TAPEDIST, fresh, n_samples=10**12, cache="none", **config),
                Contestant("raw generator", TAPEDIST, {"kind": "rows", "n": batch * fresh, "d": 1}),
                *peers({"kind": "fresh", "batch": batch, "steps": fresh, "d": 1}, "jax", "numpy"),
            ),
            (raw,),
        ),
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
        *_tutorial(sizes), *_cached(sizes), *_second_moments(sizes), *_mini_batch(sizes), *_sums(sizes),
        *_replicas(sizes), *processes(sizes.billion), *_curve(sizes),
    )  # fmt: skip
