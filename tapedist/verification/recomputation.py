"""The recomputation of a run by the reference, from its start or from a stored state.

Legend: `P` parameters, `d` features.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tapedist import reference
from tapedist.config import TrainConfig, why_not_moments
from tapedist.data.source import Source
from tapedist.data.standardize import RawUnits, StandardUnits
from tapedist.errors import InputError
from tapedist.reference.loops import advanced
from tapedist.regression.metric import Metric
from tapedist.regression.summary import Survey, linear_units
from tapedist.run import learning_rate
from tapedist.run.optimum import RunOptimum, stopping_rules
from tapedist.storage.model_file import warm_start
from tapedist.training.schedule import Schedule
from tapedist.training.stopping import StopMemory, Stopping
from tapedist.verification.stored import TrainedRows


@dataclasses.dataclass(frozen=True, eq=False)
class Moment:
    """The state of a run between two updates.

    Attributes:
        at: its step, parameters and slots.
        first_loss: the mean loss of its first epoch, NaN before it is known.
        epoch_sums: `(sum w*loss, sum w, penalty at the first batch)` of the epoch under way; zeros in full batch.
    """

    at: reference.Step
    first_loss: float
    epoch_sums: np.ndarray

    @property
    def step(self) -> int:
        return self.at.step

    @property
    def vector(self) -> np.ndarray:
        """Parameters, then slots, as in a checkpoint."""
        return np.concatenate([self.at.theta, self.at.slots.ravel()])


@dataclasses.dataclass(frozen=True, eq=False)
class LinearObjective:
    """The objective: the attributes of `tapedist.run.objective.Objective` that need no TensorFlow.

    Attributes:
        source: the raw rows.
        units: those of training.
        survey: the survey of the rows before training; None where there was none.
        num_parameters: `P`.
        penalized: factors of the penalty `[P]`.
    """

    source: Source
    units: RawUnits | StandardUnits
    survey: Survey | None
    num_parameters: int
    penalized: np.ndarray
    is_squared: bool
    custom_loss: bool = False
    is_linear: bool = True

    @property
    def model(self) -> LinearObjective:
        return self

    @functools.cached_property
    def metric(self) -> Metric | None:
        return Metric(self.survey.fit, self.units) if self.survey else None


class Recomputation:
    """The run of a config on its rows.

    Args:
        config: the run's settings, resolved.
        source: its rows, raw.
        report: takes the progress of a pass over rows, after each chunk.

    Attributes:
        objective: the objective.
        engine: "moments", "stream" or "mini_batch".
        per_epoch: updates in an epoch.
    """

    def __init__(self, config: TrainConfig, source: Source, *, report: Callable[[str], None]):
        self.config, self._source = config, source
        units, survey = linear_units(config, source, custom_loss=False, surveyed=config.from_table)
        count = source.num_features + config.fit_intercept
        factors = np.ones(count)
        factors[source.num_features :] = 0.0
        self.objective = LinearObjective(
            source, units, survey, count, units.penalized(factors), is_squared=config.loss == "squared"
        )
        self.train, self.test = (
            TrainedRows(source, split, units=units, dtype=config.dtype, report=report) for split in ("train", "test")
        )
        self.obstacle = why_not_moments(config, num_features=source.num_features, is_linear=True, custom_loss=False)
        on_moments = config.full_batch_engine != "stream" and not self.obstacle
        self.engine = "mini_batch" if config.mode == "mini_batch" else "moments" if on_moments else "stream"
        batch = min(config.batch_size, self.train.num_rows)
        self.per_epoch = -(-self.train.num_rows // batch) if self.engine == "mini_batch" else 1

    @functools.cached_property
    def problem(self) -> reference.Problem:
        config = self.config
        problem = reference.Problem(
            dtype=config.dtype, loss=config.loss, delta=config.huber_delta, fit_intercept=config.fit_intercept,
            l2=config.l2, penalized=self.objective.penalized, optimizer=config.optimizer, momentum=config.momentum,
            beta_1=config.adam_beta_1, beta_2=config.adam_beta_2, epsilon=config.adam_epsilon,
        )  # fmt: skip
        return dataclasses.replace(problem, **self._rate())

    def _rate(self) -> dict[str, Any]:
        """The learning rate, as fields of the problem."""
        config, objective = self.config, self.objective
        if not isinstance(config.learning_rate, str):
            return {"rate": config.learning_rate}
        if config.mode == "mini_batch" or not objective.is_squared:
            own: Any = objective
            rate, metric = learning_rate.in_metric(config, own, log=lambda line: None)
            fields = {"rate": rate.first, "hold": rate.hold, "curvature": rate.curvature}
            return {"optimizer": "metric", "metric": metric} | fields
        if self.obstacle:
            raise InputError(
                f"--learning_rate=auto: cannot be recomputed, because {self.obstacle}, and the rate was found by a "
                "power iteration on them"
            )
        l2 = config.l2 * objective.penalized[: self._source.num_features]
        return {"rate": reference.auto_rate(self.moments, fit_intercept=config.fit_intercept, l2=l2)}

    @functools.cached_property
    def columns(self) -> reference.Columns:
        return reference.columns_of(self.train.ranges, reference.KINDS[self.config.dtype])

    @functools.cached_property
    def integers(self) -> np.ndarray:
        """The exact second moments of the training rows."""
        return reference.moment_integers(self.train.chunks(), self.columns)

    @functools.cached_property
    def moments(self) -> reference.Moments:
        return reference.moments(self.integers, self.columns)

    @functools.cached_property
    def form(self) -> reference.Form:
        return reference.quadratic_form(self.moments, fit_intercept=self.config.fit_intercept)

    def start(self) -> Moment:
        """The state before the first update.

        Raises:
            InputError: if the run of `--init_from` is missing, or does not fit.
            StateError: if that run's model is damaged.
        """
        config, units = self.config, self.objective.units
        if config.init_from:
            theta, earlier = warm_start(
                config.init_from, feature_names=self._source.feature_names, fit_intercept=config.fit_intercept
            )
            theta = units.from_raw(theta, earlier.center, earlier.bias_at_center)
        else:
            theta = reference.initial_parameters(self.objective.num_parameters, init=config.init, seed=config.seed)
            # Drawn and then set to 0, so that the other parameters do not depend on which are left out.
            theta[list(units.left_out)] = 0.0
        slots = reference.first_slots(len(theta), self.problem)
        return Moment(reference.Step(0, theta, slots, math.nan, math.nan), math.nan, np.zeros(3))

    def after(self, moment: Moment) -> Iterator[Moment]:
        """The states after each further update, without end.

        Raises:
            reference.Diverged: if an update diverges.
        """
        while True:
            limit = math.inf if math.isnan(moment.first_loss) else reference.loss_limit(moment.first_loss)
            at = advanced(moment.at, *self._sums(moment.at), limit, self.problem)
            moment = Moment(at, moment.first_loss, self._epoch_sums(moment, at))
            if at.step == self.per_epoch:
                loss, weight = moment.epoch_sums[:2] if self.engine == "mini_batch" else (at.loss_sum, at.weight)
                moment = dataclasses.replace(moment, first_loss=float(loss / (weight or 1.0)))
            yield moment

    def _sums(self, at: reference.Step) -> tuple[float, float, np.ndarray]:
        """The sums of losses, weights and gradients that make the next update."""
        if self.engine == "moments":
            loss, gradient = reference.form_gradient(at.theta, self.form)
            return loss, 1.0, gradient
        if self.engine == "stream":
            return self.sums_of_all(at.theta)
        config = self.config
        rows = reference.batch_rows(
            at.step, num_rows=self.train.num_rows, batch_size=config.batch_size, shuffle=self._shuffle, seed=config.seed
        )
        limits = self.train.bounds
        found = reference.totals(at.theta, [self.train.take(rows)], limits, self.problem)
        return reference.loss_and_gradient_sums(at.theta, found, limits, self.problem)

    def sums_of_all(self, theta: np.ndarray, split: str = "train") -> tuple[float, float, np.ndarray]:
        """`(sum w*loss, sum w, sums of gradients [P])` over all rows of a split."""
        rows = self.train if split == "train" else self.test
        found = reference.totals(theta, rows.chunks(), rows.bounds, self.problem)
        return reference.loss_and_gradient_sums(theta, found, rows.bounds, self.problem)

    @property
    def _shuffle(self) -> str:
        return {"auto": "rows" if self.config.from_table else "batches"}.get(self.config.shuffle, self.config.shuffle)

    def _epoch_sums(self, before: Moment, at: reference.Step) -> np.ndarray:
        if self.engine != "mini_batch":
            return before.epoch_sums
        sums = before.epoch_sums
        if before.step % self.per_epoch == 0:
            sums = np.array([0.0, 0.0, reference.penalty(before.at.theta, self.problem)])
        return sums + np.array([at.loss_sum, at.weight, 0.0])

    def losses(self, moment: Moment) -> tuple[float | None, float | None]:
        """`(train loss, test loss)` at the end of a run, as `model.json` has them."""
        test = None
        if self.test.have_weight:
            loss, weight, _ = self.sums_of_all(moment.at.theta, "test")
            test = loss / weight
        if self.engine == "mini_batch":
            return float(moment.epoch_sums[0] / moment.epoch_sums[1]) if moment.step else None, test
        loss, weight, _ = self._sums(moment.at)
        return loss / weight, test

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """The gradient of the objective over all training rows, `[P]`, for the stopping rules."""
        if self.engine == "moments":
            _, sums = reference.form_gradient(theta, self.form)
            weight = 1.0
        else:
            _, weight, sums = self.sums_of_all(theta)
        gradient = sums * (1.0 / (weight or 1.0))
        if self.problem.l2:
            gradient = gradient + ((2 * self.problem.l2) * self.problem.factors(len(theta))) * theta
        return gradient


@dataclasses.dataclass(frozen=True)
class _Engine:
    """The part of an engine that the stopping rules use."""

    run: Recomputation

    @property
    def on_moments(self) -> bool:
        return self.run.engine == "moments"

    def moments(self) -> reference.Moments | None:
        return self.run.moments if self.on_moments else None


class AskedRules:
    """The stopping rules of a run.

    Args:
        run: the recomputation.

    Attributes:
        obstacle: why they cannot be checked; empty if they can, or if there are none.
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

        optimum = RunOptimum(run.config, objective, log=lambda line: None)
        return stopping_rules(
            run.config,
            engine,
            optimum,
            gradient=lambda passes: lambda state: run.gradient(state[:count]),
            evaluate=evaluate if run.test.have_weight else None,
        )

    def restore(self, memory: np.ndarray) -> None:
        """Restores the rules' state from a checkpoint."""
        self._memory = StopMemory.from_array(memory)

    def reason(self, moment: Moment) -> str:
        """Why the run stops there; empty if it does not, or if no rule is checked there."""
        if not self._schedule.checks(moment.step) or moment.step >= self._schedule.num_steps:
            return ""
        return self._stopping.reason(moment.vector, moment.step, self._memory)


def _has_rules(config: TrainConfig) -> bool:
    return bool(config.stop_at_se or config.early_stop_gradient_norm or config.early_stop_patience)
