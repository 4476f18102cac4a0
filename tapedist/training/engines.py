"""How an epoch is computed: from rows at hand, from blocks in device memory, or from rows that stream past.

All engines answer one call, `run`; the trainer does not know which it has. They differ in where the rows are, never in
the numbers that come out for one config.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.config import TrainConfig
from tapedist.data import pipeline
from tapedist.data.blocks import BatchPlan, BlockPlan, Source
from tapedist.training.block_pass import BlockPass
from tapedist.training.block_steps import BlockSteps
from tapedist.training.moments import Moments, MomentSteps
from tapedist.training.quadratic import QuadraticForm, QuadraticSteps
from tapedist.training.steps import MAX_STEPS_PER_CALL, CallResult, Replicas, SlotSteps

_SUPERBATCH_BYTES = 8 * 1024 * 1024
MOST_MOMENT_FEATURES = 512
_RESIDENT_BATCHES_BYTES = 256 * 1024 * 1024
_MOST_PASSES = 2**20  # Of one iterator: its elements are numbered in int64.


class Engine(Protocol):
    """What moves the parameters through the training split.

    Attributes:
        name: one word for the log.
        reason: why this engine, for the log.
        steps_per_epoch: updates in an epoch.
    """

    name: str
    reason: str
    steps_per_epoch: int

    def run(
        self, state: np.ndarray, *, step: int, num_steps: int, limit: float, interrupted: Callable[[], bool]
    ) -> CallResult | None:
        """Does up to `num_steps` updates.

        Args:
            state: float64 `[P + s * P]`, see `steps.py`.
            step: updates done before.
            num_steps: at least 1; the engine may do fewer.
            limit: loss above which the run has diverged.
            interrupted: asked now and then inside long steps; true means stop soon.

        Returns:
            What was done, or None if an interruption came before one step was whole; `progress` then holds the rest.
        """

    def progress(self) -> dict[str, np.ndarray]:
        """The sums of a step that is not whole yet; empty between steps."""

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Takes up what `progress` gave, on any topology."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What every engine needs.

    Attributes:
        source: the rows.
        programs: keyword arguments of `StepPrograms`.
        num_shards: `V`.
        cache: "auto", "device" or "none".
        fit_intercept: whether a linear model has a bias.
        budget: bytes of rows that may be held in memory; equal on all workers, which must choose the same form.
    """

    source: Source
    programs: Mapping[str, Any]
    num_shards: int
    cache: str
    fit_intercept: bool = True
    budget: int = dataclasses.field(default_factory=lambda: memory_budget())

    @property
    def strategy(self) -> tf.distribute.Strategy:
        return self.programs["strategy"]

    @property
    def dtype(self) -> tf.DType:
        return self.programs["dtype"]

    @property
    def layout(self) -> pipeline.Layout:
        return pipeline.Layout(self.num_shards, self.strategy.num_replicas_in_sync)

    @property
    def parallel(self) -> int:
        """Blocks under way at once on a replica: the cores, shared among the local replicas."""
        return max(1, len(os.sched_getaffinity(0)) // len(local_devices(self.strategy)))

    def row_bytes(self) -> int:
        return (self.source.num_features + 1 + self.source.weighted) * self.dtype.size

    def elements(self, plan: pipeline.ElementPlan, elements: range) -> Any:
        cores = len(os.sched_getaffinity(0))
        return pipeline.distribute(
            self.strategy, self.source, plan, elements=elements, dtype=self.dtype, parallel=cores
        )

    def block_pass(self, replicas: Replicas, plan: BlockPlan, *, split: str, passes: int) -> BlockPass:
        """Passes over the blocks of a split; `passes` is about how many there will be."""
        whole = pipeline.BlockOrder.whole(plan, self.layout)

        def elements(order: pipeline.BlockOrder, passes: int) -> Any:
            turns = order.turns + (passes - 1) * whole.turns
            return self.elements(pipeline.block_elements(order, split=split), range(turns))

        return BlockPass(replicas, order=whole, passes=min(passes, _MOST_PASSES), elements=elements)


def local_devices(strategy: tf.distribute.Strategy) -> tuple[str, ...]:
    """The devices of this process's replicas."""
    # The default strategy has no list of its own.
    return ("/device:CPU:0",) if strategy.num_replicas_in_sync == 1 else tuple(strategy.extended.worker_devices)


class _Whole:
    """Steps are never interrupted halfway."""

    def progress(self) -> dict[str, np.ndarray]:
        return {}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        assert not progress


class ResidentEngine(_Whole):
    """Full batch on a split so small that whole shards are summed in one program."""

    name = "stream"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, plan: BlockPlan, *, split: str, steps: SlotSteps):
        self.reason = "the split is small: one compiled loop over its shards"
        element = pipeline.shard_elements(plan, setup.layout, split=split)
        self._rows, self._counts = next(iter(setup.elements(element, range(1))))
        self._steps = steps

    def run(
        self, state: np.ndarray, *, step: int, num_steps: int, limit: float, interrupted: Callable[[], bool]
    ) -> CallResult:
        slots = np.zeros(min(num_steps, MAX_STEPS_PER_CALL), np.int32)
        return self._steps.run(state, self._rows, self._counts, slots, step=step, limit=limit)


