"""`train` as a library: what it returns, raises, restores, and what a user may bring."""

from __future__ import annotations

import concurrent.futures
import functools
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from sample_sources import Logarithm, TwoLayers, curve, quartic

from tapedist import times
from tapedist.config import TrainConfig
from tapedist.data.array_source import ArraySource
from tapedist.errors import DivergedError, InputError, StateError
from tapedist.run.train import train

OWN_ROWS: dict[str, Any] = {"num_epochs": 5, "learning_rate": 0.05, "strategy": "default"}
SMALL: dict[str, Any] = {"n_samples": 500, **OWN_ROWS}


class Rowwise:
    """A model that is no `tf.Module`."""

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return x[:, 0]


@pytest.fixture(scope="module", autouse=True)
def _started() -> None:
    """TensorFlow has been imported and used before, as in a user's program."""
    assert int(tf.constant(1) + 1) == 2


def test_handlers_are_restored_whatever_happens():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(TrainConfig(**SMALL))
    with pytest.raises(DivergedError):
        train(TrainConfig(**{**SMALL, "learning_rate": 1e6, "num_epochs": 100, "full_batch_engine": "stream"}))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_it_works_outside_the_main_thread():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = pool.submit(train, TrainConfig(**SMALL)).result()
    assert found.digest == train(TrainConfig(**SMALL)).digest


def test_no_epochs_evaluate_the_initial_parameters():
    result = train(TrainConfig(**{**SMALL, "num_epochs": 0, "init": "zeros"}))
    assert (result.steps, result.epochs, result.weights.tolist(), result.bias) == (0, 0, [0.0], 0.0)
    assert result.train_loss == pytest.approx(9**2 + 2**2 + 1, rel=0.2)
    assert result.test_loss == pytest.approx(9**2 + 2**2 + 1, rel=0.4)


def test_notices_are_warnings_where_nothing_is_printed(capsys: pytest.CaptureFixture[str]):
    source = ArraySource(np.arange(9.0)[:, np.newaxis], np.arange(9.0))
    config = TrainConfig(num_epochs=1, test_fraction=0.5, momentum=0.5, plots=False)
    with pytest.warns(UserWarning, match="no effect") as caught:
        train(config, source=source)
    said = [str(warning.message) for warning in caught]
    assert said == [
        "no effect with rows from a source of your own: --test_fraction=0.5; "
        "ArraySource(..., test_rows=N) holds rows out",
        "no effect with --optimizer=sgd: --momentum=0.5",
    ]
    assert {warning.filename for warning in caught} == {__file__}  # They point at the call.
    assert capsys.readouterr().out == ""
    train(config, source=source, quiet=False)
    assert [line for line in capsys.readouterr().out.splitlines() if "no effect" in line] == [
        f"Notice: {sentence}" for sentence in said
    ]


def test_a_batch_larger_than_the_rows_is_noticed(capsys: pytest.CaptureFixture[str]):
    result = train(TrainConfig(**SMALL, mode="mini_batch", batch_size=5000), quiet=False)
    assert result.steps == 5
    assert "Notice: --batch_size=5000 is above the 400 training rows" in capsys.readouterr().out


@pytest.mark.parametrize(("d", "fit_intercept"), [(128, False), (65, True)])
def test_a_custom_loss_on_many_features(d: int, fit_intercept: bool):
    """Features are summed in groups of 64; without an intercept the last group may be empty."""
    x = np.random.default_rng(d).integers(-8, 9, size=(200, d)).astype(float)
    y = x.sum(axis=1)
    config = TrainConfig(
        num_epochs=1, learning_rate=2.0**-10, standardize="false", fit_intercept=fit_intercept, init="zeros"
    )
    found = train(config, loss=lambda y_hat, y: times(y_hat - y, y_hat - y), source=ArraySource(x, y))
    gradient = -2 * (np.append(x, np.ones([200, fit_intercept * 1]), axis=1) * y[:, np.newaxis]).mean(axis=0)
    np.testing.assert_allclose(found.parameters, -(2.0**-10) * gradient, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": (np.zeros((9, 1)), np.zeros(9))}, "source: is of type tuple.*ArraySource"),
        ({"model": TwoLayers()}, "model: is a TwoLayers, where a function that builds one is needed"),
        ({"model": Rowwise()}, "model: is a Rowwise, where a function that builds one is needed"),
        ({"model": tf.keras.Sequential()}, "model: is a Sequential, where a function that builds one is needed"),
        ({"config": dict(SMALL)}, "config: is of type dict; give a TrainConfig"),
    ],
)
def test_arguments_mixed_up(arguments: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        train(**{"config": TrainConfig(**SMALL), **arguments})


def test_quiet_is_quiet(capfd: pytest.CaptureFixture[str]):
    train(TrainConfig(**SMALL))
    assert capfd.readouterr().out == ""


def test_too_many_devices_touch_nothing(tmp_path: Path):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match="--num_virtual_devices=3"):
        train(TrainConfig(**{**SMALL, "strategy": "mirrored", "num_virtual_devices": 3}, run_dir=str(folder)))
    assert not folder.exists() or not list(folder.glob("[!.]*"))


