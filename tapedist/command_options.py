"""The flags of the commands on a finished run, checked before anything is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tapedist.config import SWITCHES, SYNTHETIC, option
from tapedist.errors import InputError
from tapedist.text_values import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A command on a run; `report` and `export` need nothing else."""

    run_dir: str = option("", "Folder of the run.")

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise InputError(*problems)

    def _problems(self) -> Iterator[str]:
        if not self.run_dir:
            yield "--run_dir=: must name the folder of a training run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """Options of `tapedist evaluate`."""

    data: str = option("", "Table to evaluate on; empty takes the run's own rows, both splits.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(RunOptions):
    """Options of `tapedist predict`."""

    data: str = option("", "Table with the run's features; a target is not needed.")
    output: str = option("", "File to make, .csv or .parquet.")
    interval: str = option(
        "false", "Add columns low and high: prediction intervals for single rows. auto: if the run has them.",
        choices=SWITCHES,
    )  # fmt: skip
    level: float = option(0.95, "Probability of the intervals, inside (0, 1).")
    on_bad_rows: str = option(
        "error", "Rows with bad cells: stop, or leave them out and add their row numbers.", choices=("error", "drop")
    )
    overwrite: bool = option(False, "Replace --output if it exists.")

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if not self.data or self.data == SYNTHETIC:
            yield f"--data={shown(self.data)}: must name the table to predict for"
        if not self.output:
            yield "--output=: must name the file to make, .csv or .parquet"
        for name in ("interval", "on_bad_rows"):
            value = getattr(self, name)
            choices = next(f.metadata["choices"] for f in dataclasses.fields(self) if f.name == name)
            if value not in choices:
                yield f"--{name}={shown(value)}: must be one of {', '.join(choices)}"
        if not 0 < self.level < 1:
            yield f"--level={shown(self.level)}: must be inside (0, 1)"
