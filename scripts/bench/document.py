"""From measurements to the dated document, the plot and the section of `docs/benchmarks.md`."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import curve
from comparison import Row
from costs import constants
from measure import Summary, judged, summaries
from table import rate_text, seconds_text
from workloads import rows_of

Records = Sequence[Mapping[str, Any]]

_HOW = """\
Contestants of a row take turns, round after round, each in a process of its own that has its data and has warmed up
twice; peers stay loaded and sleep while others run. A measurement is the median of as many calls as fit into 0.12 s (at
most 20), timed from the call to the result on the host. The table gives the median and the quartiles over the rounds;
ratios compare medians of the same run. Losses are computed by all. Peers that need seconds do only some of the steps
(see the notes), scaled to all of them. The C program runs with one thread and with all; the better one is the limit.
"""


def write(records: Records, folder: pathlib.Path, *, source: pathlib.Path) -> list[pathlib.Path]:
    """Writes `DATE.md`, `DATE.png` and `benchmarks-section.md` into `folder`; returns their paths.

    Args:
        records: what `suite.py run` wrote.
        folder: made if missing.
        source: the file the records came from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    machine = records[0]
    name = str(machine["date"]).split()[0] + ("-quick" if machine["quick"] else "")
    rows = [(row, summaries(records, row.name)) for row in rows_of(quick=bool(machine["quick"]))]
    rows = [(row, found) for row, found in rows if found]
    paths = [folder / f"{name}.md", folder / "benchmarks-section.md"]
    plot = folder / f"{name}.png"
    if any(row.name.startswith("curve") for row, _ in rows):
        curve.draw([(row, found) for row, found in rows if row.name.startswith("curve")], plot)
        paths.append(plot)
    paths[0].write_text("\n".join(_document(machine, records, rows, plot, source)), encoding="utf-8")
    template = pathlib.Path(__file__).with_name("benchmarks_section.md").read_text(encoding="utf-8")
    paths[1].write_text(
        _filled(template, constants(machine, {row.name: found for row, found in rows}), _goals(rows)), encoding="utf-8"
    )
    return paths


def _document(
    machine: Mapping[str, Any],
    records: Records,
    rows: Sequence[tuple[Row, Any]],
    plot: pathlib.Path,
    source: pathlib.Path,
) -> Iterator[str]:
    yield f"# Benchmarks of {machine['date']}\n"
    if machine["quick"]:
        yield "**A quick run: it shows that the suite works; its numbers mean nothing.**\n"
    yield from _setting(machine, records, source)
    yield "## What must be reached\n"
    yield from _goals(rows)
    if plot.exists():
        yield f"\n## Rows per second against `n_samples`\n\n![rows per second]({plot.name})\n"
    yield "## How to read it\n"
    yield _HOW
    yield "## All measurements"
    for row, found in rows:
        yield from _row_table(row, found)
    skipped = dict.fromkeys(
        f"* `{r['row']}`: {r['contestant']} ({r['reason']})" for r in records if r["kind"] == "skipped"
    )
    if skipped:
        yield "\n## Skipped\n"
        yield from skipped
    yield ""


def _setting(machine: Mapping[str, Any], records: Records, source: pathlib.Path) -> Iterator[str]:
    versions = [f"{name} {version}" for name, version in machine["versions"].items()]
    peers = [r["version"] for r in records if r["kind"] == "peer" and not r["peer"].startswith("tapedist")]
    memory = f"{machine['memory_gib']} GiB"
    yield f"* Processor: {machine['processor']}, {machine['cores']} cores, {machine['caches']}; {memory}"
    yield f"* System: {machine['system']}; Python {machine['python']}; {machine['compiler']}"
    yield f"* Versions: {', '.join(versions)}; peers: {', '.join(dict.fromkeys(peers)) or 'none'}"
    yield f"* Commit `{machine['commit']}`; XLA flags of tapedist's process: its defaults (`tapedist/runtime_flags.py`)"
    yield f"* Load before the run: {machine['load']:.2f}; measurements, one JSON object a line: `{source.name}`"
    yield "* Command: `scripts/bench.sh`; configs: in `scripts/bench/workloads.py` at that commit\n"


def _goals(rows: Sequence[tuple[Row, Any]]) -> list[str]:
    lines = ["| work | must reach | reached | |", "|---|---|---|---|"]
    for row, found in rows:
        for goal in row.goals:
            value, verdict = judged(goal, found)
            lines.append(f"| {row.title} | {goal.text} | {value} | {verdict} |")
    return lines


def _row_table(row: Row, found: Mapping[str, Summary]) -> Iterator[str]:
    first = next(iter(found.values())).median
    yield f"\n### {row.title}\n\n| `{row.name}` | median | quartiles | least | rate | time against the first | notes |"
    yield "|---|---:|---:|---:|---:|---:|---|"
    for name, one in found.items():
        quartiles = f"{seconds_text(one.quartiles[0])} - {seconds_text(one.quartiles[2])}"
        yield (
            f"| {name} | {seconds_text(one.median)} | {quartiles} | {seconds_text(one.least)} "
            f"| {rate_text(one.rate, row.unit)} | {one.median / first:.3g} x | {_note(one)} |"
        )


def _note(one: Summary) -> str:
    phases = {key: value for key, value in one.outcome.items() if " " in key}
    facts = "; ".join(f"{key} {seconds_text(value)}" for key, value in phases.items())
    memory = f"peak {one.outcome['peak_mib']:.0f} MiB" if "peak_mib" in one.outcome else ""
    return "; ".join(part for part in (one.note, memory, facts) if part)


def _filled(template: str, values: Mapping[str, str], goals: Sequence[str]) -> str:
    """The template with `{name}` replaced by measured constants; what was not measured stays visible."""
    text = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], "(not measured)"), template)
    return text.replace("<goals>", "\n".join(goals))
