"""The least-squares optimum of one run's training rows, and the rules that stop the run early by it or without it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tapedist.config import TrainConfig
from tapedist.data.standardize import RawUnits
from tapedist.errors import InputError
from tapedist.objective import Objective
from tapedist.results.least_squares import LeastSquares
from tapedist.results.regression import distance
from tapedist.results.statistics import Statistics, mean_absolute_error, optimum
from tapedist.text_values import shown
from tapedist.training.engines import Engine, MomentsEngine, Setup
from tapedist.training.measures import full_gradient
from tapedist.training.stopping import Stopping, StopRule, near_optimum, small_gradient, stale_test_loss


class RunOptimum:
    """The optimum of a run, computed when it is first asked for.

    Args:
        config: the run's settings.
        objective: what is fitted.
        say: takes a line for the user.
        heed: asked now and then inside a pass over the rows: False, or raises to break it off.
    """

    def __init__(
        self, config: TrainConfig, objective: Objective, *, say: Callable[[str], None], heed: Callable[[], bool]
    ):
        self._config, self._source, self._units = config, objective.source, objective.units
        self._say, self._heed = say, heed
        least_squares = objective.is_linear and not objective.own_loss and config.loss == "squared"
        self._has_meaning = least_squares and config.statistics != "false"
        self._fit: LeastSquares | None = None
        self._known = False

    def fit(self, engine: Engine) -> LeastSquares | None:
        """The optimum; None where it has no meaning or costs too much.

        Args:
            engine: the run's; its moments are used if it has any.
        """
        if not self._known and self._has_meaning:
            config = self._config
            moments = None
            if isinstance(engine, MomentsEngine) and self._rows_are_exact():
                moments = engine.moments(self._heed)
            self._fit = optimum(
                self._source,
                fit_intercept=config.fit_intercept,
                moments=moments,
                whatever_it_costs=config.statistics == "true" or config.stop_at_se > 0,
                heed=self._heed,
            )
            if self._fit is None:
                self._say("Statistics: left out, because they need another look at many rows; see --statistics")
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
            self._say(f"Statistics: none, because {error}")
            return None
        if fit is None:
            return None
        weights, bias = self._split(parameters)
        bias = bias if bias_at_center is None else bias_at_center
        mae = mean_absolute_error(
            self._source, weights, bias,
            center=center, whatever_it_costs=self._config.statistics == "true", heed=self._heed,
        )  # fmt: skip
        return Statistics.of(fit, weights, bias, truth=getattr(self._source, "truth", None), mae=mae, center=center)

    def standard_errors(self, fit: LeastSquares, parameters: np.ndarray) -> float | None:
        """The largest distance of `parameters` `[P]`, in training units, to the optimum."""
        return distance(fit, *self._split(self._units.to_raw(parameters))).max_standard_errors

    def _split(self, parameters: np.ndarray) -> tuple[np.ndarray, float]:
        d = self._source.num_features
        return parameters[:d], float(parameters[d]) if self._config.fit_intercept else 0.0

    def _rows_are_exact(self) -> bool:
        """Whether training sees the rows' own numbers: neither shifted, nor rounded on the way."""
        # Sources without `rows` have no numbers of their own but those that training takes from them.
        rounded = hasattr(self._source, "rows") and getattr(self._source, "dtype", None) != np.float32
        return isinstance(self._units, RawUnits) and (self._config.dtype == "float64" or not rounded)


def stopping_rules(
    config: TrainConfig,
    setup: Setup,
    engine: Engine,
    optimum_of_run: RunOptimum,
    *,
    evaluate: Callable[[np.ndarray], tuple[float, float]] | None,
    heed: Callable[[], bool],
) -> Stopping:
    """The rules that the config asks for.

    Args:
        config: the run's settings.
        setup: of the run's engines.
        engine: the run's.
        optimum_of_run: its optimum.
        evaluate: the loss of a state on the test split, or None without test rows.
        heed: asked now and then inside a pass over the rows: False, or raises to break it off.

    Raises:
        InputError: if a rule cannot be applied to this model and these rows.
    """
    rules: list[StopRule] = []
    count = setup.programs["model"].num_parameters
    if config.stop_at_se:
        fit = optimum_of_run.fit(engine)
        if fit is None or fit.problem or fit.residual_std is None:
            why = "" if fit is None else f", but {fit.problem or 'no degrees of freedom are left for standard errors'}"
            raise InputError(
                f"--stop_at_se={shown(config.stop_at_se)}: needs a linear model with one optimum{why}; "
                "use --early_stop_gradient_norm"
            )
        known = fit
        rules.append(
            near_optimum(lambda state: optimum_of_run.standard_errors(known, state[:count]), config.stop_at_se)
        )
    if config.early_stop_gradient_norm:
        passes = 1 + config.num_epochs // config.early_stop_every_epochs
        gradient = full_gradient(setup, engine, passes=passes, heed=heed)
        rules.append(small_gradient(gradient, config.early_stop_gradient_norm))
    if config.early_stop_patience:
        if evaluate is None:
            raise InputError(f"--early_stop_patience={config.early_stop_patience}: there is no test row to judge by")
        rules.append(stale_test_loss(evaluate, config.early_stop_patience))
    return Stopping(config.early_stop_every_epochs if rules else 0, tuple(rules))
