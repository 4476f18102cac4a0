"""The result as Markdown."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import statistics
from importlib import metadata

from scripts.fault_injection.faults import MODES
from scripts.fault_injection.outcome import Tally


def document(options: argparse.Namespace, counts: dict[str, int], tally: Tally, seconds: float) -> str:
    """The result as Markdown."""
    kinds_met = {kind for _, kind in tally.faults}
    kinds = [kind for kind in ("kill", "save", "double", "term", "int", "move") if kind in kinds_met]
    lines = [
        f"# Fault injection, {dt.date.today()}",
        "",
        f"`scripts/inject_faults.py --kills={counts['kill']} --saves={counts['save']} --doubles={counts['double']} "
        f"--signals={counts['signal']} --moves={counts['move']} --seed={options.seed} --modes={options.modes}`",
        "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {platform.system()}, "
        f"Python {platform.python_version()}, TensorFlow {metadata.version('tensorflow')}, "
        f"NumPy {metadata.version('numpy')}. {tally.starts} processes in {seconds / 60:.0f} minutes, "
        f"{options.parallel} at a time; the machine's load average at the end was {os.getloadavg()[1]:.1f}.",
        "",
        "Compared with an undisturbed run of the same flags on one replica: digest and summary (`done.json`, "
        "`model.json`), every array of the last checkpoint (parameters, optimizer slots, first loss, epoch sums, "
        "parameter path), and every line of `metrics.jsonl` but for `time` and `examples_per_sec`.",
        "",
        "| mode | " + " | ".join(kinds) + " | runs compared |",
        "|---|" + "---:|" * (len(kinds) + 1),
    ]
    for mode in options.modes.split(","):
        cells = [str(tally.faults[mode, kind]) for kind in kinds]
        lines.append(f"| {mode} | {' | '.join(cells)} | {tally.compared[mode]} |")
    totals = [str(sum(count for (_, k), count in tally.faults.items() if k == kind)) for kind in kinds]
    lines += [f"| all | {' | '.join(totals)} | {sum(tally.compared.values())} |", ""]
    if tally.leaving_secs:
        lines += [
            f"Seconds from SIGTERM or SIGINT to the end of the process: median "
            f"{statistics.median(tally.leaving_secs):.2f}, longest {max(tally.leaving_secs):.2f}.",
            "",
        ]
    if tally.left:
        lines += [f"**Broken off** before {tally.left} more faults could fall.", ""]
    lines += [f"**{len(tally.failures)} failures.**", *(f"* {failure}" for failure in tally.failures), ""]
    lines += ["Modes:", "", *(f"* {mode}: `{' '.join(MODES[mode])}`" for mode in options.modes.split(","))]
    return "\n".join(lines) + "\n"