class HeldEngine(_Whole):
    """Full batch on blocks in device memory."""

    name = "stream"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, plan: BlockPlan, *, split: str):
        self.reason = f"{plan.num_blocks} blocks of {plan.block_rows} rows, held in device memory"
        self._steps = BlockSteps(tile_rows=plan.tile_rows, parallel=setup.parallel, **setup.programs)
        order = pipeline.BlockOrder.whole(plan, setup.layout)
        self._held = self._steps.hold(setup.elements(pipeline.block_elements(order, split=split), range(order.turns)))

    def run(
        self, state: np.ndarray, *, step: int, num_steps: int, limit: float, interrupted: Callable[[], bool]
    ) -> CallResult:
        return self._steps.run(state, self._held, step=step, num_steps=num_steps, limit=limit)


class StreamedEngine:
    """Full batch on blocks that are made or read anew in every epoch, at constant memory."""

    name = "stream"
    steps_per_epoch = 1

    def __init__(self, setup: Setup, plan: BlockPlan, *, split: str, passes: int):
        self.reason = f"{plan.num_blocks} blocks of {plan.block_rows} rows, streamed anew in every epoch"
        self._setup = setup
        self._steps = BlockSteps(tile_rows=plan.tile_rows, parallel=setup.parallel, **setup.programs)
        self._pass = setup.block_pass(self._steps, plan, split=split, passes=passes)

    def run(
        self, state: np.ndarray, *, step: int, num_steps: int, limit: float, interrupted: Callable[[], bool]
    ) -> CallResult | None:
        sums = self._pass.run(functools.partial(self._steps.add_block, state), interrupted=interrupted)
        return None if sums is None else self._steps.finish(state, sums, step=step, limit=limit)

    def progress(self) -> dict[str, np.ndarray]:
        return self._pass.progress()

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        self._pass.restore(progress)


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
            num_shards=setup.num_shards,
            tile_rows=plan.tile_rows,
        )
        self._pass = setup.block_pass(self._sums, plan, split=split, passes=1)
        shards = pipeline.shard_elements(plan, setup.layout, split=split)
        self._resident = plan.resident
        self._shards = functools.cache(lambda: next(iter(setup.elements(shards, range(1)))))
        self._steps = QuadraticSteps(**setup.programs)
        self._moments: Moments | None = None

    def moments(self, interrupted: Callable[[], bool] = lambda: False) -> Moments | None:
        """The split's moments, by a pass over the rows if they are not known yet; None if interrupted."""
        if self._moments is None and self._resident:
            self._moments = self._sums.of_shards(*self._shards())
        elif self._moments is None:
            sums = self._pass.run(self._sums.add_block, interrupted=interrupted)
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


class ResidentBatches(_Whole):
    """Mini-batches that all lie in device memory; an epoch only changes their order."""

    name = "mini_batch"

    def __init__(self, setup: Setup, plan: BatchPlan, *, shuffle: str, seed: int):
        self.reason = "all batches are held in device memory"
        self.steps_per_epoch = plan.steps_per_epoch
        self._steps = SlotSteps(**setup.programs)
        self._order = pipeline.epoch_order(plan, shuffle=shuffle, seed=seed)
        element = pipeline.batch_elements(
            plan, setup.layout, slots=plan.steps_per_epoch, order=lambda places: (np.zeros_like(places), places)
        )
        self._rows, self._counts = next(iter(setup.elements(element, range(1))))

    def run(
        self, state: np.ndarray, *, step: int, num_steps: int, limit: float, interrupted: Callable[[], bool]
    ) -> CallResult:
        _, batches = self._order(step + np.arange(min(num_steps, MAX_STEPS_PER_CALL)))
        return self._steps.run(state, self._rows, self._counts, batches, step=step, limit=limit)


