"""Asks the rules that stop a run early again, where it asked them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tapedist import reference
from tapedist.config import TrainConfig
from tapedist.run.optimum import RunOptimum, stopping_rules
from tapedist.training.schedule import Schedule
from tapedist.training.stopping import StopMemory, Stopping
from tapedist.verification.recomputation import Moment, Recomputation


@dataclasses.dataclass(frozen=True)
class _Engine:
    """What rules ask of the run's engine."""

    run: Recomputation

    @property
    def name(self) -> str:
        return self.run.engine

    def moments(self, heed: object) -> reference.Moments:
        return self.run.moments


class AskedRules:
    """The rules of a run.

    Args:
        run: what is recomputed.

    Attributes:
        obstacle: why they cannot be asked; empty if they can, or if there are none.
    """

    def __init__(self, run: Recomputation):
        config = run.config
        self._run, self._memory, self._stopping = run, StopMemory(), Stopping()
        self.obstacle = ""
        if config.stop_at_se and not config.from_table:
            self.obstacle = "the optimum of synthetic rows is that of other sums"
        elif _has_rules(config):
            self._stopping = self._rules(run)
        self._schedule = Schedule(
            num_epochs=config.most_epochs,
            steps_per_epoch=run.per_epoch,
            log_every_epochs=config.log_every_epochs,
            eval_every_epochs=config.eval_every_epochs,
            checkpoint_every_steps=config.checkpoint_every_steps,
            check_every_epochs=self._stopping.every_epochs,
            slowing=config.num_epochs == "auto" and config.mode == "full_batch",
        )

    @staticmethod
    def _rules(run: Recomputation) -> Stopping:
        objective: Any = run.objective
        engine: Any = _Engine(run)
        count = run.objective.num_parameters

        def evaluate(vector: np.ndarray) -> tuple[float, float]:
            theta = vector[:count]
            loss, weight, _ = run.sums_of_all(theta, "test")
            return loss / weight, reference.penalty(theta, run.problem)

        optimum = RunOptimum(run.config, objective, say=lambda line: None, heed=lambda: False)
        return stopping_rules(
            run.config,
            engine,
            optimum,
            gradient=lambda passes: lambda state: run.gradient(state[:count]),
            evaluate=evaluate if run.test.have_weight else None,
        )

    def take_up(self, memory: np.ndarray) -> None:
        """Remembers what a checkpoint says that was asked before it."""
        self._memory = StopMemory.from_array(memory)

    def reason(self, moment: Moment) -> str:
        """Why the run stops there; empty if it does not, or if no rule is asked there."""
        if not self._schedule.checks(moment.step) or moment.step >= self._schedule.num_steps:
            return ""
        return self._stopping.reason(moment.vector, moment.step, self._memory)


def _has_rules(config: TrainConfig) -> bool:
    return bool(config.stop_at_se or config.early_stop_gradient_norm or config.early_stop_patience)
