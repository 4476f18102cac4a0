"""The known-answer test: whether this machine, these flags and these versions compute as specified.

A run's own compiled programs are called once on fixed rows, and their results are compared with the reference, before
they see a row of the run. This replaces a comparison of processors, flags and wheels.

Legend: `n` tiles, `d` features, `T` rows of a tile, `R` replicas.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist import reference
from tapedist.data.ranges import Bounds
from tapedist.errors import WrongAnswerError
from tapedist.training.losses import ResidualLoss
from tapedist.training.model import LinearModel
from tapedist.training.moment_steps import MomentSteps
from tapedist.training.optimizers import CONSTANTS
from tapedist.training.quadratic import QuadraticForm, QuadraticSteps
from tapedist.training.replicas import Replicas
from tapedist.training.steps import CallResult, Problem, RowPrograms

_SEED = 20_211
_RAGGED = 3  # Rows that a last tile lacks.


def check_row_steps(
    programs: RowPrograms,
    tiles: int,
    tile_rows: int,
    slots: int,
    run: Callable[[np.ndarray, Any, Any], tuple[CallResult, ...]],
    *,
    moves: bool = True,
) -> None:
    """Compares one step over fixed rows with the reference; a program is tested once in a process.

    Args:
        programs: the run's.
        tiles: `n`, of a slot.
        tile_rows: `T`.
        slots: in the rows that the program takes; the step is to be over the first.
        run: `(state, per-replica rows, per-replica counts [slots]) -> what one step does`, by each loop that may do
            it; the first has the loss.
        moves: whether the step updates the parameters.

    Raises:
        WrongAnswerError: if it does not compute as specified.
    """
    if is_specified(programs.problem):
        find_fault = functools.partial(_fault_of_row_steps, programs, tiles, tile_rows, slots, run, moves)
        _refuse_fault(programs, (tiles, tile_rows, slots), find_fault)


def _fault_of_row_steps(
    programs: RowPrograms,
    tiles: int,
    tile_rows: int,
    slots: int,
    run: Callable[[np.ndarray, Any, Any], tuple[CallResult, ...]],
    moves: bool,
) -> str:
    """What came out different, empty if nothing did; arguments as of `check_row_steps`."""
    problem, strategy, bounds = programs.problem, programs.strategy, programs.bounds
    replicas, weighted = strategy.num_replicas_in_sync, programs.weighted
    # Ragged, where the program is made for it, so that the mask of the last rows is tested, too.
    count = tiles * tile_rows - (0 if programs.even else min(_RAGGED, tiles * tile_rows - 1))
    each = [_fixed_rows(bounds, problem.dtype.name, weighted, count, replica) for replica in range(replicas)]
    rows = _rows_on_replicas(strategy, each, problem.dtype, tiles, tile_rows, slots)
    counts = _on_replicas(strategy, [np.array([count] + [0] * (slots - 1), np.int32)] * replicas, tf.int32)
    state = _fixed_state(problem, bounds)
    # In the run's own shapes and layout: XLA compiles a program for each, and another program would prove nothing.
    found = run(state, rows, counts)
    chunks = [(x, y, rest[0] if rest else None) for x, y, *rest in each]
    limits = reference.Bounds(bounds[:-2], float(bounds[-2]), float(bounds[-1]) if weighted else None)
    theta = state[: programs.num_parameters]
    specified = specified_problem(problem)
    totals = reference.totals(theta, chunks, limits, specified)
    loss, weight, sums = reference.loss_and_gradient_sums(theta, totals, limits, specified)
    wanted = _updated(state, sums, weight, problem) if moves else state
    same = all(np.array_equal(one.state, wanted) and one.records[0, 1] == weight for one in found)
    same &= found[0].records[0, 0] == loss
    return "" if same else "a step over rows"


def check_moment_steps(
    sums: MomentSteps, steps: QuadraticSteps, bounds: Bounds, tiles: int, tile_rows: int, weighted: bool
) -> None:
    """Compares the moments of fixed rows, and a step on their quadratic form, with the reference.

    Args:
        sums: the run's pass.
        steps: the run's epochs.
        bounds: of its rows.
        tiles: `n`, of a block.
        tile_rows: `T`.
        weighted: whether its rows have weights.

    Raises:
        WrongAnswerError: if they do not compute as specified.
    """
    problem = steps.problem
    if problem.arithmetic == "exact" and is_specified(problem):
        find_fault = functools.partial(_fault_of_moment_steps, sums, steps, bounds, tiles, tile_rows, weighted)
        _refuse_fault(sums, (tiles, tile_rows, problem.dtype.name), find_fault)


def _fault_of_moment_steps(
    sums: MomentSteps, steps: QuadraticSteps, bounds: Bounds, tiles: int, tile_rows: int, weighted: bool
) -> str:
    """What came out different, empty if nothing did; arguments as of `check_moment_steps`."""
    problem = steps.problem
    largest, count = bounds.largest(), tiles * tile_rows - min(_RAGGED, tiles * tile_rows - 1)
    replicas = sums.strategy.num_replicas_in_sync
    each = [_fixed_rows(largest, problem.dtype.name, weighted, count, replica) for replica in range(replicas)]
    for columns in each:  # Slices are made for numbers within the ranges, which are narrower than the bounds.
        columns[0], columns[1] = _into(columns[0], bounds, slice(0, -1)), _into(columns[1], bounds, -1)
    rows = _rows_on_replicas(sums.strategy, each, problem.dtype, tiles, tile_rows, 1, row_major=sums.row_major)
    counts = _on_replicas(sums.strategy, [np.array([count], np.int32)] * replicas, tf.int32)
    found = sums.moments(sums.of_rows(rows, counts))
    chunks = [(x, y, rest[0] if rest else None) for x, y, *rest in each]
    ranges = reference.Ranges(bounds.low, bounds.high, bounds.weight if weighted else None)
    columns_of = reference.columns_of(ranges, reference.KINDS[problem.dtype.name])
    wanted = reference.moments(reference.moment_integers(chunks, columns_of), columns_of)
    same = found.sum_weights == wanted.sum_weights
    same &= np.array_equal(found.means, wanted.means) and np.array_equal(found.centred, wanted.centred)
    if not same:
        return "the second moments of rows"
    model = problem.model
    assert isinstance(model, LinearModel)
    state = _fixed_state(problem, largest)
    theta = state[: model.num_parameters]
    form = QuadraticForm.of(found, fit_intercept=model.fit_intercept)
    step = steps.run(state, form, step=0, num_steps=1, limit=math.inf)
    loss, gradient = reference.form_gradient(theta, reference.quadratic_form(wanted, fit_intercept=model.fit_intercept))
    same = np.array_equal(step.state, _updated(state, gradient, 1.0, problem)) and step.records[0, 0] == loss
    return "" if same else "a step on second moments"


def is_specified(problem: Problem) -> bool:
    """Returns whether the specification covers the problem."""
    known = isinstance(problem.model, LinearModel) and isinstance(problem.loss, ResidualLoss)
    return known and problem.arithmetic != "plain" and problem.optimizer.name in (*CONSTANTS, "gradient")


def specified_problem(problem: Problem) -> reference.Problem:
    """Converts a problem to the reference's."""
    optimizer, loss, model = problem.optimizer, problem.loss, problem.model
    assert isinstance(loss, ResidualLoss)
    assert isinstance(model, LinearModel)
    named = optimizer.name if optimizer.name in CONSTANTS else "sgd"
    return reference.Problem(
        dtype=problem.dtype.name, loss=loss.name, delta=loss.delta, fit_intercept=model.fit_intercept, l2=problem.l2,
        penalized=np.asarray(model.penalized), optimizer=named,
        **dict(zip(CONSTANTS.get(optimizer.name, ()), optimizer.constants, strict=True)),
    )  # fmt: skip


