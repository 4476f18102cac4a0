#!/usr/bin/env python3
"""Kills training processes at random moments, and holds what the resumed runs end with against an undisturbed run.

    scripts/inject_faults.py --kills=100 --output=scripts/fault_results/today.md

Every process is a real `tapedist train`. A run folder meets a random list of faults:

    kill    SIGKILL, at a random moment of start or training
    save    SIGKILL while a checkpoint is being written (what it had written must still lie there)
    double  SIGKILL in training, then SIGKILL of the process that resumes, before it trains or soon after
    term    SIGTERM, and
    int     SIGINT, at a random moment of one phase: start, load, train, plot
    move    SIGTERM in training; what follows runs on another number of replicas

and is then left alone to finish. Its digest, summary, final checkpoint and metrics (but for `time` and
`examples_per_sec`) must equal those of a run that nobody disturbed. The result document is written anew after every
run, so that one that is broken off says how far it came.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # The script may be started from anywhere.

from scripts.fault_injection.document import document
from scripts.fault_injection.faults import MODES, Fault, trials
from scripts.fault_injection.injector import Injector
from scripts.fault_injection.outcome import Tally


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs; the other counts follow from it")
    for name, share in (("saves", 10), ("doubles", 10), ("signals", 4), ("moves", 5)):
        parser.add_argument(f"--{name}", type=int, default=None, help=f"by default a {share}th of --kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--parallel", type=int, default=2, help="processes at a time")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no further run after so many")
    parser.add_argument("--output", type=Path, help="where the result document goes")
    return parser.parse_args()


def _counts(options: argparse.Namespace) -> dict[str, int]:
    def count(asked: int | None, share: int) -> int:
        return -(-options.kills // share) if asked is None else asked

    return {
        "kill": options.kills, "save": count(options.saves, 10), "double": count(options.doubles, 10),
        "signal": count(options.signals, 4), "move": count(options.moves, 5),
    }  # fmt: skip


def main() -> int:
    options = _options()
    counts, modes, began = _counts(options), options.modes.split(","), time.monotonic()
    rng, tally = random.Random(options.seed), Tally(wanted=sum(counts.values()))
    # A shell ignores SIGINT for what it starts in the background, and what is started here would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root = Path(tempfile.mkdtemp(prefix="tapedist-faults-"))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)

    def write() -> str:
        text = document(options, counts, tally, time.monotonic() - began)
        if options.output:
            options.output.write_text(text)
        return text

    with ThreadPoolExecutor(options.parallel) as pool:
        injectors = dict(zip(modes, pool.map(lambda mode: Injector(mode, root, rng, tally), modes), strict=True))

        def run_trial(mode: str, faults: list[Fault]) -> None:
            if time.monotonic() - began < options.minutes * 60:
                injectors[mode].run_trial(faults)

        for future in as_completed(
            [pool.submit(run_trial, mode, faults) for mode, faults in trials(counts, modes, rng)]
        ):
            future.result()
            write()
    print(write())
    if tally.failures:
        print(f"The folders of the runs that failed are in {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
