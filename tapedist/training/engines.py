"""Engines compute epochs: over rows in device memory, over blocks of them, or over streamed rows.

All engines have one method, `Engine.run`; the trainer does not depend on which it has. They differ in where the rows
are, never in the results for one config. `full_batch`, `moments` and `mini_batch` make them; `full_loss` makes one that
only computes the loss.

Legend: `P` parameters, `s` optimizer slots.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tapedist.data import orders
from tapedist.data.orders import BatchPlan, BlockPlan, ShuffledRows, batch_elements, epoch_order, in_order
from tapedist.data.source import check_stop
from tapedist.regression.least_squares import Moments
from tapedist.training import known_answer
from tapedist.training.block_steps import BlockSteps
from tapedist.training.engine_setup import Setup
from tapedist.training.model import LinearModel
from tapedist.training.moment_steps import NARROW, CompiledMomentSteps, HostMomentSteps, MomentSteps
from tapedist.training.moments import MomentUnits
from tapedist.training.optimizers import Optimizer
from tapedist.training.quadratic import QuadraticForm, QuadraticSteps
from tapedist.training.schedule import MAX_STEPS_PER_CALL
from tapedist.training.slot_steps import LossSteps, SlotSteps
from tapedist.training.steps import CallResult

_SUPERBATCH_BYTES = 8 * 1024 * 1024  # Of a transfer of mini-batches: large enough to make up for the pipeline's call.
_RESIDENT_BYTES = 256 * 1024 * 1024  # Of all batches.
_CHECKED_ROWS = 2048
_MOST_STRETCHED = 4  # Blocks that NumPy sums as one: each costs some Python, but every core should get many.


def _all_epochs(epochs: range) -> range:
    return epochs


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """The arguments of an engine's `run`: a state, and the number of updates.

    Attributes:
        state: float64 `[P + s * P]`, see `steps.py`.
        step: updates done before.
        num_steps: at least 1; the engine may do fewer.
        limit: loss above which the run has diverged.
        interrupted: called inside long steps; true means stop soon.
        measured: of a range of epochs, those whose exact loss is needed.
    """

    state: np.ndarray
    step: int = 0
    num_steps: int = 1
    limit: float = math.inf
    interrupted: Callable[[], bool] = lambda: False
    measured: Callable[[range], Iterable[int]] = _all_epochs

    def rough(self, num_steps: int, steps_per_epoch: int) -> np.ndarray:
        """A mask of the first `num_steps` steps: whether their epoch's exact loss is not needed."""
        steps = range(self.step, self.step + num_steps)
        epochs = range(steps.start // steps_per_epoch, (steps.stop - 1) // steps_per_epoch + 1)
        rough = np.ones(len(epochs), bool)
        rough[np.fromiter(self.measured(epochs), np.int64) - epochs.start] = False
        return rough[np.arange(steps.start, steps.stop) // steps_per_epoch - epochs.start]


class Engine(abc.ABC):
    """Computes the updates of the parameters over a split.

    Attributes:
        name: one word for the log.
        reason: why this engine was chosen, for the log.
        steps_per_epoch: updates in an epoch.
        full_batch: whether that is one, over all rows.
        on_moments: whether epochs come from second moments, so that no step visits rows or adds sums of replicas.
    """

    name = "stream"
    reason: str
    steps_per_epoch = 1
    full_batch = True
    on_moments = False

    @abc.abstractmethod
    def run(self, call: Call) -> CallResult | None:
        """Does up to `call.num_steps` updates.

        Returns:
            The result, or None if interrupted before one step was whole; `progress` then has its sums so far.
        """

    def progress(self) -> dict[str, np.ndarray]:
        """The sums of a step that is not whole yet; empty between steps, and where steps are never interrupted."""
        return {}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Restores what `progress` returned, on any topology."""
        assert not progress

    def moments(self, interrupted: Callable[[], bool] = check_stop) -> Moments | None:
        """Second moments of the rows, where the engine computes them; None if it does not, or was interrupted."""
        return None


class ResidentEngine(Engine):
    """Full batch on a split that is summed in one program: a small one, or one that an accelerator holds."""

    def __init__(self, setup: Setup, *, split: str):
        self.reason = f"the split is {'small' if setup.on_cpu else 'held'}: one compiled loop over its rows"
        self._split, self._num_rows = split, setup.source.num_rows(split)
        room = setup.tiles(self._num_rows)
        even = room["tiles"] * room["tile_rows"] * setup.num_replicas == self._num_rows
        self._steps = SlotSteps(**setup.programs(split, even=even))
        known_answer.check_row_steps(self._steps, room["tiles"], room["tile_rows"], 1, self._steps.first_step)
        self._rows, self._counts = setup.split_at_hand(split)

    def run(self, call: Call) -> CallResult:
        # All steps sum the one slot; most epochs are not logged, and their losses need one grid only.
        rough = call.rough(min(call.num_steps, MAX_STEPS_PER_CALL), 1)
        slots = np.zeros(len(rough), np.int32)
        result = self._steps.run(
            call.state, self._rows, self._counts, slots, step=call.step, limit=call.limit, rough=rough
        )
        return result.complete(self._num_rows, self._split)


class ResidentLoss(Engine):
    """The loss of such a split: its `run` returns the record of one step and an unchanged state."""

    def __init__(self, setup: Setup, *, split: str):
        self.reason = "the split is small: one compiled look at its rows"
        self._split, self._num_rows = split, setup.source.num_rows(split)
        room = setup.tiles(self._num_rows)
        self._steps = LossSteps(**setup.programs(split, even=room["tiles"] * room["tile_rows"] == self._num_rows))
        known_answer.check_row_steps(
            self._steps, room["tiles"], room["tile_rows"], 1, lambda *rows: (self._steps.run(*rows),), moves=False
        )
        self._rows, self._counts = setup.split_at_hand(split)

    def run(self, call: Call) -> CallResult:
        return self._steps.run(call.state, self._rows, self._counts).complete(self._num_rows, self._split)


class HeldEngine(Engine):
    """Full batch on blocks in device memory."""

    def __init__(self, setup: Setup, plan: BlockPlan, *, split: str):
        self.reason = f"{plan.num_blocks} blocks of {plan.block_rows} rows, held in device memory"
        self._steps = _checked_steps(setup, plan, split)
        self._split, self._num_rows = split, plan.num_rows
        order, elements = setup.blocks(plan, split=split, row_major=setup.problem.row_major)
        self._held = self._steps.hold(elements(order, 1))

    def run(self, call: Call) -> CallResult:
        result = self._steps.run(call.state, self._held, step=call.step, num_steps=call.num_steps, limit=call.limit)
        return result.complete(self._num_rows, self._split)


class StreamedEngine(Engine):
    """Full batch on blocks that are made or read again in every epoch, in constant memory."""

    def __init__(self, setup: Setup, plan: BlockPlan, *, split: str, passes: int):
        self.reason = f"{plan.num_blocks} blocks of {plan.block_rows} rows, streamed again in every epoch"
        self._split, self._num_rows = split, plan.num_rows
        self._steps = _checked_steps(setup, plan, split)
        zero, row_major = self._steps.row_sums.zero.numpy(), setup.problem.row_major
        self._pass = setup.block_pass(self._steps, plan, zero=zero, split=split, passes=passes, row_major=row_major)

    def run(self, call: Call) -> CallResult | None:
        sums = self._pass.run(self._steps.adding_at(call.state), interrupted=call.interrupted)
        if sums is None:
            return None
        # One step a call: the pass over the blocks is Python's, and may be interrupted.
        result = self._steps.finish(call.state, sums, step=call.step, limit=call.limit)
        return result.complete(self._num_rows, self._split)

    def progress(self) -> dict[str, np.ndarray]:
        return self._pass.progress()

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        self._pass.restore(progress)


def _checked_steps(setup: Setup, plan: BlockPlan, split: str) -> BlockSteps:
    steps = BlockSteps(**setup.programs(split))
    known_answer.check_row_steps(steps, plan.tiles, plan.tile_rows, 1, steps.first_step)
    return steps


def full_batch(setup: Setup, *, split: str, passes: int) -> Engine:
    """The `stream` engine for the size of the split.

    Args:
        setup: of the run.
        split: "train" or "test".
        passes: how often the split will be visited; rows that are visited once are not held.
    """
    return setup.proven(lambda setup: _full_batch(setup, split, passes))


def _full_batch(setup: Setup, split: str, passes: int) -> Engine:
    plan = setup.block_plan(split)
    padded = plan.num_blocks * plan.block_rows * setup.row_bytes
    held = setup.cache == "device" or (setup.cache == "auto" and passes > 1 and padded <= setup.budget)
    # On an accelerator the launch of a kernel takes as long as a block's sums, so that one program sums all rows that
    # are held. Its row numbers are int32.
    if (plan.resident and setup.cache != "none") or (held and not setup.on_cpu and padded < 2**31 * setup.row_bytes):
        return ResidentEngine(setup, split=split)
    if held:
        return HeldEngine(setup, plan, split=split)
    return StreamedEngine(setup, plan, split=split, passes=passes)


def full_loss(setup: Setup, *, split: str, passes: int) -> Engine:
    """An engine of which only the first record of a `run` is used; arguments as in `full_batch`."""
    resident = setup.block_plan(split).resident and setup.cache != "none"
    # Where nothing specifies the bits, a smaller program may have others than a training step.
    if resident and setup.num_replicas == 1 and known_answer.is_specified(setup.problem):
        # Asked again inside: after a failed known-answer test `proven` tries plain sums, which are not specified.
        return setup.proven(
            lambda setup: (
                ResidentLoss(setup, split=split)
                if known_answer.is_specified(setup.problem)
                else _full_batch(setup, split, passes)
            )
        )
    return full_batch(setup, split=split, passes=passes)


class _Batches(Engine):
    """The base of both mini-batch engines."""

    name = "mini_batch"
    full_batch = False

    def __init__(self, setup: Setup, plan: BatchPlan, *, shuffle: str, seed: int, slots: int):
        self.steps_per_epoch = plan.steps_per_epoch
        self._plan = plan
        self._order = epoch_order(plan, shuffle=shuffle, seed=seed)
        room = setup.tiles(plan.batch_rows)
        full = room["tiles"] * room["tile_rows"] * setup.num_replicas == plan.batch_rows
        even = full and plan.num_rows % plan.batch_rows == 0
        self._steps = SlotSteps(**setup.programs("train", even=even))
        known_answer.check_row_steps(self._steps, room["tiles"], room["tile_rows"], slots, self._steps.first_step)

    def _run(self, call: Call, element: Any, slots: np.ndarray) -> CallResult:
        """The first steps of `call`: each sums one of the `slots` of an element."""
        rows, counts = element
        rough = call.rough(len(slots), self.steps_per_epoch)
        result = self._steps.run(call.state, rows, counts, slots, step=call.step, limit=call.limit, rough=rough)
        _, batches = self._order(range(call.step, call.step + len(slots)))
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

    def run(self, call: Call) -> CallResult:
        _, batches = self._order(range(call.step, call.step + min(call.num_steps, MAX_STEPS_PER_CALL)))
        return self._run(call, self._element, batches)


class StreamedBatches(_Batches):
    """Mini-batches that are made or read as needed, many per transfer."""

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

    def run(self, call: Call) -> CallResult:
        # A superbatch holds the batches of `_slots` consecutive steps, also across the end of an epoch, so the position
        # in the stream follows from the step alone. Only a resume asks for another place than the next one.
        number, offset = divmod(call.step, self._slots)
        if self._iterator is None or number not in (self._number, self._number + 1):
            self._iterator = self._setup.elements(self._element, range(number, number + 2**40))  # Without end.
            self._number = number - 1
        if number != self._number:
            self._current = next(self._iterator)
            self._number = number
        slots = np.arange(offset, min(offset + call.num_steps, self._slots), dtype=np.int32)
        return self._run(call, self._current, slots)


def mini_batch(setup: Setup, *, batch_size: int, shuffle: str, seed: int) -> Engine:
    """The mini-batch engine for the size of the split."""
    return setup.proven(lambda setup: _mini_batch(setup, batch_size, shuffle, seed))


def _mini_batch(setup: Setup, batch_size: int, shuffle: str, seed: int) -> Engine:
    plan = BatchPlan(setup.source.num_rows("train"), batch_size)
    room = setup.tiles(plan.batch_rows)
    padded = plan.steps_per_epoch * room["tiles"] * room["tile_rows"] * setup.num_replicas
    most = {"auto": _RESIDENT_BYTES, "device": setup.budget, "none": 0}[setup.cache]
    # Shuffled rows are in other batches in every epoch, so that batches cannot be held. Row numbers are int32.
    if shuffle != "rows" and padded * setup.row_bytes <= most and padded < 2**31:
        return ResidentBatches(setup, plan, shuffle=shuffle, seed=seed)
    return StreamedBatches(setup, plan, shuffle=shuffle, seed=seed)


class MomentsEngine(Engine):
    """Full batch on squared error: one pass for the second moments, then epochs on the quadratic form they define."""

    name = "moments"
    on_moments = True

    def __init__(self, setup: Setup, *, split: str):
        rows = setup.source.num_rows(split)
        self._tile_rows = orders.product_tile_rows(rows, setup.source.num_features)
        plan = setup.block_plan(split, self._tile_rows)
        if on_host := _suits_host(setup, plan):
            # Larger blocks where there are many, so that Python's part of each is small.
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
        # Integers rather than `Moments`: a checkpoint stores them, and `verify` compares them.
        self._sums: np.ndarray | None = None  # Known once a pass is done.
        tiles = setup.tiles(rows, self._tile_rows)["tiles"] if self._resident else plan.tiles
        if on_host:  # NumPy's code is the same for any number of tiles, so that a few are enough for the test.
            tiles = min(tiles, -(-_CHECKED_ROWS // self._tile_rows))
        known_answer.check_moment_steps(
            self._pass_steps, self._steps, setup.bounds(split), tiles, self._tile_rows, setup.source.weighted
        )

    def moments(self, interrupted: Callable[[], bool] = check_stop) -> Moments | None:
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
        """The quadratic form, once the moments are known."""
        model = self._setup.problem.model
        assert isinstance(model, LinearModel)
        return QuadraticForm.of(self._moments, fit_intercept=model.fit_intercept)

    def run(self, call: Call) -> CallResult | None:
        if self.moments(call.interrupted) is None:
            return None
        return self._steps.run(call.state, self.form, step=call.step, num_steps=call.num_steps, limit=call.limit)

    def progress(self) -> dict[str, np.ndarray]:
        return self._pass.progress() if self._sums is None else {"moments": self._sums}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        if "moments" in progress:
            self._sums = progress["moments"]
        else:
            self._pass.restore(progress)


def _pass_steps(setup: Setup, split: str, rows: int, *, on_host: bool) -> MomentSteps:
    """The fastest implementation of the pass over a split's rows on these devices."""
    units, weighted = MomentUnits.of(setup.bounds(split)), setup.source.weighted
    of_split = {"strategy": setup.strategy, "units": units, "num_rows": rows, "weighted": weighted, "split": split}
    if not on_host:
        return CompiledMomentSteps(parallel=setup.parallel, **of_split)
    # Tiles in the layout of the source, because to transpose rows costs more than to sum them either way.
    return HostMomentSteps(fast=setup.problem.arithmetic == "fast", row_major=setup.source.row_major, **of_split)


def _suits_host(setup: Setup, plan: BlockPlan) -> bool:
    """Returns whether NumPy sums the rows as fast as a compiled program: not many narrow rows that TensorFlow makes."""
    narrow = plan.num_features < NARROW and not plan.resident
    return setup.on_cpu and (setup.source.read_by_numpy or not narrow)


def moments(setup: Setup, *, split: str = "train") -> MomentsEngine:
    """The `moments` engine."""
    return MomentsEngine(setup, split=split)


def _gradient(theta: Any, slots: Any, gradient: Any, number: Any) -> tuple[Any, Any]:
    """An update rule that returns the gradient in place of the parameters."""
    return gradient, slots


def evaluator(engine: Engine) -> Callable[[np.ndarray], tuple[float, float]]:
    """`vector -> (loss, penalty)` on the split of a full-batch `engine`, by the sums of its step.

    Args:
        engine: visits the split.
    """

    def evaluate(vector: np.ndarray) -> tuple[float, float]:
        result = engine.run(Call(state=vector, interrupted=check_stop))
        assert result
        record = result.records[0]
        return float(record[0] / record[1]), float(record[2])

    return evaluate


def full_gradient(setup: Setup, engine: Engine, *, passes: int) -> Callable[[np.ndarray], np.ndarray]:
    """`state -> gradient [P]`, by the sums of a full-batch step.

    Args:
        setup: of the run.
        engine: the run's engine; its moments are used if it has them, else every call visits every row.
        passes: the most calls there will be.
    """
    # The sums, the division and the penalty are those of a training step, because they are the same program.
    problem = dataclasses.replace(setup.problem, optimizer=Optimizer("gradient", _gradient))
    count = problem.model.num_parameters
    if isinstance(engine, MomentsEngine):
        steps, moments_engine = QuadraticSteps(strategy=setup.strategy, problem=problem), engine

        def from_moments(state: np.ndarray) -> np.ndarray:
            moments_engine.moments()
            return steps.run(state[:count], moments_engine.form, step=0, num_steps=1, limit=math.inf).state

        return from_moments
    rows = full_batch(dataclasses.replace(setup, problem=problem), split="train", passes=passes)

    def from_rows(state: np.ndarray) -> np.ndarray:
        result = rows.run(Call(state=state[:count], interrupted=check_stop))
        assert result
        return result.state

    return from_rows
