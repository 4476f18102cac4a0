"""A worker for the multi-worker tests: one start, several trainings, so that the bits of all engines cost few launches.

    python tests/train_many.py train FILE [--flag=value ...]

FILE holds a JSON object, name -> flags and `module:NAME` -> value, set for this training: sizes shrink so that small
data takes the paths of large data. Prints `NAME DIGEST` for each; the flags behind FILE are added to all.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from topology import constants

from tapedist.cluster import resolve
from tapedist.cluster.join import joined
from tapedist.config import TrainConfig
from tapedist.flags import CommandLine
from tapedist.process import StopSignals
from tapedist.results.monitor import Monitor
from tapedist.run import train


def main(argv: list[str]) -> None:
    cases: dict[str, Any] = json.loads(Path(argv[2]).read_text())
    configs = {name: CommandLine(TrainConfig, [*words, *argv[3:]]).options() for name, (words, _) in cases.items()}
    first = next(iter(configs.values()))
    spec = resolve.of_run(first, os.environ)
    with (
        StopSignals() as stop,
        joined(first, spec, stop_signal=lambda: stop.signum, quiet=True) as (strategy, why, team),
    ):
        for name, config in configs.items():
            with constants(cases[name][1]):
                place = train.Place(strategy=strategy, choice=why, team=team, monitor=Monitor(), folder=None, stop=stop)
                print(name, train.fit(config, place).digest, flush=True)


if __name__ == "__main__":
    main(sys.argv)
