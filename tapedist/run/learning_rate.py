"""The learning rate of one run: what auto stands for, resolved before the first step, and advice after divergence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from tapedist.config import TrainConfig
from tapedist.data.orders import BlockPlan
from tapedist.data.source import Source
from tapedist.errors import DivergedError, InputError, TapedistError
from tapedist.regression.curvature import Curvature, curvature, power_iteration
from tapedist.regression.least_squares import Moments
from tapedist.regression.metric import largest_leverage, share_of_small_residuals
from tapedist.training.schedule import Rate
from tapedist.training.state import TrainingState

if TYPE_CHECKING:  # They import TensorFlow, which `in_metric` does without.
    from tapedist.run.objective import Objective
    from tapedist.training.engine_setup import Setup

_HUBER_RATE = 1.8
_FORGETTING = 20.0  # Natural logarithm of what is left of the distance to the start, where the loss is squared.
_RATE_DIGITS = 9  # As many as anybody's eigenvalues have, by whatever algorithm.
_MOST_POWER_ROWS = 100_000
_MOST_POWER_NUMBERS = 2**24  # Their products are added elementwise, which takes its time.


def auto_rate(moments: Moments, config: TrainConfig, *, l2: np.ndarray) -> float:
    """The rate at which plain gradient descent converges fastest, to nine digits.

    Args:
        moments: of the rows that are trained on.
        config: the run's settings.
        l2: of the penalty on each weight in the units of these rows, `[d]`.

    Raises:
        InputError: if squares of the rows overflow.
    """
    rate = _curvature(moments, config, l2).auto_rate
    if rate is None:  # No parameter matters, so neither does the rate.
        return 1.0
    return float(f"{rate:.{_RATE_DIGITS - 1}e}")


def stable_rate(source: Source, config: TrainConfig, *, l2: np.ndarray) -> float:
    """A stable rate of plain gradient descent on squared error, where the features are too many for their moments.

    Half the bound, because its eigenvalue is estimated from below.

    Args:
        source: the rows that are trained on.
        config: the run's settings.
        l2: of the penalty on each weight in the units of these rows, `[d]`.
    """
    largest = _sampled_lambda_max(source, config, l2)
    return float(f"{1 / largest:.{_RATE_DIGITS - 1}e}") if largest > 0 else 1.0


def with_stable_bound(
    error: DivergedError, config: TrainConfig, *, moments: Moments | None, source: Source, rate: float, l2: np.ndarray
) -> DivergedError:
    """`error` with the stable bound of the learning rate, and the advice that follows.

    Args:
        error: what the trainer raised.
        config: the run's settings.
        moments: of the rows that were trained on, where they are known.
        source: these rows; asked for a sample where there are too many features for moments.
        rate: the learning rate in use.
        l2: of the penalty on each weight in the units of these rows, `[d]`.

    Raises:
        InputError: if squares of the rows overflow.
    """
    if moments is not None:
        found = _curvature(moments, config, l2)
    else:
        largest = _sampled_lambda_max(source, config, l2)
        found = Curvature(largest, 0.0, 0.0)
    bound = found.stable_bound(config.optimizer, config.momentum)
    if bound is None:
        return DivergedError(f"{error}; lower --learning_rate={rate:g}")
    formula = {"sgd": "2 / lambda_max", "momentum": "2 (1 + momentum) / lambda_max"}.get(
        config.optimizer, "2 (1 + momentum) / ((1 + 2 momentum) lambda_max)"
    )
    if rate >= bound:
        best = found.auto_rate if moments is not None and config.optimizer == "sgd" else None
        known = config.mode == "full_batch" and best
        advice = f"use one below it, or --learning_rate=auto ({best:.6g})" if known else "use one well below it"
    elif config.mode == "full_batch":
        advice = "lower the rate"
    else:
        advice = "the bound is that of full batch: mini-batches need less; lower the rate"
    return DivergedError(
        f"{error}; --learning_rate={rate:g} against the stable bound {bound:.6g} = {formula} of this data "
        f"(lambda_max = {found.lambda_max:.6g}): {advice}"
    )


def _curvature(moments: Moments, config: TrainConfig, l2: np.ndarray) -> Curvature:
    if not np.isfinite(moments.centred).all():
        raise InputError(
            "--standardize: the squares of these rows overflow, so that no learning rate fits; use --standardize=true, "
            "or scale the columns"
        )
    return curvature(**dataclasses.asdict(moments), fit_intercept=config.fit_intercept, l2=l2)


def _sampled_lambda_max(source: Source, config: TrainConfig, l2: np.ndarray) -> float:
    most = min(_MOST_POWER_ROWS, max(1, _MOST_POWER_NUMBERS // source.num_features))
    rows = min(source.num_rows("train"), most)
    size = BlockPlan(rows, source.num_features, 8).block_rows

    import tensorflow as tf

    def blocks() -> Iterator[tuple[np.ndarray, ...]]:
        for first in range(0, rows, size):
            taken = source.take("train", tf.range(first, min(first + size, rows), dtype=tf.int64))
            yield tuple(column.numpy().astype(np.float64) for column in taken)

    return power_iteration(blocks, num_features=source.num_features, fit_intercept=config.fit_intercept, l2=l2)


def settle(
    config: TrainConfig,
    objective: Objective,
    setup: Setup,
    progress: dict[str, np.ndarray],
    *,
    log: Callable[[str], None],
) -> tuple[float, Setup]:
    """Turns `--learning_rate=auto` into what it stands for, by a pass over the rows where none is stored.

    Args:
        config: the run's settings.
        objective: what is fitted.
        setup: of the run's engines.
        progress: of the run's engine, as stored; the `moments` engine finds the moments in it.
        log: takes a line for the log.

    Returns:
        The rate (of the first step), and the setup whose optimizer has it.

    Raises:
        InputError: if no such rate is known.
    """
    from tapedist.training import optimizers

    if not isinstance(config.learning_rate, str):
        return config.learning_rate, setup
    if objective.custom_loss or not objective.is_linear:
        raise InputError(
            "--learning_rate=auto: is known only for linear models with squared error or the huber loss; give a number"
        )
    if config.mode == "mini_batch" or not objective.is_squared:
        rate, matrix = in_metric(config, objective, log=log)
        first, optimizer = rate.first, optimizers.metric_sgd(rate, matrix)
    else:
        first = _fastest(config, objective, setup, progress, log=log)
        optimizer = optimizers.from_config(config, auto_rate=first)
    return first, dataclasses.replace(setup, problem=dataclasses.replace(setup.problem, optimizer=optimizer))


def _fastest(
    config: TrainConfig,
    objective: Objective,
    setup: Setup,
    progress: dict[str, np.ndarray],
    *,
    log: Callable[[str], None],
) -> float:
    """The rate at which plain gradient descent on squared error converges fastest; arguments as in `settle`."""
    from tapedist.training import engines

    if obstacle := objective.why_not_moments(config):
        rate = stable_rate(setup.source, config, l2=_penalty(config, objective))
        log(f"Learning rate: {rate:.6g} = 1 / lambda_max of these rows, because {obstacle}")
        return rate
    known = engines.moments(setup)
    is_its_own = config.full_batch_engine != "stream"  # Else the sums are those of another pass.
    if is_its_own:
        known.restore(progress)
    moments = known.moments()
    assert moments
    if is_its_own:
        progress.clear()
        progress.update(known.progress())
    rate = auto_rate(moments, config, l2=_penalty(config, objective))
    log(f"Learning rate: {rate:.6g} = 2 / (lambda_min + lambda_max) of these rows")
    return rate


def in_metric(config: TrainConfig, objective: Objective, *, log: Callable[[str], None]) -> tuple[Rate, np.ndarray]:
    """Gradient descent in the metric of the rows' curvature, in which it is the same in all directions.

    The huber loss curves at most as much as half of squared error, so that a full-batch rate below 2 is stable in the
    metric of that (Huber, "Robust statistics", 1981, 7.8: modified residuals). A batch of `B` rows may curve more than
    all rows do: `B / (B - 1 + largest leverage)` is the fastest rate that is stable for all batches (Ma, Bassily and
    Belkin, "The power of interpolation", 2018, theorem 3).

    Args:
        config: the run's settings.
        objective: what is fitted.
        log: takes a line for the log.

    Returns:
        The rate over the steps, and the metric `[P, P]`.

    Raises:
        InputError: if no such rate is known.
    """
    metric = objective.metric
    if metric is None:
        raise InputError(
            f"--learning_rate=auto: is known for the {config.loss} loss and {config.mode} on a table or arrays only; "
            "give a number"
        )
    penalty, source, loss = _penalty(config, objective), objective.source, f"{config.loss} loss"
    matrix = metric.inverse_hessian(penalty) if objective.is_squared else 2 * metric.inverse_hessian(2 * penalty)
    if config.mode == "full_batch":
        log(f"Learning rate: {_HUBER_RATE} in the metric of the features' covariance, for the {loss}")
        return Rate(_HUBER_RATE), matrix
    batch = min(config.batch_size, source.num_rows("train"))
    first = batch / (batch - 1 + max(1.0, largest_leverage(source, metric.fit)))
    curvature = 1.0
    if not objective.is_squared:
        curvature = share_of_small_residuals(source, metric, config.huber_delta)
    hold = math.ceil(_FORGETTING / first)
    falling = f"from step {hold} on falling like 1 / step"
    log(f"Learning rate: {first:.6g} in the metric of the features' covariance, {falling}")
    return Rate(first, hold, curvature), matrix


def divergence_advice(
    error: DivergedError,
    config: TrainConfig,
    objective: Objective,
    setup: Setup,
    state: TrainingState,
    *,
    rate: float,
) -> TapedistError:
    """What to raise in place of `error`: with the bound that the rate broke, where the loss has one.

    Args:
        error: what the trainer raised.
        config: the run's settings.
        objective: what was fitted.
        setup: of the run's engines.
        state: after the last good update.
        rate: the learning rate in use.

    Raises:
        InputError: if squares of the rows overflow.
    """
    from tapedist.training import engines

    if state.step == 0 and np.isnan(state.first_loss) and objective.is_linear:
        return _overflow(config)
    if not (objective.is_linear and objective.is_squared) or objective.source.num_rows("train") == 0:
        return error
    moments = None if objective.why_not_moments(config) else engines.moments(setup).moments()
    l2 = _penalty(config, objective)
    return with_stable_bound(error, config, moments=moments, source=setup.source, rate=rate, l2=l2)


def _penalty(config: TrainConfig, objective: Objective) -> np.ndarray:
    """Of `--l2` on each weight `[d]`, in the units that training sees."""
    return config.l2 * objective.model.penalized[: objective.source.num_features]


def _overflow(config: TrainConfig) -> InputError:
    """Why a linear model's first loss is not finite: no step was taken, so it is the rows."""
    fixes = [] if config.standardizes else ["--standardize"]
    fixes += ["--dtype=float64"] if config.dtype == "float32" else []
    return InputError(
        f"the loss overflows {config.dtype} before the first update; use {' or '.join([*fixes, 'smaller units'])}"
    )
