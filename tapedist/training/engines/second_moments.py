"""The `moments` engine: full batch on squared error, where one pass over the rows serves all epochs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from tapedist.data import blocks
from tapedist.training import known_answer
from tapedist.training.engines.engine import Measured, all_epochs
from tapedist.training.engines.setup import Setup
from tapedist.training.model import LinearModel
from tapedist.training.moments import Moments, MomentSteps, MomentUnits
from tapedist.training.quadratic import QuadraticForm, QuadraticSteps
from tapedist.training.steps import CallResult


class MomentsEngine:
    """Full batch on squared error: one pass for the second moments, then epochs on the quadratic form they define."""

    name = "moments"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, *, split: str):
        rows = setup.source.num_rows(split)
        self._tile_rows = blocks.product_tile_rows(rows, setup.source.num_features)
        plan = setup.block_plan(split, self._tile_rows)
        self.reason = f"one pass over {plan.num_rows} rows, then epochs on their second moments"
        self._setup, self._split = setup, split
        self._pass_steps = MomentSteps(
            strategy=setup.strategy,
            units=MomentUnits.of(setup.bounds(split)),
            num_rows=plan.num_rows,
            weighted=setup.source.weighted,
            split=split,
            parallel=setup.parallel,
            fast=setup.problem.arithmetic == "fast",
            row_major=_row_major(setup),
        )
        self._resident = plan.resident
        self._pass = setup.block_pass(
            self._pass_steps,
            plan,
            zero=self._pass_steps.zero,
            split=split,
            passes=1,
            row_major=self._pass_steps.row_major,
        )
        self._steps = QuadraticSteps(strategy=setup.strategy, problem=setup.problem)
        self._sums: np.ndarray | None = None  # Known once a pass is done.
        tiles = setup.tiles(rows, self._tile_rows)["tiles"] if plan.resident else plan.tiles
        known_answer.check_moment_steps(
            self._pass_steps, self._steps, setup.bounds(split), tiles, self._tile_rows, setup.source.weighted
        )

    def moments(self, interrupted: Callable[[], bool] = lambda: False) -> Moments | None:
        """The split's moments, by a pass over the rows if they are not known yet; None if interrupted."""
        if self._sums is None and self._resident:
            self._sums = self._pass_steps.of_split(
                *self._setup.split_at_hand(self._split, tile_rows=self._tile_rows, row_major=self._pass_steps.row_major)
            )
        elif self._sums is None:
            sums = self._pass.run(self._pass_steps.add_blocks, interrupted=interrupted)
            self._sums = None if sums is None else self._pass_steps.finish(sums)
        return None if self._sums is None else self._moments

    @functools.cached_property
    def _moments(self) -> Moments:
        assert self._sums is not None
        return self._pass_steps.moments(self._sums)

    @functools.cached_property
    def form(self) -> QuadraticForm:
        """The quadratic form; the moments are known."""
        model = self._setup.problem.model
        assert isinstance(model, LinearModel)
        return QuadraticForm.of(self._moments, fit_intercept=model.fit_intercept)

    def run(
        self,
        state: np.ndarray,
        *,
        step: int,
        num_steps: int,
        limit: float,
        interrupted: Callable[[], bool],
        measured: Measured = all_epochs,
    ) -> CallResult | None:
        if self.moments(interrupted) is None:
            return None
        return self._steps.run(state, self.form, step=step, num_steps=num_steps, limit=limit)

    def progress(self) -> dict[str, np.ndarray]:
        return self._pass.progress() if self._sums is None else {"moments": self._sums}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        if "moments" in progress:
            self._sums = progress["moments"]
        else:
            self._pass.restore(progress)


def _row_major(setup: Setup) -> bool:
    """Whether the pass takes rows as they lie in memory: NumPy turns them around on their way to its products.

    Rows of tables and made ones are columns to begin with.
    """
    lies_in_rows = hasattr(setup.source, "take_runs") or not hasattr(setup.source, "read_into")
    return setup.on_cpu and lies_in_rows and not hasattr(setup.source, "take_tiles")


def moments(setup: Setup, *, split: str = "train") -> MomentsEngine:
    """The `moments` engine."""
    return MomentsEngine(setup, split=split)
