"""The `moments` engine: full batch on squared error, where one pass over the rows serves all epochs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from tapedist.config import TrainConfig
from tapedist.data import pipeline
from tapedist.data.blocks import BlockPlan
from tapedist.training.engines.setup import Setup
from tapedist.training.moments import Moments, MomentSteps
from tapedist.training.quadratic import QuadraticForm, QuadraticSteps
from tapedist.training.steps import CallResult

_MOST_FEATURES = 512


class MomentsEngine:
    """Full batch on squared error: one pass for the second moments, then epochs on the quadratic form they define."""

    name = "moments"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, plan: BlockPlan, *, split: str):
        self.reason = f"one pass over {plan.num_rows} rows, then epochs on their second moments"
        self._setup = setup
        self._sums = MomentSteps(
            strategy=setup.strategy,
            num_features=plan.num_features,
            num_rows=plan.num_rows,
            weighted=setup.source.weighted,
            split=split,
            num_shards=setup.num_shards,
            tile_rows=plan.tile_rows,
            parallel=setup.parallel,
        )
        self._pass = setup.block_pass(self._sums, plan, split=split, passes=1)
        shards = pipeline.shard_block_elements(plan, setup.layout, split=split)
        self._resident = plan.resident
        self._shards = functools.cache(lambda: next(setup.elements(shards, range(1))))
        self._steps = QuadraticSteps(**setup.programs)
        self._moments: Moments | None = None

    def moments(self, interrupted: Callable[[], bool] = lambda: False) -> Moments | None:
        """The split's moments, by a pass over the rows if they are not known yet; None if interrupted."""
        if self._moments is None and self._resident:
            self._moments = self._sums.of_shards(*self._shards())
        elif self._moments is None:
            sums = self._pass.run(self._sums.add_blocks, interrupted=interrupted)
            self._moments = None if sums is None else self._sums.finish(sums)
        return self._moments

    @functools.cached_property
    def form(self) -> QuadraticForm:
        """The quadratic form; the moments are known."""
        assert self._moments
        return QuadraticForm.of(self._moments, fit_intercept=self._setup.fit_intercept)

    def run(
        self, state: np.ndarray, *, step: int, num_steps: int, limit: float, interrupted: Callable[[], bool]
    ) -> CallResult | None:
        if self.moments(interrupted) is None:
            return None
        return self._steps.run(state, self.form, step=step, num_steps=num_steps, limit=limit)

    def progress(self) -> dict[str, np.ndarray]:
        return {"moments": self._moments.to_vector()} if self._moments else self._pass.progress()

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        if "moments" in progress:
            self._moments = Moments.from_vector(progress["moments"])
        else:
            self._pass.restore(progress)


def moments(setup: Setup, *, split: str = "train") -> MomentsEngine:
    """The `moments` engine."""
    return MomentsEngine(setup, setup.block_plan(split), split=split)


def moments_obstacle(config: TrainConfig, *, num_features: int, is_linear: bool, own_loss: bool) -> str:
    """Why the `moments` engine cannot serve a run; empty if it can."""
    if not is_linear:
        return "the model is not the linear one"
    if own_loss or config.loss != "squared":
        return "the loss is not squared error"
    if num_features > _MOST_FEATURES:
        return f"{num_features} features are more than {_MOST_FEATURES}"
    return ""
