"""Mini-batches: one update per batch, in the form that fits the split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tapedist.data import pipeline
from tapedist.data.blocks import BatchPlan
from tapedist.training.engines.engine import Engine, WholeSteps
from tapedist.training.engines.setup import Setup
from tapedist.training.slot_steps import LEAST_SLOTS, SlotSteps
from tapedist.training.steps import MAX_STEPS_PER_CALL, CallResult

_SUPERBATCH_BYTES = 8 * 1024 * 1024
_SMALL_BATCH_BYTES = 1024 * 1024
_RESIDENT_BYTES = 256 * 1024 * 1024


class ResidentBatches(WholeSteps):
    """Mini-batches that all lie in device memory; an epoch only changes their order."""

    name = "mini_batch"

    def __init__(self, setup: Setup, plan: BatchPlan, *, shuffle: str, seed: int):
        self.reason = "all batches are held in device memory"
        self.steps_per_epoch = plan.steps_per_epoch
        self._steps = SlotSteps(even=plan.even, **setup.row_programs)
        self._plan = plan
        self._order = pipeline.epoch_order(plan, shuffle=shuffle, seed=seed)
        element = pipeline.batch_elements(
            plan,
            setup.layout,
            slots=max(LEAST_SLOTS, plan.steps_per_epoch),
            order=lambda places: (np.zeros_like(places), places),
        )
        self._rows, self._counts = next(setup.elements(element, range(1)))

    def run(
        self, state: np.ndarray, *, step: int, num_steps: int, limit: float, interrupted: Callable[[], bool]
    ) -> CallResult:
        _, batches = self._order(step + np.arange(min(num_steps, MAX_STEPS_PER_CALL)))
        result = self._steps.run(state, self._rows, self._counts, batches, step=step, limit=limit)
        return result.complete(self._plan.rows_of(batches), "train")


class StreamedBatches(WholeSteps):
    """Mini-batches that are made or read as they are needed, many per transfer."""

    name = "mini_batch"

    def __init__(self, setup: Setup, plan: BatchPlan, *, shuffle: str, seed: int):
        self.steps_per_epoch = plan.steps_per_epoch
        self._setup = setup
        self._steps = SlotSteps(even=plan.even, **setup.row_programs)
        batch_bytes = plan.batch_rows * setup.row_bytes()
        least = LEAST_SLOTS if batch_bytes <= _SMALL_BATCH_BYTES else 1
        self._slots = int(np.clip(_SUPERBATCH_BYTES // batch_bytes, least, MAX_STEPS_PER_CALL))
        self.reason = f"batches are streamed, {self._slots} at a time"
        self._plan = plan
        self._order = pipeline.epoch_order(plan, shuffle=shuffle, seed=seed)
        self._element = pipeline.batch_elements(
            plan,
            setup.layout,
            slots=self._slots,
            order=self._order,
            row_numbers=pipeline.shuffled_rows(plan, seed=seed) if shuffle == "rows" else None,
        )
        self._number = -1
        self._current: Any = None
        self._iterator: Iterator[Any] | None = None

    def run(
        self, state: np.ndarray, *, step: int, num_steps: int, limit: float, interrupted: Callable[[], bool]
    ) -> CallResult:
        number, offset = divmod(step, self._slots)
        if self._iterator is None or number not in (self._number, self._number + 1):
            self._iterator = self._setup.elements(self._element, range(number, number + 2**40))
            self._number = number - 1
        if number != self._number:
            self._current = next(self._iterator)
            self._number = number
        slots = np.arange(offset, min(offset + num_steps, self._slots), dtype=np.int32)
        rows, counts = self._current
        _, batches = self._order(step + np.arange(len(slots)))
        result = self._steps.run(state, rows, counts, slots, step=step, limit=limit)
        return result.complete(self._plan.rows_of(batches), "train")


def mini_batch(setup: Setup, *, batch_size: int, shuffle: str, seed: int) -> Engine:
    """The mini-batch engine in the form that fits the split."""
    plan = BatchPlan(setup.source.num_rows("train"), batch_size, setup.num_shards)
    padded = plan.steps_per_epoch * setup.num_shards * plan.shard_rows * setup.row_bytes()
    most = {"auto": _RESIDENT_BYTES, "device": setup.budget, "none": 0}[setup.cache]
    # Rows that are shuffled one by one meet in other batches in every epoch; a compiled program counts rows in int32.
    if shuffle != "rows" and padded <= most and padded // setup.row_bytes() < 2**31:
        return ResidentBatches(setup, plan, shuffle=shuffle, seed=seed)
    return StreamedBatches(setup, plan, shuffle=shuffle, seed=seed)
