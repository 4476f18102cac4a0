"""The defaults finish: without a setting beside the table and its target, what is learned is the optimum."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from conftest import Finished
from real_tables import TABLES, Reference
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import tapedist
from tapedist.errors import FitWarning, InputError
from tapedist.sklearn import TapeRegressor


def _arrays(name: str) -> tuple[pd.DataFrame, pd.Series]:
    table, target = TABLES[name]()
    return table.drop(columns=target), table[target]


def _train(x: Any, y: Any, **settings: Any) -> tapedist.TrainResult:
    return tapedist.train(tapedist.TrainConfig(**settings), source=tapedist.ArraySource(x, y))


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_line_learns_the_optimum_of_its_training_rows(
    name: str, tmp_path: Path, tapedist_command: Callable[..., Finished]
):
    table, target = TABLES[name]()
    table.to_csv(tmp_path / "t.csv", index=False)
    run = tapedist_command("train", "--data=t.csv", f"--target={target}", "--run_dir=r", "--plots=false", warm=True)
    assert run.code == 0, run.err
    import json

    from tapedist.data.tables.table import open_table

    rows = open_table(str(tmp_path / "t.csv"), target=target)
    x, y = rows.rows("train", range(rows.num_rows("train")))
    model, reference = json.loads((tmp_path / "r" / "model.json").read_text()), Reference(x, y)
    assert reference.distance(np.array(model["parameters"])) <= 0.01
    # The optimum that the table shows is that of statsmodels on the same rows, to eight digits.
    kept = [j for j in range(x.shape[1]) if j not in reference.left_out]
    scale = np.abs(x[:, kept]).max(axis=0)
    fit = sm.OLS(y, sm.add_constant(x[:, kept] / scale)).fit()
    shown = [model["statistics"]["coefficients"][j] for j in [*kept, x.shape[1]]]
    optimum = np.append(fit.params[1:] / scale, fit.params[0])
    np.testing.assert_allclose([entry["optimum"] for entry in shown], optimum, rtol=1e-8)
    errors = np.append(fit.bse[1:] / scale, fit.bse[0])
    np.testing.assert_allclose([entry["standard_error"] for entry in shown], errors, rtol=1e-8)
    for j in reference.left_out:
        entry = model["statistics"]["coefficients"][j]
        assert (entry["learned"], entry["standard_error"]) == (0.0, None)
        assert f"{rows.feature_names[j]} " in run.out


@pytest.mark.parametrize("name", ["fair", "diabetes", "departures"])
@pytest.mark.parametrize("rows", ["frame", "arrays", "estimator"])
def test_arrays_frames_and_the_estimator_learn_it_too(name: str, rows: str):
    x, y = _arrays(name)
    reference = Reference(x.to_numpy(np.float64), y.to_numpy(np.float64))
    if rows == "estimator":
        model = TapeRegressor().fit(x, y)
        found = np.append(model.coef_, model.intercept_)
    else:
        result = _train(x, y) if rows == "frame" else _train(x.to_numpy(np.float64), y.to_numpy(np.float64))
        assert result.stopped
        found = result.parameters
    assert reference.distance(found) <= 0.01


def test_features_that_are_left_out_are_a_warning_where_no_table_names_them():
    x, y = _arrays("departures")
    with pytest.warns(FitWarning, match="year does not vary; minute is a linear combination of hour, time"):
        TapeRegressor().fit(x, y)


@pytest.mark.parametrize("name", ["fair", "diabetes", "departures"])
def test_huber_reaches_its_own_minimiser(name: str):
    x, y = _arrays(name)
    result = _train(x, y, loss="huber")
    assert "standard errors of the optimum" in result.stopped
    reference = Reference(x.to_numpy(np.float64), y.to_numpy(np.float64), huber_delta=1.0)
    assert reference.distance(result.parameters) <= 0.01
    assert not result.advice


@pytest.mark.parametrize("name", ["fair", "diabetes", "departures"])
def test_mini_batches_end_within_a_standard_error(name: str):
    x, y = _arrays(name)
    result = _train(x, y, mode="mini_batch", batch_size=128)
    distance = Reference(x.to_numpy(np.float64), y.to_numpy(np.float64)).distance(result.parameters)
    assert distance <= 1
    assert bool(result.advice) == (distance > 0.5)


def test_heavy_rows_do_not_make_mini_batches_diverge():
    """A row of leverage 1 is in one batch of a hundred: the rate must fit that one."""
    random = np.random.default_rng(0)
    x = random.normal(size=(5000, 3))
    x[17, 1] = 5000.0
    y = x @ [1.0, 2.0, 3.0] + random.normal(size=5000)
    result = _train(x, y, mode="mini_batch", batch_size=50)
    assert Reference(x, y).distance(result.parameters) <= 1


def test_no_seed_changes_the_answer_without_a_test_split(tmp_path: Path):
    table, target = TABLES["departures"]()
    table.to_csv(tmp_path / "t.csv", index=False)
    config = {"data": tmp_path / "t.csv", "target": target, "test_fraction": 0, "plots": False}
    digests = {tapedist.train(tapedist.TrainConfig(seed=seed, **config)).digest for seed in range(3)}
    assert len(digests) == 1


def test_a_penalty_is_followed_to_its_own_optimum():
    x, y = _arrays("diabetes")
    z = ((x - x.mean()) / x.std(ddof=0)).to_numpy()
    penalty = 0.3
    result = _train(z, y.to_numpy(), l2=penalty)
    centred = y.to_numpy() - y.mean()
    ridge = np.linalg.solve(z.T @ z / len(z) + penalty * np.eye(10), z.T @ centred / len(z))
    np.testing.assert_allclose(result.weights, ridge, atol=0.01 * Reference(z, y.to_numpy()).errors[:10].min())
    assert result.stopped
    assert not result.advice


FORMER = {
    "l2": {"l2": 0.01},
    "huber": {"loss": "huber"},
    "absolute": {"loss": "absolute"},
    "adam": {"optimizer": "adam"},
    "momentum": {"optimizer": "momentum"},
    "no statistics": {"statistics": "false"},
    "stream": {"full_batch_engine": "stream"},
    "raw units": {"standardize": False},
    "no intercept": {"fit_intercept": False},
    "mini batch with adam": {"mode": "mini_batch", "optimizer": "adam"},
    "mini batch with huber": {"mode": "mini_batch", "loss": "huber"},
    "a given rate": {"learning_rate": 0.05},
    "early stop": {"early_stop_gradient_norm": 1e-3},
    "float64": {"dtype": "float64"},
}


@pytest.mark.parametrize("settings", FORMER.values(), ids=FORMER)
def test_no_default_refuses_a_command_of_before(settings: dict[str, Any], tmp_path: Path):
    table, target = TABLES["longley"]()
    table[["GNP", "UNEMP", target]].to_csv(tmp_path / "t.csv", index=False)
    data = {"data": tmp_path / "t.csv", "target": target, "plots": False, "num_epochs": 30}
    result = tapedist.train(tapedist.TrainConfig(**data, **settings))
    assert np.isfinite(result.parameters).all()


def test_custom_modules_and_losses_keep_the_settings_of_the_tutorial():
    import tensorflow as tf

    class Line(tf.Module):
        def __init__(self):
            self.w = tf.Variable([0.0, 0.0])

        def __call__(self, x):
            return tf.reduce_sum(x * self.w, 1)

    x = np.random.default_rng(0).normal(size=(200, 2))
    rows = tapedist.ArraySource(x, x @ [1.0, 2.0])
    assert tapedist.train(tapedist.TrainConfig(), model=Line, source=rows).epochs == 3000
    own = tapedist.train(tapedist.TrainConfig(), loss=lambda y_hat, y: tf.square(y_hat - y), source=rows)
    assert own.epochs == 3000


def test_wide_rows_are_trained_with_a_stable_rate():
    """513 features have no moments: the rate is found by iteration, and epochs end the run."""
    random = np.random.default_rng(1)
    x = random.normal(size=(2000, 513))
    y = x[:, 0] + random.normal(size=2000)
    with pytest.warns(FitWarning, match="513 features are too many"):
        result = _train(x, y, num_epochs=20)
    assert result.train_loss < 0.9 * y.var()


def test_far_from_the_optimum_is_said_with_what_helps():
    x, y = _arrays("fair")
    with pytest.warns(FitWarning, match=r"ended \d+(\.\d+)? standard errors from the optimum, its loss .* above the l"):
        result = _train(x, y, optimizer="adam", num_epochs=20)
    assert "--optimizer=sgd --learning_rate=auto" in result.advice[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _train(x, y, optimizer="sgd", learning_rate="auto").advice


def test_a_rate_that_is_given_behaves_as_before():
    x, y = _arrays("fair")
    result = _train(x, y, learning_rate=0.05)
    assert (result.epochs, result.stopped) == (3000, "")


@pytest.mark.parametrize(
    ("scale", "dtype", "fix"),
    [
        (1e-30, "float32", {"dtype": "float64"}),
        (1e-160, "float64", {"times": 1e160}),
        (1e25, "float32", {"times": 1e-25}),
    ],
)
def test_a_target_out_of_range_is_refused_with_a_fix_that_works(scale: float, dtype: str, fix: dict[str, Any]):
    x = np.random.default_rng(0).normal(size=(50, 2))
    y = (x @ [2.0, -3.0] + 1) * scale
    with pytest.raises(InputError, match=r"target y: varies by .*; use .*units") as error:
        _train(x, y, dtype=dtype)
    assert ("--dtype=float64" in str(error.value)) == (dtype == "float32")
    found = _train(x, y * fix.pop("times", 1.0), **{"dtype": dtype, **fix})
    np.testing.assert_allclose(found.weights / found.weights[0], [1.0, -1.5], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-250, 1e-40, 1.0, 1e40, 1e250])
@pytest.mark.parametrize("standardize", ["auto", "false"])
def test_weights_count_in_proportion_only(scale: float, standardize: str):
    random = np.random.default_rng(5)
    x, w = random.normal(size=(60, 2)), random.integers(0, 4, 60).astype(float)
    y = x @ [2.0, -3.0] + 1 + 0.1 * random.normal(size=60)
    x[w == 0], y[w == 0] = 1e30, -9e36  # What weighs nothing may hold anything.
    rows = tapedist.ArraySource(x, y, w * scale)
    result = tapedist.train(tapedist.TrainConfig(standardize=standardize, learning_rate="auto"), source=rows)
    expected = sm.WLS(y[w > 0], sm.add_constant(x[w > 0]), weights=w[w > 0]).fit().params
    np.testing.assert_allclose([result.bias, *result.weights], expected, rtol=1e-5)


def test_the_estimator_in_a_pipeline_needs_no_setting():
    x, y = _arrays("diabetes")
    model = make_pipeline(StandardScaler(), TapeRegressor()).fit(x, y)
    assert model.score(x, y) == pytest.approx(0.51775, abs=1e-5)  # LinearRegression's.