class StreamedBatches(_Whole):
    """Mini-batches that are made or read as they are needed, many per transfer."""

    name = "mini_batch"

    def __init__(self, setup: Setup, plan: BatchPlan, *, shuffle: str, seed: int):
        self.steps_per_epoch = plan.steps_per_epoch
        self._setup = setup
        self._steps = SlotSteps(**setup.programs)
        batch_bytes = plan.batch_rows * setup.row_bytes()
        self._slots = int(np.clip(_SUPERBATCH_BYTES // batch_bytes, 1, MAX_STEPS_PER_CALL))
        self.reason = f"batches are streamed, {self._slots} at a time"
        self._element = pipeline.batch_elements(
            plan,
            setup.layout,
            slots=self._slots,
            order=pipeline.epoch_order(plan, shuffle=shuffle, seed=seed),
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
            self._iterator = iter(self._setup.elements(self._element, range(number, number + 2**40)))
            self._number = number - 1
        if number != self._number:
            self._current = next(self._iterator)
            self._number = number
        slots = np.arange(offset, min(offset + num_steps, self._slots), dtype=np.int32)
        rows, counts = self._current
        return self._steps.run(state, rows, counts, slots, step=step, limit=limit)


def moments(setup: Setup, *, split: str = "train") -> MomentsEngine:
    """The `moments` engine."""
    return MomentsEngine(setup, _block_plan(setup, split), split=split)


def moments_apply(config: TrainConfig, *, num_features: int, is_linear: bool, own_loss: bool) -> str:
    """Why the `moments` engine cannot serve a run; empty if it can."""
    if not is_linear:
        return "the model is not the linear one"
    if own_loss or config.loss != "squared":
        return "the loss is not squared error"
    if num_features > MOST_MOMENT_FEATURES:
        return f"{num_features} features are more than {MOST_MOMENT_FEATURES}"
    return ""


def _block_plan(setup: Setup, split: str) -> BlockPlan:
    return BlockPlan(setup.source.num_rows(split), setup.source.num_features, setup.dtype.size, setup.num_shards)


def full_batch(setup: Setup, *, split: str, passes: int) -> Engine:
    """The `stream` engine in the form that fits the split.

    Args:
        setup: what every engine needs.
        split: "train" or "test".
        passes: how often the split will be visited; rows that are seen once are not worth holding.
    """
    plan = _block_plan(setup, split)
    if plan.resident:  # Whatever --cache says: it must not change the form, and with it the bits.
        return ResidentEngine(setup, plan, split=split, steps=SlotSteps(**setup.programs))
    padded = plan.rounds * setup.num_shards * plan.block_rows * setup.row_bytes()
    if setup.cache == "device" or (setup.cache == "auto" and passes > 1 and padded <= setup.budget):
        return HeldEngine(setup, plan, split=split)
    return StreamedEngine(setup, plan, split=split, passes=passes)


def mini_batch(setup: Setup, *, batch_size: int, shuffle: str, seed: int) -> Engine:
    """The mini-batch engine in the form that fits the split."""
    plan = BatchPlan(setup.source.num_rows("train"), batch_size, setup.num_shards)
    padded = plan.steps_per_epoch * setup.num_shards * plan.shard_rows * setup.row_bytes()
    most = {"auto": _RESIDENT_BATCHES_BYTES, "device": setup.budget, "none": 0}[setup.cache]
    # Rows that are shuffled one by one meet in other batches in every epoch.
    if shuffle != "rows" and padded <= most and padded // setup.row_bytes() < 2**31:
        return ResidentBatches(setup, plan, shuffle=shuffle, seed=seed)
    return StreamedBatches(setup, plan, shuffle=shuffle, seed=seed)


def memory_budget() -> int:
    """Bytes of rows that `--cache=auto` may hold: a quarter of the memory, which leaves room for the copies made on the
    way in."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