def _updated(state: np.ndarray, sums: np.ndarray, weight: float, problem: Problem) -> np.ndarray:
    count = problem.model.num_parameters
    theta, slots = state[:count], state[count:].reshape(-1, count)
    if problem.optimizer.name == "gradient":  # What plain descent at rate 1 would subtract.
        gradient = sums * (1.0 / (weight or 1.0))
        return gradient + (2 * problem.l2 * np.asarray(problem.model.penalized)) * theta if problem.l2 else gradient
    new_theta, new_slots = reference.update(theta, slots, sums, weight, specified_problem(problem))
    return np.concatenate([new_theta, np.ravel(new_slots)])


def _refuse_fault(programs: Replicas, shape: tuple[Any, ...], find_fault: Callable[[], str]) -> None:
    """Raises WrongAnswerError if a program of these shapes computes otherwise; it is tested once in a process.

    The fault is remembered, too: the next run with the same program must be refused like the first.
    """
    faults = vars(programs.traced).setdefault("_known_answers", {})
    if shape not in faults:
        faults[shape] = find_fault()
    if faults[shape]:
        raise _wrong_answer(faults[shape])


def _fixed_state(problem: Problem, bounds: np.ndarray) -> np.ndarray:
    """Parameters in proportion to the rows, and slots like those in the middle of a run."""
    generator = np.random.Generator(np.random.Philox(_SEED))
    count, d = problem.model.num_parameters, len(bounds) - 2
    theta = generator.uniform(-1, 1, count)
    # Predictions are then of the size of the targets, as in a run.
    theta[:d] *= np.clip(bounds[d] / bounds[:d], 2.0**-60, 2.0**60) / d
    theta[d:] *= bounds[d]
    slots = problem.optimizer.fresh_slots(count)
    # Not the first step's zeros and ones, with which a wrong product in the rule would go unnoticed.
    slots = np.where(slots == 0, generator.uniform(0, 2.0**-10, len(slots)), slots * 0.5)
    return np.concatenate([theta, slots])


