"""Rounds: every contestant of a row takes its turn, so that a machine whose speed drifts slows all alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from comparison import Goal, Row
from drivers import Driver, Missing

_SECONDS = 0.12
_MOST_CALLS = 20
_QUIET_SECONDS = 0.25  # Some OpenMP runtimes let worker threads spin for 0.2 s after the work of the contestant before.


def measure_row(
    row: Row, drivers: Mapping[str, Driver], *, rounds: int, tell: Callable[[dict[str, Any]], None]
) -> None:
    """Prepares the contestants, measures them in turns, and drops their data.

    Args:
        row: what is measured.
        drivers: contestant -> driver; those that turn out to be missing are told and left out.
        rounds: turns.
        tell: receives one record per contestant prepared, measurement and contestant skipped.
    """
    ready: dict[str, Driver] = {}
    works = {contestant.name: contestant.work for contestant in row.contestants}
    for name, driver in drivers.items():
        try:
            driver.prepare()
        except Missing as reason:
            tell({"kind": "skipped", "row": row.name, "contestant": name, "reason": str(reason)})
            driver.drop()
            continue
        ready[name] = driver
        tell({"kind": "prepared", "row": row.name, "contestant": name} | driver.facts)
    for number in range(rounds):
        for name, driver in list(ready.items()):
            expected = driver.facts.get("second_call_seconds", 0.0)
            calls = 1 if row.single_calls or not expected else int(max(1, min(_MOST_CALLS, _SECONDS / expected)))
            time.sleep(_QUIET_SECONDS)
            try:
                answer = driver.measure(calls)
            except Missing as reason:
                tell({"kind": "skipped", "row": row.name, "contestant": name, "reason": str(reason)})
                del ready[name]
                continue
            tell(
                {
                    "kind": "measurement",
                    "row": row.name,
                    "contestant": name,
                    "round": number,
                    "calls": calls,
                    "seconds": statistics.median(answer["seconds"]),
                    "least": min(answer["seconds"]),
                    "work": works[name] or row.work,
                    "unit": row.unit,
                    "outcome": answer["outcome"],
                }
            )
    for driver in ready.values():
        driver.drop()


@dataclasses.dataclass(frozen=True)
class Summary:
    """A contestant's seconds over the rounds of a row.

    Attributes:
        least: the fastest round.
        quartiles: lower quartile, median, upper quartile.
        rounds: how many there were.
        outcome: what the last one found.
        note: how it was set.
        rate: units of work per second.
    """

    least: float
    quartiles: tuple[float, float, float]
    rounds: int
    outcome: Mapping[str, Any]
    note: str
    work: float

    @property
    def rate(self) -> float:
        return self.work / self.median

    @property
    def median(self) -> float:
        return self.quartiles[1]


def summaries(records: Iterable[Mapping[str, Any]], row: str) -> dict[str, Summary]:
    """Contestant -> summary of the records of `row`, in order of appearance."""
    seconds: dict[str, list[float]] = {}
    outcomes: dict[str, Any] = {}
    notes: dict[str, str] = {}
    works: dict[str, float] = {}
    for record in records:
        if record.get("row") != row:
            continue
        if record["kind"] == "prepared":
            notes[record["contestant"]] = record.get("note", "")
        if record["kind"] == "measurement":
            seconds.setdefault(record["contestant"], []).append(record["seconds"])
            outcomes[record["contestant"]] = record["outcome"]
            works[record["contestant"]] = record["work"]
    return {
        name: Summary(min(found), _quartiles(found), len(found), outcomes[name], notes.get(name, ""), works[name])
        for name, found in seconds.items()
    }


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def judged(goal: Goal, found: Mapping[str, Summary]) -> tuple[str, str]:
    """What was reached, and whether it is enough: `("1.27 x", "yes")`; `("-", "open")` where a peer is missing."""
    if not all(name in found for name in goal.needs):
        missing = ", ".join(name for name in goal.needs if name not in found)
        return "-", f"open: no {missing}"
    value = goal.value({name: one.median for name, one in found.items()}, {n: one.outcome for n, one in found.items()})
    verdict = "reported" if goal.reached is None else "yes" if goal.reached(value) else "NO"
    return f"{value:.3g} {goal.unit}", verdict
