"""Learning rates from the rows: auto, and the bound that a diverged run is told."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tapedist
from tapedist.errors import DivergedError, InputError
from tapedist.regression.curvature import power_iteration

SMALL = {"n_samples": 2000, "num_epochs": 40, "plots": False}


def _rows_hessian(num_features: int) -> np.ndarray:
    """The Hessian of the training rows, computed here from the rows themselves."""
    import tensorflow as tf

    from tapedist.data.catalog import open_source

    config = tapedist.TrainConfig(**SMALL, num_features=num_features)
    source = open_source(config)
    x = source.take("train", tf.range(source.num_rows("train"), dtype=tf.int64))[0].numpy().astype(np.float64)
    design = np.hstack([x, np.ones([len(x), 1])])
    return 2 * design.T @ design / len(x)


@pytest.mark.parametrize("num_features", [1, 3])
def test_auto_is_two_over_the_sum_of_the_extreme_curvatures(num_features: int) -> None:
    result = tapedist.train(tapedist.TrainConfig(**SMALL, num_features=num_features, learning_rate="auto"))
    values = np.linalg.eigvalsh(_rows_hessian(num_features))
    same = tapedist.train(
        tapedist.TrainConfig(**SMALL, num_features=num_features, learning_rate=2 / (values[0] + values[-1]))
    )
    np.testing.assert_allclose(result.parameters, same.parameters, rtol=1e-7)
    np.testing.assert_allclose(result.weights, 9, atol=0.2)


def test_auto_is_one_rate_whatever_engine_takes_it() -> None:
    config = {**SMALL, "learning_rate": "auto", "num_epochs": 3}
    streamed = tapedist.train(tapedist.TrainConfig(**config, full_batch_engine="stream"))
    known = tapedist.train(tapedist.TrainConfig(**config, full_batch_engine="moments"))
    np.testing.assert_allclose(streamed.parameters, known.parameters, rtol=1e-5)


@pytest.mark.parametrize(("optimizer", "factor"), [("sgd", 2.0), ("momentum", 3.8), ("nesterov", 3.8 / 2.8)])
def test_the_bound_in_the_message_separates_converging_from_diverging(optimizer: str, factor: float) -> None:
    bound = factor / np.linalg.eigvalsh(_rows_hessian(1))[-1]
    with pytest.raises(DivergedError, match="stable bound") as error:
        tapedist.train(tapedist.TrainConfig(**SMALL, optimizer=optimizer, learning_rate=100 * bound))
    told = float(re.search(r"stable bound ([0-9.e+-]+)", str(error.value))[1])
    assert told == pytest.approx(bound, rel=1e-5)
    below = tapedist.TrainConfig(**{**SMALL, "num_epochs": 3000}, optimizer=optimizer, learning_rate=0.98 * bound)
    above = tapedist.TrainConfig(**{**SMALL, "num_epochs": 3000}, optimizer=optimizer, learning_rate=1.02 * bound)
    assert tapedist.train(below).train_loss < 2
    with pytest.raises(DivergedError):
        tapedist.train(above)


@pytest.mark.parametrize(
    "other",
    [{"optimizer": "momentum"}, {"optimizer": "adam"}, {"loss": "absolute"}],
    ids=lambda other: next(iter(other)),
)
def test_auto_is_refused_where_it_is_unknown(other: dict[str, str]) -> None:
    with pytest.raises(InputError, match=f"--learning_rate=auto.*--{next(iter(other))}"):
        tapedist.TrainConfig(learning_rate="auto", **other)


def test_power_iteration_finds_the_largest_curvature() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 5)) * [1, 2, 3, 4, 20]
    w = rng.uniform(0.5, 2, size=500)
    design = np.hstack([x, np.ones([500, 1])])
    hessian = 2 * design.T @ (w[:, None] * design) / w.sum() + 0.6 * np.diag([1.0] * 5 + [0.0])

    def blocks() -> list[tuple[np.ndarray, ...]]:
        return [(x[:200], x[:200, 0], w[:200]), (x[200:], x[200:, 0], w[200:])]

    found = power_iteration(blocks, num_features=5, l2=0.3)
    assert found == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-6)