def _fixed_rows(bounds: np.ndarray, dtype: str, weighted: bool, count: int, replica: int) -> list[np.ndarray]:
    """`(x [count, d], y [count][, w])` inside the bounds `[d + 2]`, rounded like training rows."""
    generator = np.random.Generator(np.random.Philox([_SEED, replica]))
    kind = reference.KINDS[dtype]
    d = len(bounds) - 2
    columns = [generator.uniform(-1, 1, (count, d)) * bounds[:d], generator.uniform(-1, 1, count) * bounds[d]]
    if weighted:
        columns.append(generator.uniform(0.5, 1, count) * bounds[-1])
    return [reference.as_dtype(column, kind) for column in columns]


def _into(values: np.ndarray, bounds: Bounds, columns: Any) -> np.ndarray:
    """`values`, cut off at the ranges of `columns`."""
    return np.clip(values, bounds.low[columns], bounds.high[columns])


def _rows_on_replicas(
    strategy: tf.distribute.Strategy,
    each: list[list[np.ndarray]],
    dtype: tf.DType,
    tiles: int,
    tile_rows: int,
    slots: int,
    *,
    row_major: bool = False,
) -> tuple[Any, ...]:
    """Each replica's own rows as tiles, `[slots * n, d, T]` (or `[slots * n, T, d]`) and `[slots * n, T]`, in the first
    slot."""

    def tiled(column: np.ndarray) -> np.ndarray:
        room = np.zeros([slots * tiles * tile_rows, *column.shape[1:]])
        room[: len(column)] = column
        tiled = room.reshape(slots * tiles, tile_rows, *column.shape[1:])
        return tiled if row_major else np.moveaxis(tiled, 1, -1)

    return tuple(
        _on_replicas(strategy, [tiled(column) for column in columns], dtype) for columns in zip(*each, strict=True)
    )


def _on_replicas(strategy: tf.distribute.Strategy, values: list[np.ndarray], dtype: tf.DType) -> Any:
    """Each replica's own of `values`."""
    found = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(values[context.replica_id_in_sync_group], dtype)
    )
    # The pipeline gives a worker's lone replica a plain tensor; another structure would be another trace.
    local = strategy.experimental_local_results(found)
    return local[0] if len(local) == 1 else found


def _wrong_answer(what: str) -> WrongAnswerError:
    flags = os.environ.get("XLA_FLAGS", "")
    culprit = next((flag for flag in flags.split() if "fast_math" in flag), "")
    cause = f"this processor, TensorFlow {tf.__version__} or XLA_FLAGS={flags!r} compute otherwise; try without flags"
    if culprit:
        cause = f"XLA_FLAGS={culprit} lets sums be reordered; remove it"
    return WrongAnswerError(
        f"--arithmetic=exact: {what} with a known answer came out different: {cause}, or use --arithmetic=fast, which "
        "promises no bits"
    )
