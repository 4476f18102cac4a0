"""The flags of the commands on a finished run, checked before anything is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tapedist.config import SYNTHETIC
from tapedist.options import NON_NEGATIVE_INT, SWITCHES, Options, Rule, option
from tapedist.text import display

_BAD_ROWS = ("error", "drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """A command on a run; `report` and `export` need nothing else."""

    run_dir: str = option(
        "", "Folder of the run.", rule=Rule(bool, "must name the folder of a training run"), path=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """Options of `tapedist evaluate`."""

    data: str = option(
        "",
        "Table to evaluate on; empty takes the run's own rows, both splits.",
        rule=Rule(lambda v: v != SYNTHETIC, "must name a table; leave it out to take the run's own rows"),
        path=True,
    )
    weight: str = option("", "Column of --data that holds row weights; empty weighs all rows alike.")
    on_bad_rows: str = option("error", "Rows of --data with bad cells: stop, or leave them out.", choices=_BAD_ROWS)
    scratch_dir: str = option(
        "",
        "Folder for the rows of a table that does not fit into memory; empty takes the system's temporary folder.",
        path=True,
    )

    def _wrong_combinations(self) -> Iterator[str]:
        for name, default in (("weight", ""), ("on_bad_rows", "error")):
            value = getattr(self, name)
            if not self.data and value != default:
                yield f"--{name}={display(value)}: needs --data; the run's own rows are taken as they were trained on"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(RunOptions):
    """Options of `tapedist predict`."""

    data: str = option(
        "",
        "Table with the run's features; a target is not needed.",
        rule=Rule(lambda v: v not in ("", SYNTHETIC), "must name the table to predict for"),
        path=True,
    )
    output: str = option(
        "",
        "File to make, .csv or .parquet.",
        rule=Rule(bool, "must name the file to make, .csv or .parquet"),
        path=True,
    )
    interval: str = option(
        "false", "Add columns low and high: prediction intervals for single rows. auto: if the run has them.",
        choices=SWITCHES,
    )  # fmt: skip
    level: float = option(
        0.95, "Probability of the intervals, inside (0, 1).", rule=Rule(lambda v: 0 < v < 1, "must be inside (0, 1)")
    )
    on_bad_rows: str = option(
        "error", "Rows with bad cells: stop, or leave them out and add a column of row numbers, from 0.",
        choices=_BAD_ROWS,
    )  # fmt: skip
    overwrite: bool = option(False, "Replace --output if it exists.")
    scratch_dir: str = option(
        "",
        "Folder for the rows of a table that does not fit into memory; empty takes the system's temporary folder.",
        path=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions(RunOptions):
    """Options of `tapedist verify`."""

    epochs: int = option(
        0,
        "Recompute this many epochs or a few more, from the nearest stored state before them, which is taken as given; "
        "0 recomputes all from the start.",
        rule=NON_NEGATIVE_INT,
    )
