"""The `stream` engine: full batch for any model and loss, in the form that fits the split."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tapedist.data.orders import BlockPlan
from tapedist.training import known_answer
from tapedist.training.block_steps import BlockSteps
from tapedist.training.engines.engine import Engine, Measured, WholeSteps, all_epochs, rough_steps
from tapedist.training.engines.setup import Setup
from tapedist.training.loss_steps import LossSteps
from tapedist.training.slot_steps import SlotSteps
from tapedist.training.steps import MAX_STEPS_PER_CALL, CallResult


class ResidentEngine(WholeSteps):
    """Full batch on a split that is summed in one program: a small one, or one that an accelerator holds."""

    name = "stream"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, *, split: str):
        self.reason = f"the split is {'small' if setup.on_cpu else 'held'}: one compiled loop over its rows"
        self._split, self._num_rows = split, setup.source.num_rows(split)
        room = setup.tiles(self._num_rows)
        even = room["tiles"] * room["tile_rows"] * setup.num_replicas == self._num_rows
        self._steps = SlotSteps(**setup.programs(split, even=even))
        known_answer.check_row_steps(self._steps, room["tiles"], room["tile_rows"], 1, self._steps.first_step)
        self._rows, self._counts = setup.split_at_hand(split)

    def run(
        self,
        state: np.ndarray,
        *,
        step: int,
        num_steps: int,
        limit: float,
        interrupted: Callable[[], bool],
        measured: Measured = all_epochs,
    ) -> CallResult:
        rough = rough_steps(range(step, step + min(num_steps, MAX_STEPS_PER_CALL)), 1, measured)
        slots = np.zeros(len(rough), np.int32)
        result = self._steps.run(state, self._rows, self._counts, slots, step=step, limit=limit, rough=rough)
        return result.complete(self._num_rows, self._split)


class ResidentLoss(WholeSteps):
    """The loss of such a split: its `run` leaves the record of one step, and moves nothing."""

    name = "stream"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, *, split: str):
        self.reason = "the split is small: one compiled look at its rows"
        self._split, self._num_rows = split, setup.source.num_rows(split)
        room = setup.tiles(self._num_rows)
        self._steps = LossSteps(**setup.programs(split, even=room["tiles"] * room["tile_rows"] == self._num_rows))
        known_answer.check_row_steps(
            self._steps, room["tiles"], room["tile_rows"], 1, lambda *rows: (self._steps.run(*rows),), moves=False
        )
        self._rows, self._counts = setup.split_at_hand(split)

    def run(
        self,
        state: np.ndarray,
        *,
        step: int,
        num_steps: int,
        limit: float,
        interrupted: Callable[[], bool],
        measured: Measured = all_epochs,
    ) -> CallResult:
        return self._steps.run(state, self._rows, self._counts).complete(self._num_rows, self._split)


class HeldEngine(WholeSteps):
    """Full batch on blocks in device memory."""

    name = "stream"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, plan: BlockPlan, *, split: str):
        self.reason = f"{plan.num_blocks} blocks of {plan.block_rows} rows, held in device memory"
        self._steps = _checked_steps(setup, plan, split)
        self._split, self._num_rows = split, plan.num_rows
        order, elements = setup.blocks(plan, split=split, row_major=setup.problem.row_major)
        self._held = self._steps.hold(elements(order, 1))

    def run(
        self,
        state: np.ndarray,
        *,
        step: int,
        num_steps: int,
        limit: float,
        interrupted: Callable[[], bool],
        measured: Measured = all_epochs,
    ) -> CallResult:
        result = self._steps.run(state, self._held, step=step, num_steps=num_steps, limit=limit)
        return result.complete(self._num_rows, self._split)


class StreamedEngine:
    """Full batch on blocks that are made or read anew in every epoch, at constant memory."""

    name = "stream"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, plan: BlockPlan, *, split: str, passes: int):
        self.reason = f"{plan.num_blocks} blocks of {plan.block_rows} rows, streamed anew in every epoch"
        self._split, self._num_rows = split, plan.num_rows
        self._steps = _checked_steps(setup, plan, split)
        zero, row_major = self._steps.row_sums.zero.numpy(), setup.problem.row_major
        self._pass = setup.block_pass(self._steps, plan, zero=zero, split=split, passes=passes, row_major=row_major)

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
        sums = self._pass.run(self._steps.adding_at(state), interrupted=interrupted)
        if sums is None:
            return None
        return self._steps.finish(state, sums, step=step, limit=limit).complete(self._num_rows, self._split)

    def progress(self) -> dict[str, np.ndarray]:
        return self._pass.progress()

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        self._pass.restore(progress)


def _checked_steps(setup: Setup, plan: BlockPlan, split: str) -> BlockSteps:
    steps = BlockSteps(**setup.programs(split))
    known_answer.check_row_steps(steps, plan.tiles, plan.tile_rows, 1, steps.first_step)
    return steps


def full_batch(setup: Setup, *, split: str, passes: int) -> Engine:
    """The `stream` engine in the form that fits the split.

    Args:
        setup: what every engine needs.
        split: "train" or "test".
        passes: how often the split will be visited; rows that are seen once are not worth holding.
    """
    return setup.proven(lambda setup: _full_batch(setup, split, passes))


def _full_batch(setup: Setup, split: str, passes: int) -> Engine:
    plan = setup.block_plan(split)
    padded = plan.num_blocks * plan.block_rows * setup.row_bytes
    held = setup.cache == "device" or (setup.cache == "auto" and passes > 1 and padded <= setup.budget)
    # A launch on an accelerator takes as long as a block: there is one program over all rows that are held.
    if (plan.resident and setup.cache != "none") or (held and not setup.on_cpu and padded < 2**31 * setup.row_bytes):
        return ResidentEngine(setup, split=split)
    if held:
        return HeldEngine(setup, plan, split=split)
    return StreamedEngine(setup, plan, split=split, passes=passes)


def full_loss(setup: Setup, *, split: str, passes: int) -> Engine:
    """An engine of which only the first record of a `run` is wanted; arguments as in `full_batch`."""
    resident = setup.block_plan(split).resident and setup.cache != "none"
    # Of other arithmetic a smaller program may have other bits.
    if resident and setup.num_replicas == 1 and known_answer.is_specified(setup.problem):
        return setup.proven(
            lambda setup: (
                ResidentLoss(setup, split=split)
                if known_answer.is_specified(setup.problem)
                else _full_batch(setup, split, passes)
            )
        )
    return full_batch(setup, split=split, passes=passes)
