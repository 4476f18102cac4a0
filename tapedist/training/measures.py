"""What can be measured where a run stands, over all rows of a split: the loss, and how flat it is there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tapedist.training import engines
from tapedist.training.engines import Engine, MomentsEngine, Setup
from tapedist.training.optimizers import Optimizer
from tapedist.training.quadratic import QuadraticSteps


def _gradient(theta: Any, slots: Any, gradient: Any, number: Any) -> tuple[Any, Any]:
    """An update rule that leaves the gradient in the place of the parameters."""
    return gradient, slots


def evaluator(engine: Engine, heed: Callable[[], bool]) -> Callable[[np.ndarray], tuple[float, float]]:
    """`vector -> (loss, penalty)` on the split of a full-batch `engine`, by the sums that a step would begin with.

    Args:
        engine: visits the split.
        heed: asked now and then inside a long visit: False, or raises to break it off.
    """

    def evaluate(vector: np.ndarray) -> tuple[float, float]:
        result = engine.run(vector, step=0, num_steps=1, limit=math.inf, interrupted=heed)
        assert result
        record = result.records[0]
        return float(record[0] / record[1]), float(record[2])

    return evaluate


def full_gradient(
    setup: Setup, engine: Engine, *, passes: int, heed: Callable[[], bool] = lambda: False
) -> Callable[[np.ndarray], np.ndarray]:
    """`state -> gradient [P]`, by the same sums that a full-batch step makes.

    Args:
        setup: of the run.
        engine: the run's engine; the moments of one that has them are used, else every call visits every row.
        passes: how often the gradient will be asked for, at most.
        heed: asked now and then inside a long visit: False, or raises to break it off.
    """
    problem = dataclasses.replace(setup.problem, optimizer=Optimizer("gradient", _gradient))
    count = problem.model.num_parameters
    if isinstance(engine, MomentsEngine):
        steps, moments_engine = QuadraticSteps(strategy=setup.strategy, problem=problem), engine

        def from_moments(state: np.ndarray) -> np.ndarray:
            moments_engine.moments(heed)
            return steps.run(state[:count], moments_engine.form, step=0, num_steps=1, limit=math.inf).state

        return from_moments
    rows = engines.full_batch(dataclasses.replace(setup, problem=problem), split="train", passes=passes)

    def from_rows(state: np.ndarray) -> np.ndarray:
        result = rows.run(state[:count], step=0, num_steps=1, limit=math.inf, interrupted=heed)
        assert result
        return result.state

    return from_rows
