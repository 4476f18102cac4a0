"""A row's result on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
from comparison import Row
from measure import judged, summaries


def seconds_text(seconds: float) -> str:
    """Three digits and a fitting unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"
    raise AssertionError


def rate_text(rate: float, unit: str) -> str:
    """Work per second with a unit prefix."""
    for factor, prefix in ((1e9, "G "), (1e6, "M "), (1e3, "k ")):
        if rate >= factor:
            return f"{rate / factor:.3g} {prefix}{unit}/s"
    return f"{rate:.3g} {unit}/s"


def show(row: Row, records: Sequence[Mapping[str, Any]]) -> None:
    """Prints the row's contestants with their ratio to the first, and its goals."""
    found = summaries(records, row.name)
    if not found:
        return
    first = next(iter(found.values())).median
    view = rich.table.Table(title=f"{row.name}: {row.title}", title_justify="left", title_style="bold")
    view.add_column("contestant")
    for heading in ("median", "quartiles", "least", "rate", "time against the first"):
        view.add_column(heading, justify="right")
    for name, one in found.items():
        quartiles = f"{seconds_text(one.quartiles[0])} - {seconds_text(one.quartiles[2])}"
        rate = rate_text(one.rate, row.unit)
        ratio = f"{one.median / first:.3g} x"
        view.add_row(name, seconds_text(one.median), quartiles, seconds_text(one.least), rate, ratio)
    console = rich.console.Console()
    console.print(view)
    for goal in row.goals:
        value, verdict = judged(goal, found)
        console.print(f"  {goal.text}: {value} [{verdict}]", markup=False)
