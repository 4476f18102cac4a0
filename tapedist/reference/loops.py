"""Training runs as generators of their steps; a caller stops them, reports their progress or compares them.

Legend: `n` rows, `P` parameters, `s` slots.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tapedist.reference.order import batch_rows
from tapedist.reference.rows import Bounds, Chunk
from tapedist.reference.steps import Diverged, Problem, first_slots, loss_and_gradient_sums, totals, update

LIMIT = 1e6  # A loss so many times that of the first epoch means divergence.


class Step(NamedTuple):
    """A run after `step` updates; the loss is that before the last one."""

    step: int
    theta: np.ndarray
    slots: np.ndarray
    loss_sum: float
    weight: float


def advanced(at: Step, loss_sum: float, weight: float, sums: np.ndarray, limit: float, problem: Problem) -> Step:
    """The run after one more update.

    Raises:
        Diverged: if the mean loss is above `limit`, or anything is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        theta, slots = update(at.theta, at.slots, sums, weight, problem, step=at.step)
    finite = np.isfinite(loss_sum) and np.isfinite(theta).all() and np.isfinite(slots).all()
    if not finite or not loss_sum <= limit * (weight if weight else 1.0):
        raise Diverged(f"diverged after {at.step} updates: the sum of losses is {loss_sum}")
    return Step(at.step + 1, theta, slots, loss_sum, weight)


def loss_limit(first_loss: float) -> float:
    """The largest mean loss of a run whose first epoch had `first_loss`."""
    return LIMIT * first_loss if first_loss > 0 else math.inf


def full_batch(
    chunks: Callable[[], Iterable[Chunk]], theta: np.ndarray, limits: Bounds, problem: Problem
) -> Iterator[Step]:
    """Updates without end, each by all rows; `chunks` goes through them anew in every call."""
    at, limit = Step(0, theta, first_slots(len(theta), problem), math.nan, math.nan), math.inf
    while True:
        found = totals(at.theta, chunks(), limits, problem)
        at = advanced(at, *loss_and_gradient_sums(at.theta, found, limits, problem), limit, problem)
        if at.step == 1:
            limit = loss_limit(at.loss_sum / (at.weight or 1.0))
        yield at


def mini_batch(
    take: Callable[[np.ndarray], Chunk], theta: np.ndarray, limits: Bounds, problem: Problem, *,
    num_rows: int, batch_size: int, shuffle: str, seed: int,
) -> Iterator[Step]:  # fmt: skip
    """Updates without end, each by a batch; `take` gives rows as trained by their numbers.

    Args:
        shuffle: "none", "batches" or "rows".
        seed: chooses the order.
    """
    at, limit = Step(0, theta, first_slots(len(theta), problem), math.nan, math.nan), math.inf
    per_epoch, loss, weight = -(-num_rows // min(batch_size, num_rows)), 0.0, 0.0
    while True:
        chunk = take(batch_rows(at.step, num_rows=num_rows, batch_size=batch_size, shuffle=shuffle, seed=seed))
        found = totals(at.theta, [chunk], limits, problem)
        sums = loss_and_gradient_sums(at.theta, found, limits, problem)
        at = advanced(at, *sums, limit, problem)
        if at.step <= per_epoch:  # The first epoch's mean, batch after batch.
            loss, weight = loss + at.loss_sum, weight + at.weight
            limit = loss_limit(loss / (weight or 1.0)) if at.step == per_epoch else math.inf
        yield at


def initial_parameters(count: int, *, init: str, seed: int) -> np.ndarray:
    """`[P]`: standard normal, or zeros where `init` is "zeros"."""
    if init == "zeros":
        return np.zeros(count)
    return np.random.Generator(np.random.Philox(seed)).standard_normal(count)


def digest(theta: np.ndarray) -> str:
    """SHA-256 of parameters as little-endian float64, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(theta, "<f8").tobytes()).hexdigest()


def split_sizes(num_rows: int, test_fraction: float) -> tuple[int, int]:
    """`(train, test)`: the test split is the last `floor(n * fraction)` rows, by the fraction's shortest decimal."""
    test = math.floor(num_rows * Fraction(repr(float(test_fraction))))
    return num_rows - test, test
