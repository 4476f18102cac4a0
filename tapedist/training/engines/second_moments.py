"""The `moments` engine: full batch on squared error, where one pass over the rows serves all epochs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from tapedist.data import orders
from tapedist.data.orders import BlockPlan
from tapedist.training import known_answer
from tapedist.training.engines.engine import Measured, all_epochs
from tapedist.training.engines.setup import Setup
from tapedist.training.model import LinearModel
from tapedist.training.moment_steps import NARROW, CompiledMomentSteps, HostMomentSteps, MomentSteps
from tapedist.training.moments import Moments, MomentUnits
from tapedist.training.quadratic import QuadraticForm, QuadraticSteps
from tapedist.training.steps import CallResult

_CHECKED_ROWS = 2048
_MOST_STRETCHED = 4  # On hosts a block costs some Python; there should still be many for each core.


class MomentsEngine:
    """Full batch on squared error: one pass for the second moments, then epochs on the quadratic form they define."""

    name = "moments"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, *, split: str):
        rows = setup.source.num_rows(split)
        self._tile_rows = orders.product_tile_rows(rows, setup.source.num_features)
        plan = setup.block_plan(split, self._tile_rows)
        if on_host := _suits_host(setup, plan):
            size = rows * plan.num_features * plan.itemsize
            plan = dataclasses.replace(plan, stretched=max(1, min(_MOST_STRETCHED, size // (32 * orders.BLOCK_BYTES))))
        self.reason = f"one pass over {plan.num_rows} rows, then epochs on their second moments"
        self._setup, self._split = setup, split
        self._pass_steps = _pass_steps(setup, split, rows, on_host=on_host)
        # On an accelerator such a split is one program.
        self._resident = plan.resident and not on_host
        self._pass = setup.block_pass(
            self._pass_steps,
            plan,
            zero=self._pass_steps.zero,
            passes=1,
            split=split,
            row_major=self._pass_steps.row_major,
            on_host=self._pass_steps.local_replicas if on_host else range(0),
        )
        self._steps = QuadraticSteps(strategy=setup.strategy, problem=setup.problem)
        self._sums: np.ndarray | None = None  # Known once a pass is done.
        tiles = setup.tiles(rows, self._tile_rows)["tiles"] if self._resident else plan.tiles
        if on_host:  # Whose code is the same for blocks of any size.
            tiles = min(tiles, -(-_CHECKED_ROWS // self._tile_rows))
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


def _pass_steps(setup: Setup, split: str, rows: int, *, on_host: bool) -> MomentSteps:
    """The way over the rows of a split that is the fastest where the replicas are."""
    units, weighted = MomentUnits.of(setup.bounds(split)), setup.source.weighted
    of_split = {"strategy": setup.strategy, "units": units, "num_rows": rows, "weighted": weighted, "split": split}
    if not on_host:
        return CompiledMomentSteps(parallel=setup.parallel, **of_split)
    # As rows lie in memory: NumPy turns them around on its way. Those of tables and made ones are columns.
    lies_in_rows = hasattr(setup.source, "take_runs") or not hasattr(setup.source, "read_into")
    row_major = lies_in_rows and not hasattr(setup.source, "take_tiles")
    return HostMomentSteps(fast=setup.problem.arithmetic == "fast", row_major=row_major, **of_split)


def _suits_host(setup: Setup, plan: BlockPlan) -> bool:
    """Whether NumPy sums rows where they are as fast as a program: not many narrow ones that TensorFlow makes."""
    narrow = plan.num_features < NARROW and not plan.resident
    return setup.on_cpu and not (narrow and not hasattr(setup.source, "read_into"))


def moments(setup: Setup, *, split: str = "train") -> MomentsEngine:
    """The `moments` engine."""
    return MomentsEngine(setup, split=split)
