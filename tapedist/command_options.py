"""The flags of the commands on a finished run, checked before anything is read."""

from __future__ import annotations

import dataclasses

from tapedist.options import ANY, SWITCHES, Options, Rule, option
from tapedist.settings import SYNTHETIC


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """A command on a run; `report` and `export` need nothing else."""

    run_dir: str = option("", "Folder of the run.", rule=Rule(bool, "must name the folder of a training run"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """Options of `tapedist evaluate`."""

    data: str = option("", "Table to evaluate on; empty takes the run's own rows, both splits.", rule=ANY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(RunOptions):
    """Options of `tapedist predict`."""

    data: str = option(
        "",
        "Table with the run's features; a target is not needed.",
        rule=Rule(lambda v: v not in ("", SYNTHETIC), "must name the table to predict for"),
    )
    output: str = option(
        "", "File to make, .csv or .parquet.", rule=Rule(bool, "must name the file to make, .csv or .parquet")
    )
    interval: str = option(
        "false", "Add columns low and high: prediction intervals for single rows. auto: if the run has them.",
        choices=SWITCHES,
    )  # fmt: skip
    level: float = option(
        0.95, "Probability of the intervals, inside (0, 1).", rule=Rule(lambda v: 0 < v < 1, "must be inside (0, 1)")
    )
    on_bad_rows: str = option(
        "error", "Rows with bad cells: stop, or leave them out and add their row numbers.", choices=("error", "drop")
    )
    overwrite: bool = option(False, "Replace --output if it exists.")
