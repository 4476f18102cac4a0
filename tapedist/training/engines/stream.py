"""The `stream` engine: full batch for any model and loss, in the form that fits the split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from tapedist.data import pipeline
from tapedist.data.blocks import BlockPlan
from tapedist.training.block_steps import BlockSteps
from tapedist.training.engines.engine import Engine, WholeSteps
from tapedist.training.engines.setup import Setup
from tapedist.training.slot_steps import LEAST_SLOTS, SlotSteps
from tapedist.training.steps import MAX_STEPS_PER_CALL, CallResult


class ResidentEngine(WholeSteps):
    """Full batch on a split so small that whole shards are summed in one program."""

    name = "stream"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, plan: BlockPlan, *, split: str, steps: SlotSteps):
        self.reason = "the split is small: one compiled loop over its shards"
        element = pipeline.shard_elements(plan, setup.layout, split=split, slots=LEAST_SLOTS)
        self._rows, self._counts = next(setup.elements(element, range(1)))
        self._steps = steps
        self._split, self._num_rows = split, plan.num_rows

    def run(
        self, state: np.ndarray, *, step: int, num_steps: int, limit: float, interrupted: Callable[[], bool]
    ) -> CallResult:
        slots = np.zeros(min(num_steps, MAX_STEPS_PER_CALL), np.int32)
        result = self._steps.run(state, self._rows, self._counts, slots, step=step, limit=limit)
        return result.complete(self._num_rows, self._split)


class HeldEngine(WholeSteps):
    """Full batch on blocks in device memory."""

    name = "stream"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, plan: BlockPlan, *, split: str):
        self.reason = f"{plan.num_blocks} blocks of {plan.block_rows} rows, held in device memory"
        self._steps = BlockSteps(tile_rows=plan.tile_rows, parallel=setup.parallel, **setup.row_programs)
        order = pipeline.BlockOrder.whole(plan, setup.layout)
        self._split, self._num_rows = split, plan.num_rows
        self._held = self._steps.hold(setup.elements(pipeline.block_elements(order, split=split), range(order.turns)))

    def run(
        self, state: np.ndarray, *, step: int, num_steps: int, limit: float, interrupted: Callable[[], bool]
    ) -> CallResult:
        result = self._steps.run(state, self._held, step=step, num_steps=num_steps, limit=limit)
        return result.complete(self._num_rows, self._split)


class StreamedEngine:
    """Full batch on blocks that are made or read anew in every epoch, at constant memory."""

    name = "stream"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, plan: BlockPlan, *, split: str, passes: int):
        self.reason = f"{plan.num_blocks} blocks of {plan.block_rows} rows, streamed anew in every epoch"
        self._setup = setup
        self._split, self._num_rows = split, plan.num_rows
        self._steps = BlockSteps(tile_rows=plan.tile_rows, parallel=setup.parallel, **setup.row_programs)
        self._pass = setup.block_pass(self._steps, plan, split=split, passes=passes)

    def run(
        self, state: np.ndarray, *, step: int, num_steps: int, limit: float, interrupted: Callable[[], bool]
    ) -> CallResult | None:
        sums = self._pass.run(functools.partial(self._steps.add_blocks, state), interrupted=interrupted)
        if sums is None:
            return None
        return self._steps.finish(state, sums, step=step, limit=limit).complete(self._num_rows, self._split)

    def progress(self) -> dict[str, np.ndarray]:
        return self._pass.progress()

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        self._pass.restore(progress)


def full_batch(setup: Setup, *, split: str, passes: int) -> Engine:
    """The `stream` engine in the form that fits the split.

    Args:
        setup: what every engine needs.
        split: "train" or "test".
        passes: how often the split will be visited; rows that are seen once are not worth holding.
    """
    plan = setup.block_plan(split)
    if plan.resident:  # Whatever --cache says: it must not change the form, and with it the bits.
        return ResidentEngine(setup, plan, split=split, steps=SlotSteps(even=plan.even, **setup.row_programs))
    padded = plan.rounds * setup.num_shards * plan.block_rows * setup.row_bytes()
    if setup.cache == "device" or (setup.cache == "auto" and passes > 1 and padded <= setup.budget):
        return HeldEngine(setup, plan, split=split)
    return StreamedEngine(setup, plan, split=split, passes=passes)