def test_rows_that_may_be_sorted_are_shuffled_one_by_one(capsys: pytest.CaptureFixture[str]):
    """Only synthetic rows are known to be independent draws."""
    config = {**OWN_ROWS, "mode": "mini_batch", "batch_size": 50}
    auto, rows, batches = (
        train(TrainConfig(**config, shuffle=shuffle), source=curve(501)).digest
        for shuffle in ("auto", "rows", "batches")
    )
    assert auto == rows != batches


def test_an_own_model_is_resumed_by_another_process_but_not_by_another_model(tmp_path: Path):
    def build() -> TwoLayers:
        return TwoLayers()

    config = {**OWN_ROWS, "run_dir": str(tmp_path / "run"), "plots": False}
    train(TrainConfig(**config), model=build, loss=quartic, source=curve(501))
    more = train(TrainConfig(**{**config, "num_epochs": 9}), model=lambda: TwoLayers(), loss=quartic, source=curve(501))
    straight = train(TrainConfig(**{**OWN_ROWS, "num_epochs": 9}), model=TwoLayers, loss=quartic, source=curve(501))
    assert (more.steps, more.digest) == (9, straight.digest)
    with pytest.raises(StateError, match="model"):
        train(TrainConfig(**{**config, "num_epochs": 12}), model=Logarithm, loss=quartic, source=curve(501))


def _power(y_hat: tf.Tensor, y: tf.Tensor, *, exponent: float) -> tf.Tensor:
    return tf.pow(tf.abs(y_hat - y), exponent)


def test_an_own_loss_need_not_have_a_name(tmp_path: Path):
    config = TrainConfig(**SMALL, run_dir=str(tmp_path / "run"), plots=False)
    result = train(config, loss=functools.partial(_power, exponent=1.5))
    assert (result.steps, result.loss) == (5, "partial")


def test_an_own_model_comes_back_trained():
    result = train(TrainConfig(**{**OWN_ROWS, "num_epochs": 200}), model=TwoLayers, loss=quartic, source=curve(501))
    source = curve(501)
    test = slice(source.train, None)
    error = result.model(tf.constant(source.x[test], tf.float32)) - source.y[test]
    assert result.test_loss == pytest.approx(float(np.mean(error**2 + error**4 / 10)), rel=1e-4)
    assert result.train_loss < result.history[0].loss / 2
    assert len(result.weights) == 0


def test_an_own_model_predicts_for_any_kind_of_numbers():
    result = train(TrainConfig(**{**OWN_ROWS, "num_epochs": 1}), model=TwoLayers, source=curve(400))
    x = np.random.default_rng(0).normal(size=(7, 3))
    assert np.array_equal(result.predict(x.astype(np.float32)), result.predict(x.astype(np.float32).astype(np.float64)))
    assert result.predict(x.tolist()).shape == (7,)
    with pytest.raises(InputError, match=r"x: has shape \[3, 2\]; must be \[rows, 3\]"):
        result.predict(np.ones((3, 2)))


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_best_rate_counts_the_penalty_in_the_units_of_training(scale: float):
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 2)) * scale
    y = x @ [3.0, -2.0] / scale + 1 + 0.1 * random.normal(size=500)
    config = TrainConfig(
        num_epochs=8000, learning_rate="auto", l2=0.1, standardize=True, dtype="float64", statistics=False, stop_at_se=0
    )
    result = train(config, source=ArraySource(x, y))
    columns = np.column_stack([x, np.ones(500)])
    best = np.linalg.solve(columns.T @ columns / 500 + np.diag([0.1, 0.1, 0.0]), columns.T @ y / 500)
    np.testing.assert_allclose(result.parameters, best, rtol=1e-4)
