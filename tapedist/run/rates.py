"""Learning rates from the rows: what `--learning_rate=auto` stands for, and what to say when a run diverged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tapedist.config import TrainConfig
from tapedist.data.orders import BlockPlan, Source
from tapedist.errors import DivergedError, InputError
from tapedist.regression.curvature import Curvature, curvature, power_iteration
from tapedist.training.moments import Moments

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


def explained(
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

    def blocks() -> Iterator[tuple[np.ndarray, ...]]:
        for first in range(0, rows, size):
            taken = source.take("train", tf.range(first, min(first + size, rows), dtype=tf.int64))
            yield tuple(column.numpy().astype(np.float64) for column in taken)

    return power_iteration(blocks, num_features=source.num_features, fit_intercept=config.fit_intercept, l2=l2)
