"""Predictions keep their digits where zero is far from all rows, and are the same wherever they are made."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from tapedist import cli
from tapedist.config import TrainConfig
from tapedist.data.array_source import ArraySource
from tapedist.regression.prediction import evaluate_rows, predict_rows
from tapedist.results.result import TrainResult
from tapedist.run.train import train
from tapedist.sklearn import TapeRegressor

MICROSECONDS = 1_700_000_000_000_000
SETTINGS: dict[str, Any] = {
    "learning_rate": "auto", "test_fraction": 0.0, "dtype": "float64", "num_epochs": 300, "stop_at_se": 0.0,
    "standardize": "true", "init": "zeros",
}  # fmt: skip


def far_rows(start: int, step: int, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """`(x, y)`: integers far from 0, one per row, and a target that follows their differences."""
    random = np.random.default_rng(7)
    x = start + step * np.arange(n)
    return x, np.arange(n) + np.round(0.3 * random.normal(size=n), 3)


def exact_line(x: np.ndarray, y: np.ndarray) -> list[Fraction]:
    """Fitted values of the least-squares line, exact: integers and decimals as fractions."""
    xs, ys = [Fraction(int(v)) for v in x], [Fraction(v) for v in y.tolist()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(xs, ys, strict=True)) / sum((a - mean_x) ** 2 for a in xs)
    return [mean_y + slope * (a - mean_x) for a in xs]


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run on times in microseconds: its raw intercept, -1.7e15, has digits down to 0.25."""
    folder = tmp_path_factory.mktemp("far")
    x, y = far_rows(MICROSECONDS, 1)
    lines = [f"{time},{level}" for time, level in zip(x.tolist(), y.tolist(), strict=True)]
    (folder / "sensor.csv").write_text("\n".join(["t_us,level", *lines]) + "\n")
    return train(
        TrainConfig(data=folder / "sensor.csv", target="level", run_dir=folder / "run", **SETTINGS), quiet=True
    )


def test_predictions_far_from_zero_are_exact(far: TrainResult):
    x, y = far_rows(MICROSECONDS, 1)
    assert abs(far.bias) > 1e15
    wanted = np.array([float(value) for value in exact_line(x, y)])
    np.testing.assert_allclose(far.predict(x[:, np.newaxis]), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("start", "step"), [(MICROSECONDS, 1), (-MICROSECONDS, 1000), (20_240_101, 1), (10**12, 1), (2**52, 3)]
)
def test_everything_that_predicts_has_one_set_of_bits(start: int, step: int, tmp_path: Path):
    import tensorflow as tf

    x, y = far_rows(start, step)
    rows = np.stack([x, np.sin(np.arange(len(x))) - 1e9], axis=1)
    np.savez(tmp_path / "t.npz", a=rows[:, 0], b=rows[:, 1], level=y)
    run, table = tmp_path / "run", tmp_path / "t.npz"
    result = train(TrainConfig(data=table, target="level", run_dir=run, plots=False, **SETTINGS))
    expected = result.predict(rows)
    oracle = np.linalg.lstsq(np.c_[rows - rows.mean(axis=0), np.ones(len(x))], y, rcond=None)[0]
    wanted = (rows - rows.mean(axis=0)) @ oracle[:2] + oracle[2]
    np.testing.assert_allclose(expected, wanted, rtol=0, atol=1e-6)

    assert np.array_equal(np.concatenate([result.predict(rows[i : i + 1]) for i in range(20)]), expected[:20])
    assert np.array_equal(pickle.loads(pickle.dumps(result)).predict(rows), expected)
    for name in ("p.csv", "p.parquet"):
        assert cli.main(["predict", f"--run_dir={run}", f"--data={table}", f"--output={tmp_path / name}"]) == 0
    assert np.array_equal(parquet.read_table(tmp_path / "p.parquet")["prediction"].to_numpy(), expected)
    with open(tmp_path / "p.csv") as file:
        assert [float(row["prediction"]) for row in csv.DictReader(file)] == expected.tolist()
    assert cli.main(["export", f"--run_dir={run}"]) == 0
    loaded = tf.saved_model.load(str(run / "export" / "1"))
    assert np.array_equal(loaded.signatures["serving_default"](x=tf.constant(rows))["prediction"], expected)


def test_one_loss_in_training_evaluation_and_report(far: TrainResult, capsys: pytest.CaptureFixture[str]):
    x, y = far_rows(MICROSECONDS, 1)
    residuals = [Fraction(a) - b for a, b in zip(y.tolist(), exact_line(x, y), strict=True)]
    mse = float(sum(r * r for r in residuals) / len(residuals))
    mae = float(sum(map(abs, residuals)) / len(residuals))
    assert far.run_dir
    assert cli.main(["evaluate", f"--run_dir={far.run_dir}"]) == 0
    assert f"train: 300 rows, MSE {mse:.6g}, RMSE {mse**0.5:.6g}, MAE {mae:.6g}," in capsys.readouterr().out
    assert far.train_loss == pytest.approx(mse, rel=1e-9)
    assert far.statistics
    assert far.statistics.mae == pytest.approx(mae, rel=1e-9)
    # How far the learned loss lies above the smallest one: nothing that the raw intercept's rounding could hide.
    assert far.statistics.learned.excess_loss == pytest.approx(0, abs=1e-12)
    assert f"{mae:.4g}" in (far.run_dir / "report.html").read_text()


