"""The least-squares optimum of one run's training rows, and the rules that stop the run early by it or without it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tapedist.config import TrainConfig
from tapedist.data.exact_arithmetic import folded
from tapedist.data.standardize import RawUnits
from tapedist.errors import InputError
from tapedist.regression.least_squares import LeastSquares
from tapedist.regression.metric import Gap, NewtonGap
from tapedist.regression.summary import Statistics, distance, intercept_at_zero, mean_absolute_error, optimum
from tapedist.text import display
from tapedist.training.state import TrainingState
from tapedist.training.stopping import (
    SETTLED,
    Stopping,
    StopRule,
    near_optimum,
    settled,
    small_gradient,
    stale_test_loss,
)

if TYPE_CHECKING:  # They import TensorFlow, which nothing here needs.
    from tapedist.run.objective import Objective
    from tapedist.training.engines import Engine

_MOST_LOOKS = 1000
_AFFORDABLE = 5e9  # About two seconds of products.
# What is left of the way to the optimum, against the largest residuals that count, where rounding is all that moves.
_STILL, _STILL_FLOAT32 = 1e-11, 1e-7


class RunOptimum:
    """The optimum of a run, computed when it is first asked for.

    Args:
        config: the run's settings.
        objective: what is fitted.
        log: takes a line for the user.

    Attributes:
        source: the rows, raw.
        metric: of the training rows; None where they were not surveyed.
        model: what is fitted.
    """

    def __init__(self, config: TrainConfig, objective: Objective, *, log: Callable[[str], None]):
        self._config, self._units = config, objective.units
        self.source, self.metric = objective.source, objective.metric
        self.model, self._own_loss = objective.model, objective.custom_loss
        self._log = log
        least_squares = objective.is_linear and not objective.custom_loss and config.loss == "squared"
        self._has_meaning = least_squares and config.statistics != "false"
        self._surveyed = objective.survey.fit if objective.survey and objective.survey.exact else None
        self._fit: LeastSquares | None = None
        self._known = False

    def fit(self, engine: Engine) -> LeastSquares | None:
        """The optimum; None where it has no meaning or costs too much.

        Args:
            engine: the run's; its moments are used if it has any.
        """
        if not self._known and self._has_meaning and self._surveyed:
            self._fit = self._surveyed
        elif not self._known and self._has_meaning:
            config = self._config
            moments = engine.moments() if self._rows_are_exact() else None
            self._fit = optimum(
                self.source,
                fit_intercept=config.fit_intercept,
                moments=moments,
                force=config.statistics == "true" or config.stop_at_se not in (0, "auto"),
            )
            if self._fit is None:
                self._log("Statistics: left out, because they need another look at many rows; see --statistics")
        self._known = True
        return self._fit

    def statistics(
        self,
        parameters: np.ndarray,
        engine: Engine,
        center: np.ndarray | None = None,
        bias_at_center: float | None = None,
    ) -> Statistics | None:
        """The optimum beside `parameters` `[P]` in raw units; None if there is none.

        Args:
            parameters: the weights, then the bias.
            engine: see `fit`.
            center: where the bias is better known by `bias_at_center`, the prediction there; None for zeros.
            bias_at_center: None for the bias.
        """
        try:
            fit = self.fit(engine)
        except InputError as error:  # What was trained is still good.
            self._log(f"Statistics: none, because {error}")
            return None
        if fit is None:
            return None
        weights, bias = self._split(parameters)
        bias = bias if bias_at_center is None else bias_at_center
        mae = mean_absolute_error(self.source, weights, bias, center=center, force=self._config.statistics == "true")
        return Statistics.of(fit, weights, bias, truth=self.source.truth, mae=mae, center=center)

    def gap(self, state: TrainingState) -> Gap | None:
        """How far a state that no rule found close is from the optimum of the run's own objective.

        None where that is least squares, where it is not known, or where the pass over the rows would take long.
        """
        rows, p = self.source.num_rows("train"), self.model.num_parameters
        of_statistics = self._has_meaning and not self._config.l2
        found_close = state.stopped not in ("", SETTLED)
        if self.newton is None or of_statistics or found_close or rows * p * p > _AFFORDABLE:
            return None
        found = self.newton(state.vector[:p])
        # Half of squared error was looked at.
        twice = 2 if self._config.loss == "squared" and found.excess is not None else 1
        return Gap(found.standard_errors, found.excess and twice * found.excess)

    @functools.cached_property
    def newton(self) -> NewtonGap | None:
        """The gap to the optimum of the run's own objective; None where it is not known."""
        config = self._config
        if self.metric is None or self._own_loss or config.loss not in ("squared", "huber"):
            return None
        l2 = config.l2 * self.model.penalized
        if config.loss == "squared":
            return NewtonGap(self.metric, self.source, delta=np.inf, l2=l2 / 2)
        return NewtonGap(self.metric, self.source, delta=config.huber_delta, l2=l2)

    def standard_errors(self, fit: LeastSquares, parameters: np.ndarray) -> float | None:
        """The largest distance of `parameters` `[P]`, in training units, to the optimum."""
        weights, bias = self._split(self._units.to_raw(parameters))
        center, at_center = self._units.at_center(parameters)
        at_zero = bias if at_center is None else intercept_at_zero(weights, at_center, center)
        return distance(fit, weights, at_zero).max_standard_errors

    def _split(self, parameters: np.ndarray) -> tuple[np.ndarray, float]:
        d = self.source.num_features
        return parameters[:d], float(parameters[d]) if self._config.fit_intercept else 0.0

    def _rows_are_exact(self) -> bool:
        """Whether training sees the rows' own numbers: neither shifted, nor rounded on the way."""
        # Sources without a type have no numbers of their own but those that training takes from them.
        rounded = self.source.dtype not in (None, np.float32)
        return isinstance(self._units, RawUnits) and (self._config.dtype == "float64" or not rounded)


