"""What a row of the suite is: one piece of work, who does it, and what must be reached.

A row's contestants do the same work and take turns. `at_most` bounds the steps of peers that need no more to be timed;
their seconds are scaled to all steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

LIMIT = ("C/OpenMP, 1 thread", "C/OpenMP, all threads")
TAPEDIST = "tapedist"
FAST = "tapedist, fast"
OLDER, OLDER_COMMIT = "tapedist 0.1", "496ab04"
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


def engine(
    name: str,
    steps: int,
    *,
    kind: str = "engine",
    runs_in: str = TAPEDIST,
    in_memory: bool = False,
    weighted: bool = False,
    table: tuple[int, int] | None = None,
    **config: Any,
) -> Contestant:
    """tapedist, as `config` says; rows `in_memory` are arrays, and only these may be `weighted`.

    A `table` is a Parquet file of so many rows and features, which whoever is first writes.
    """
    if table:
        config |= {"data": "{folder}/" + "_".join(map(str, table)) + ".parquet", "target": "y", "standardize": "false"}
    task = {"kind": kind, "steps": steps, "config": config, "in_memory": in_memory, "weighted": weighted}
    task |= {"table": table, "features": table[1] if table else config.get("num_features", 1)}
    return Contestant(name, runs_in, task)


def versions(steps: int, **options: Any) -> tuple[Contestant, ...]:
    """tapedist with exact and with fast sums, and its version 0.1; `options` as for `engine`."""
    return (
        engine(TAPEDIST, steps, **options),
        engine(FAST, steps, arithmetic="fast", **options),
        engine(OLDER, steps, runs_in="tapedist_0_1", **options),
    )


def peers(task: Mapping[str, Any], *names: str, **at_most: int) -> tuple[Contestant, ...]:
    """The peers of these names at one task; `at_most` bounds the steps of those that need no more to be timed."""
    labels = {"numpy": "NumPy", "jax": "JAX", "torch": "PyTorch", "eager": "eager tape loop", "keras": "Keras fit"}
    made = []
    for name in names:
        peer = "tensorflow" if name in ("eager", "keras") else name
        most = at_most.get(name, task["steps"])
        made.append(Contestant(labels[name], peer, {**task, "kind": task.get("kind", name), "at_most": most}))
    return tuple(made)


def limits(*words: Any) -> tuple[Contestant, ...]:
    """The C program on one thread and on all."""
    return (Contestant(LIMIT[0], "limit", (1, words)), Contestant(LIMIT[1], "limit", (0, words)))


def fastest_limit(seconds: Medians) -> float:
    """The C program's better time."""
    return min(seconds[name] for name in LIMIT)


def against(other: str, least: float, mine: str = TAPEDIST) -> Goal:
    """At least `least` times as fast as `other`."""
    text = f"at least {least:g} x {other}" if least != 1 else f"no slower than {other}"
    return Goal(text, (mine, other), lambda s, _: s[other] / s[mine], lambda v: v >= least)


def within(most: float, other: str, mine: str = TAPEDIST) -> Goal:
    """At most `most` times as long as `other`."""
    return Goal(
        f"{mine}: at most {most:g} x the time of {other}", (mine, other), lambda s, _: s[mine] / s[other],
        lambda v: v <= most,
    )  # fmt: skip
