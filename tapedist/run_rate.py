"""The learning rate of one run: settled before the first step, and explained where it was too large."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tapedist import rates
from tapedist.config import TrainConfig
from tapedist.errors import DivergedError, InputError, TapedistError
from tapedist.objective import Objective
from tapedist.text_values import shown
from tapedist.training import engines, optimizers
from tapedist.training.engines import Setup
from tapedist.training.state import TrainingState


def settle(
    config: TrainConfig,
    objective: Objective,
    setup: Setup,
    progress: dict[str, np.ndarray],
    *,
    heed: Callable[[], bool],
    say: Callable[[str], None],
) -> tuple[float, Setup]:
    """Turns `--learning_rate=auto` into a number, by a pass over the rows where no pass is stored.

    Args:
        config: the run's settings.
        objective: what is fitted.
        setup: of the run's engines.
        progress: of the run's engine, as stored; the `moments` engine finds the moments in it.
        heed: asked now and then inside the pass: False, or raises to break it off.
        say: takes a line for the log.

    Returns:
        The rate, and the setup whose optimizer has it.

    Raises:
        InputError: if no such rate is known.
    """
    if not isinstance(config.learning_rate, str):
        return config.learning_rate, setup
    if obstacle := objective.moments_obstacle(config):
        raise InputError(f"--learning_rate=auto: is known only where moments are, and {obstacle}; give a number")
    known = engines.moments(setup)
    is_its_own = config.full_batch_engine != "stream"  # Else the sums are those of another pass.
    if is_its_own:
        known.restore(progress)
    moments = known.moments(heed)
    assert moments
    if is_its_own:
        progress.clear()
        progress.update(known.progress())
    rate = rates.auto_rate(moments, config, l2=_penalty(config, objective))
    say(f"Learning rate: {rate:.6g} = 2 / (lambda_min + lambda_max) of these rows")
    optimizer = optimizers.from_config(config, auto_rate=rate)
    return rate, dataclasses.replace(setup, programs={**setup.programs, "optimizer": optimizer})


def explained(
    error: DivergedError,
    config: TrainConfig,
    objective: Objective,
    setup: Setup,
    state: TrainingState,
    *,
    rate: float,
    heed: Callable[[], bool],
) -> TapedistError:
    """What to raise in place of `error`: with the bound that the rate broke, where the loss has one.

    Args:
        error: what the trainer raised.
        config: the run's settings.
        objective: what was fitted.
        setup: of the run's engines.
        state: after the last good update.
        rate: the learning rate in use.
        heed: asked now and then inside a pass over the rows: False, or raises to break it off.

    Raises:
        InputError: if squares of the rows overflow.
    """
    if state.step == 0 and np.isnan(state.first_loss) and objective.is_linear:
        return _overflow(config)
    if not (objective.is_linear and objective.is_squared) or objective.source.num_rows("train") == 0:
        return error
    moments = None if objective.moments_obstacle(config) else engines.moments(setup).moments(heed)
    l2 = _penalty(config, objective)
    return rates.explained(error, config, moments=moments, source=setup.source, rate=rate, l2=l2)


def _penalty(config: TrainConfig, objective: Objective) -> np.ndarray:
    """Of `--l2` on each weight `[d]`, in the units that training sees."""
    return config.l2 * objective.model.penalized[: objective.source.num_features]


def _overflow(config: TrainConfig) -> InputError:
    """Why a linear model's first loss is not finite: no step was taken, so it is the rows."""
    fixes = [] if config.standardizes else ["--standardize"]
    fixes += ["--dtype=float64"] if config.dtype == "float32" else []
    return InputError(
        f"--data={shown(config.data)}: the loss overflows {config.dtype} before the first update; "
        f"use {' or '.join([*fixes, 'smaller units'])}"
    )
