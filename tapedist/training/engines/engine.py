"""What an engine is: what moves the parameters through a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np

from tapedist.training.steps import CallResult

Measured = Callable[[range], Iterable[int]]


def all_epochs(epochs: range) -> range:
    return epochs


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
        self,
        state: np.ndarray,
        *,
        step: int,
        num_steps: int,
        limit: float,
        interrupted: Callable[[], bool],
        measured: Measured = all_epochs,
    ) -> CallResult | None:
        """Does up to `num_steps` updates.

        Args:
            state: float64 `[P + s * P]`, see `steps.py`.
            step: updates done before.
            num_steps: at least 1; the engine may do fewer.
            limit: loss above which the run has diverged.
            interrupted: asked now and then inside long steps; true means stop soon.
            measured: whose losses are told.

        Returns:
            What was done, or None if an interruption came before one step was whole; `progress` then holds the rest.
        """

    def progress(self) -> dict[str, np.ndarray]:
        """The sums of a step that is not whole yet; empty between steps."""

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Takes up what `progress` gave, on any topology."""


def rough_steps(steps: range, per_epoch: int, measured: Measured) -> np.ndarray:
    """Which of consecutive `steps` are of epochs whose loss is not told, boolean `[k]`."""
    epochs = range(steps.start // per_epoch, (steps.stop - 1) // per_epoch + 1)
    rough = np.ones(len(epochs), bool)
    rough[np.fromiter(measured(epochs), np.int64) - epochs.start] = False
    return rough[np.arange(steps.start, steps.stop) // per_epoch - epochs.start]


class WholeSteps:
    """The part of an engine whose steps are never interrupted halfway."""

    def progress(self) -> dict[str, np.ndarray]:
        return {}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        assert not progress
