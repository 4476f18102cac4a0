"""Mini-batches: one update per batch, in the form that fits the split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tapedist.data.elements import ShuffledRows, batch_elements, epoch_order, in_order
from tapedist.data.orders import BatchPlan
from tapedist.training import known_answer
from tapedist.training.engines.engine import Engine, Measured, WholeSteps, all_epochs, rough_steps
from tapedist.training.engines.setup import Setup
from tapedist.training.slot_steps import SlotSteps
from tapedist.training.steps import MAX_STEPS_PER_CALL, CallResult

_SUPERBATCH_BYTES = 8 * 1024 * 1024
_RESIDENT_BYTES = 256 * 1024 * 1024


class _Batches(WholeSteps):
    """What both forms have in common."""

    name = "mini_batch"

    def __init__(self, setup: Setup, plan: BatchPlan, *, shuffle: str, seed: int, slots: int):
        self.steps_per_epoch = plan.steps_per_epoch
        self._plan = plan
        self._order = epoch_order(plan, shuffle=shuffle, seed=seed)
        room = setup.tiles(plan.batch_rows)
        full = room["tiles"] * room["tile_rows"] * setup.num_replicas == plan.batch_rows
        even = full and plan.num_rows % plan.batch_rows == 0
        self._steps = SlotSteps(**setup.programs("train", even=even))
        known_answer.check_row_steps(self._steps, room["tiles"], room["tile_rows"], slots, self._steps.first_step)

    def _run(
        self, state: np.ndarray, element: Any, slots: np.ndarray, *, step: int, limit: float, measured: Measured
    ) -> CallResult:
        (rows, counts), steps = element, range(step, step + len(slots))
        rough = rough_steps(steps, self.steps_per_epoch, measured)
        result = self._steps.run(state, rows, counts, slots, step=step, limit=limit, rough=rough)
        _, batches = self._order(steps)
        return result.complete(self._plan.rows_of(batches), "train")


class ResidentBatches(_Batches):
    """Mini-batches that all lie in device memory; an epoch only changes their order."""

    def __init__(self, setup: Setup, plan: BatchPlan, *, shuffle: str, seed: int):
        super().__init__(setup, plan, shuffle=shuffle, seed=seed, slots=plan.steps_per_epoch)
        self.reason = "all batches are held in device memory"
        element = batch_elements(
            plan,
            setup.num_replicas,
            slots=plan.steps_per_epoch,
            order=in_order,
            **setup.tiles(plan.batch_rows),
            row_major=setup.problem.row_major,
        )
        self._element = next(setup.elements(element, range(1)))

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
        _, batches = self._order(range(step, step + min(num_steps, MAX_STEPS_PER_CALL)))
        return self._run(state, self._element, batches, step=step, limit=limit, measured=measured)


class StreamedBatches(_Batches):
    """Mini-batches that are made or read as they are needed, many per transfer."""

    def __init__(self, setup: Setup, plan: BatchPlan, *, shuffle: str, seed: int):
        self._slots = int(np.clip(_SUPERBATCH_BYTES // (plan.batch_rows * setup.row_bytes), 1, MAX_STEPS_PER_CALL))
        super().__init__(setup, plan, shuffle=shuffle, seed=seed, slots=self._slots)
        self._setup = setup
        self.reason = f"batches are streamed, {self._slots} at a time"
        self._element = batch_elements(
            plan,
            setup.num_replicas,
            slots=self._slots,
            order=self._order,
            row_numbers=ShuffledRows(plan, seed) if shuffle == "rows" else None,
            **setup.tiles(plan.batch_rows),
            row_major=setup.problem.row_major,
        )
        self._number = -1
        self._current: Any = None
        self._iterator: Iterator[Any] | None = None

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
        number, offset = divmod(step, self._slots)
        if self._iterator is None or number not in (self._number, self._number + 1):
            self._iterator = self._setup.elements(self._element, range(number, number + 2**40))
            self._number = number - 1
        if number != self._number:
            self._current = next(self._iterator)
            self._number = number
        slots = np.arange(offset, min(offset + num_steps, self._slots), dtype=np.int32)
        return self._run(state, self._current, slots, step=step, limit=limit, measured=measured)


def mini_batch(setup: Setup, *, batch_size: int, shuffle: str, seed: int) -> Engine:
    """The mini-batch engine in the form that fits the split."""
    return setup.proven(lambda setup: _mini_batch(setup, batch_size, shuffle, seed))


def _mini_batch(setup: Setup, batch_size: int, shuffle: str, seed: int) -> Engine:
    plan = BatchPlan(setup.source.num_rows("train"), batch_size)
    room = setup.tiles(plan.batch_rows)
    padded = plan.steps_per_epoch * room["tiles"] * room["tile_rows"] * setup.num_replicas
    most = {"auto": _RESIDENT_BYTES, "device": setup.budget, "none": 0}[setup.cache]
    # Rows that are shuffled one by one meet in other batches in every epoch; a compiled program counts rows in int32.
    if shuffle != "rows" and padded * setup.row_bytes <= most and padded < 2**31:
        return ResidentBatches(setup, plan, shuffle=shuffle, seed=seed)
    return StreamedBatches(setup, plan, shuffle=shuffle, seed=seed)
