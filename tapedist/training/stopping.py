"""Rules that end a run before its last epoch. They are checked at fixed epochs, so when a run stops depends on its
config alone, never on the number of steps of a call or on a resume.

Legend: `P` parameters, `s` optimizer slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from tapedist.data.exact_arithmetic import folded

SETTLED = "no parameter moves any more"


@dataclasses.dataclass
class StopMemory:
    """The state of the rules between two checks; part of a run's state.

    Attributes:
        checked_step: updates done at the last check; -1 before the first.
        best_test: the smallest test loss at any check, infinite before the first.
        stale_checks: checks since then.
    """

    checked_step: int = -1
    best_test: float = np.inf
    stale_checks: int = 0

    def to_array(self) -> np.ndarray:
        return np.array([self.checked_step, self.best_test, self.stale_checks], np.float64)

    @classmethod
    def from_array(cls, values: np.ndarray) -> StopMemory:
        return cls(int(values[0]), float(values[1]), int(values[2]))


class StopRule(Protocol):
    """A stopping rule."""

    def __call__(self, vector: np.ndarray, memory: StopMemory, *, again: bool) -> str:
        """Why the run should stop at these parameters; empty if it should not.

        Args:
            vector: float64 `[P + s * P]`.
            memory: may be changed, unless `again`.
            again: whether the check was made at this step before, and the run was resumed from there.
        """


@dataclasses.dataclass(frozen=True)
class Stopping:
    """All rules of a run.

    Attributes:
        every_epochs: epochs between checks; 0 without rules.
        rules: in the order of their reasons.
    """

    every_epochs: int = 0
    rules: Sequence[StopRule] = ()

    def reason(self, vector: np.ndarray, step: int, memory: StopMemory) -> str:
        """Why the run should stop after `step` updates; empty if it should not."""
        again = memory.checked_step == step
        # All rules are called, because some have a state, even if the first one has a reason already.
        reasons = [rule(vector, memory, again=again) for rule in self.rules]
        memory.checked_step = step
        return next(filter(None, reasons), "")


def near_optimum(distance: Callable[[np.ndarray], float | None], limit: float) -> StopRule:
    """Stops when every parameter is within `limit` standard errors of the optimum.

    Args:
        distance: the state's largest distance in standard errors; None where it is undefined.
        limit: `--stop_at_se`.
    """

    def rule(vector: np.ndarray, memory: StopMemory, *, again: bool) -> str:
        found = distance(vector)
        # Not `found > limit`: NaN is no reason to stop.
        if found is None or not found <= limit:
            return ""
        return f"every parameter is within {found:.3g} standard errors of the optimum"

    return rule


def settled(still: Callable[[np.ndarray], bool]) -> StopRule:
    """Stops when the parameters are as near to the optimum as the arithmetic allows.

    Args:
        still: whether a state's distance to the optimum of the rounded rows is below rounding.
    """

    def rule(vector: np.ndarray, memory: StopMemory, *, again: bool) -> str:
        return SETTLED if still(vector) else ""

    return rule


def small_gradient(gradient: Callable[[np.ndarray], np.ndarray], limit: float) -> StopRule:
    """Stops when the gradient's 2-norm over all training rows is at most `limit`.

    Args:
        gradient: of the objective, in the units of training, at a state.
        limit: `--early_stop_gradient_norm`.
    """

    def rule(vector: np.ndarray, memory: StopMemory, *, again: bool) -> str:
        slope = gradient(vector)
        # `folded`, because the BLAS behind `np.linalg.norm` may differ in the last bit, and with it the epoch of the
        # stop.
        norm = float(np.sqrt(folded(slope * slope)))
        return f"the norm of the gradient is {norm:.3g}" if norm <= limit else ""

    return rule


def stale_test_loss(evaluate: Callable[[np.ndarray], tuple[float, float]], patience: int) -> StopRule:
    """Stops after `patience` checks in a row without a smaller test loss.

    Args:
        evaluate: `vector -> (loss, penalty)` on the test split.
        patience: `--early_stop_patience`.
    """

    def rule(vector: np.ndarray, memory: StopMemory, *, again: bool) -> str:
        # A check that was made before a resume must not count twice.
        if not again:
            loss = evaluate(vector)[0]
            better = loss < memory.best_test
            memory.stale_checks = 0 if better else memory.stale_checks + 1
            memory.best_test = loss if better else memory.best_test
        if memory.stale_checks < patience:
            return ""
        return f"the test loss has not been below {memory.best_test:.6g} for {memory.stale_checks} checks"

    return rule