def test_intervals_lie_about_the_predictions(far: TrainResult, tmp_path: Path):
    """With a residual deviation that the fit knows: a start that leaves digits for it."""
    sm = pytest.importorskip("statsmodels.api")
    x, y = far_rows(10**12, 1000)
    np.savez(tmp_path / "t.npz", t=x, level=y)
    run, table, output = tmp_path / "run", tmp_path / "t.npz", tmp_path / "p.parquet"
    train(TrainConfig(data=table, target="level", run_dir=run, plots=False, **SETTINGS))
    words = [f"--run_dir={run}", f"--data={table}", f"--output={output}", "--interval"]
    assert cli.main(["predict", *words]) == 0
    found = parquet.read_table(output).to_pydict()
    centred = sm.add_constant((x - x.mean())[:, np.newaxis])
    wanted = sm.OLS(y, centred).fit().get_prediction(centred).conf_int(obs=True, alpha=0.05)
    np.testing.assert_allclose(np.stack([found["low"], found["high"]], axis=1), wanted, rtol=1e-6, atol=1e-6)


def test_sklearn_predicts_from_the_center():
    x, y = far_rows(MICROSECONDS, 1)
    settings = {"learning_rate": "auto", "num_epochs": 300, "config": {"standardize": "true"}}
    model = TapeRegressor(**settings).fit(x[:, np.newaxis].astype(float), y)
    wanted = [float(value) for value in exact_line(x, y)]
    np.testing.assert_allclose(model.predict(x[:, np.newaxis]), wanted, rtol=0, atol=1e-9)
    # Who sets other coefficients means those.
    model.coef_, model.intercept_ = np.array([2.0]), 1.0
    assert model.predict([[3.0]]).tolist() == [7.0]


def test_raw_units_keep_their_bits():
    random = np.random.default_rng(3)
    x, weights = random.normal(size=(50, 3)), random.normal(size=3)
    plain = ((x[:, 0] * weights[0] + x[:, 1] * weights[1]) + x[:, 2] * weights[2]) + 0.7
    for center in (None, np.zeros(3)):
        assert np.array_equal(predict_rows(x, weights, 0.7, center), plain)
    blocks = [(x, plain + 1, None)]
    metrics = evaluate_rows(blocks, weights, 0.7)
    assert metrics
    assert metrics.mse == pytest.approx(1)
    source = ArraySource(x, plain)
    result = train(TrainConfig(**{**SETTINGS, "standardize": "false", "num_epochs": 3}), source=source)
    w = result.weights
    assert np.array_equal(result.predict(x), ((x[:, 0] * w[0] + x[:, 1] * w[1]) + x[:, 2] * w[2]) + result.bias)


def _without_center(content: dict[str, Any]) -> None:
    del content["center"], content["bias_at_center"]


def test_a_model_file_of_0_1_is_still_read(far: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It predicts what it predicted then, from its weights and its bias."""
    from tapedist.storage.model_file import read_model

    assert far.run_dir
    content = json.loads((far.run_dir / "model.json").read_text())
    _without_center(content)
    (tmp_path / "model.json").write_text(json.dumps(content))
    model = read_model(tmp_path / "model.json", run_dir=tmp_path)
    x = np.array([[float(MICROSECONDS)]])
    assert model.predict(x).tolist() == [x[0, 0] * far.weights[0] + far.bias]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.update(center=[0.0]),
        lambda content: content.update(center=[content["center"][0] + 1]),
        lambda content: content.update(center=[*content["center"], 0.0]),
        lambda content: content.update(center=7.0),
        lambda content: content.update(center=None),
        lambda content: content.update(center=["a"]),
        lambda content: content.update(bias_at_center=content["bias_at_center"] + 1),
        lambda content: content.update(bias_at_center=1e400),
        lambda content: content.update(bias_at_center=None),
        lambda content: content.pop("center"),
        lambda content: content.pop("bias_at_center"),
    ],
)
def test_a_center_that_cannot_be_trusted(spoil: Callable[[dict[str, Any]], None], far: TrainResult, tmp_path: Path):
    from tapedist.errors import StateError
    from tapedist.storage.model_file import read_model

    assert far.run_dir
    content = json.loads((far.run_dir / "model.json").read_text())
    spoil(content)
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(StateError, match="restore it, or train again"):
        read_model(tmp_path / "model.json", run_dir=tmp_path)


def test_without_an_intercept_nothing_is_shifted(tmp_path: Path):
    x, y = far_rows(10**6, 7)
    source = ArraySource(x[:, np.newaxis].astype(float), y)
    config = TrainConfig(fit_intercept=False, run_dir=tmp_path / "run", plots=False, **SETTINGS)
    result = train(config, source=source)
    assert result.bias == result.bias_at_center == 0
    assert np.array_equal(result.predict(x[:, np.newaxis]), x * result.weights[0])
    content = json.loads((tmp_path / "run" / "model.json").read_text())
    assert (content["center"], content["bias_at_center"]) == ([0.0], 0.0)