def stopping_rules(
    config: TrainConfig,
    engine: Engine,
    optimum_of_run: RunOptimum,
    *,
    gradient: Callable[[int], Callable[[np.ndarray], np.ndarray]],
    evaluate: Callable[[np.ndarray], tuple[float, float]] | None,
) -> Stopping:
    """The rules that the config asks for.

    Args:
        config: the run's settings.
        engine: the run's.
        optimum_of_run: its optimum.
        gradient: makes `state -> gradient [P]` over all rows, which will be asked at most so many times.
        evaluate: the loss of a state on the test split, or None without test rows.

    Raises:
        InputError: if a rule cannot be applied to this model and these rows.
    """
    rules: list[StopRule] = []
    count, pace = optimum_of_run.model.num_parameters, config.early_stop_every_epochs
    if config.stop_at_se == "auto":
        rules += _finishing_rules(config, engine, optimum_of_run, gradient=gradient(_MOST_LOOKS))
        others = config.early_stop_gradient_norm or config.early_stop_patience
        if engine.on_moments and not others:  # Whose epochs cost less than a look at their outcome.
            pace *= 10
    elif config.stop_at_se:
        fit = optimum_of_run.fit(engine)
        if fit is None or not fit.residual_std:
            why = "" if fit is None else f", but {_no_standard_errors(fit)}"
            raise InputError(
                f"--stop_at_se={display(config.stop_at_se)}: needs a linear model with one optimum{why}; "
                "use --early_stop_gradient_norm"
            )
        known = fit
        rules.append(
            near_optimum(lambda state: optimum_of_run.standard_errors(known, state[:count]), config.close_enough)
        )
    if config.early_stop_gradient_norm:
        passes = 1 + config.most_epochs // config.early_stop_every_epochs
        rules.append(small_gradient(gradient(passes), config.early_stop_gradient_norm))
    if config.early_stop_patience:
        if evaluate is None:
            raise InputError(f"--early_stop_patience={config.early_stop_patience}: there is no test row to judge by")
        rules.append(stale_test_loss(evaluate, config.early_stop_patience))
    return Stopping(pace if rules else 0, tuple(rules))


def _no_standard_errors(fit: LeastSquares) -> str:
    if fit.residual_std == 0:
        return "the fit is exact, so that the standard errors are 0"
    return "no degrees of freedom are left for standard errors"


def _finishing_rules(
    config: TrainConfig, engine: Engine, optimum_of_run: RunOptimum, *, gradient: Callable[[np.ndarray], np.ndarray]
) -> list[StopRule]:
    """What `--stop_at_se=auto` stands for: close to the optimum of the run's own objective, or as close as it gets."""
    metric = optimum_of_run.metric
    assert metric
    model = optimum_of_run.model
    count, l2 = model.num_parameters, config.l2 * model.penalized
    weights_l2 = l2[: len(metric.fit.names)]
    squared = config.loss == "squared"
    inverse = metric.inverse_hessian(weights_l2) if squared else 2 * metric.inverse_hessian(2 * weights_l2)
    move = functools.lru_cache(1)(lambda state: folded(inverse * gradient(np.frombuffer(state)), axis=1))

    def length(state: np.ndarray) -> float:
        """Of the move to the optimum where the loss is squared; else of a move that is no longer than that."""
        return metric.length(move(state.tobytes()))

    error, limit = metric.standard_error, config.close_enough
    rules: list[StopRule] = []
    if squared and not config.l2 and error:
        rules.append(near_optimum(lambda state: optimum_of_run.standard_errors(metric.fit, state[:count]), limit))
    elif squared and error:
        rules.append(near_optimum(lambda state: length(state) / error, limit))
    elif not squared:
        newton = optimum_of_run.newton
        assert newton
        # A look at all rows is made only where the cheap bound allows.
        close = limit * (error or np.inf)
        rules.append(
            near_optimum(lambda state: newton(state[:count]).standard_errors if length(state) <= close else None, limit)
        )
    precise = config.dtype == "float64" or engine.on_moments
    spread = metric.target_deviation if squared else min(metric.target_deviation, config.huber_delta)
    least = (_STILL if precise else _STILL_FLOAT32) * spread
    rules.append(settled(lambda state: length(state) <= least))
    return rules
