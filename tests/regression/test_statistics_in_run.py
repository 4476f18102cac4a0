"""What a run says about its optimum, and the rules that end it early."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import own_tables
import pytest

from tapedist.config import TrainConfig
from tapedist.data.array_source import ArraySource
from tapedist.errors import InputError
from tapedist.run.train import train


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_tables.write_npz(tmp_path_factory.mktemp("tables") / "t.npz", own_tables.columns())


def job(table: Path, **settings: Any) -> TrainConfig:
    base = {
        "target": "price",
        "features": own_tables.NAMES[:3],
        "learning_rate": 0.1,
        "num_epochs": 400,
        "plots": False,
    }
    return TrainConfig(data=table, **{**base, **settings})


@pytest.mark.parametrize("mode", ["full_batch", "mini_batch"])
def test_the_optimum_is_the_training_rows_own(table: Path, mode: str):
    sm = pytest.importorskip("statsmodels.api")
    result = train(job(table, mode=mode, num_epochs=10, test_fraction=0))
    columns = own_tables.columns()
    x = np.stack([columns[name] for name in own_tables.NAMES[:3]], axis=1)
    oracle = sm.OLS(columns["price"], sm.add_constant(x, prepend=False)).fit()
    assert result.statistics
    fit = result.statistics.fit
    np.testing.assert_allclose([c.optimum for c in fit.coefficients], oracle.params, rtol=1e-9)
    np.testing.assert_allclose([c.standard_error for c in fit.coefficients], oracle.bse, rtol=1e-9)
    np.testing.assert_allclose([c.p for c in fit.coefficients], oracle.pvalues, rtol=1e-8, atol=1e-300)
    np.testing.assert_allclose(fit.r2, oracle.rsquared, rtol=1e-12)
    gaps = np.abs(result.parameters - oracle.params) / oracle.bse
    np.testing.assert_allclose(result.statistics.learned.standard_errors, gaps, rtol=1e-6)


def test_synthetic_rows_know_the_truth():
    result = train(TrainConfig(num_epochs=5, m=(1, 2), num_features=2, c=3, n_samples=1000))
    assert result.statistics
    assert result.statistics.truth
    assert all(gap is not None and abs(gap) < 5 for gap in result.statistics.truth)
    assert any("truth off by" in line for line in result.lines())


def test_kept_in_the_run_folder_without_nan(table: Path, tmp_path: Path):
    folder = tmp_path / "run"
    result = train(job(table, run_dir=folder, num_epochs=5))
    content = json.loads((folder / "model.json").read_text(), parse_constant=pytest.fail)
    assert content["digest"] == result.digest
    assert content["statistics"]["coefficients"][0]["name"] == "area"
    assert content["statistics"]["learned"]["max_standard_errors"] > 0


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        ("a,b,y\n1,2,1\n2,4,3\n3,6,2\n4,8,5\n", {}, "linear combination"),
        ("a,y\n5,1\n5,2\n5,4\n", {}, "Left out, with weight 0: a does not vary"),
        ("a,b,y\n1,5,1\n2,3,2\n", {}, "b is one too many: 2 rows determine no more parameters"),
        ("a,y\n1,2\n2,2\n3,2\n", {}, "R2 undefined"),
        ("a,y\n1,2\n", {}, "1 row,"),
    ],
    ids=["collinear", "all x equal", "few rows", "all y equal", "one row"],
)
def test_trains_and_says_what_is_undefined(tmp_path: Path, rows: str, settings: dict[str, Any], says: str):
    (tmp_path / "t.csv").write_text(rows)
    folder = tmp_path / "run"
    config = TrainConfig(
        data=tmp_path / "t.csv", target="y", test_fraction=0, learning_rate=0.1, num_epochs=300, run_dir=folder,
        plots=True,
    )  # fmt: skip
    result = train(config)
    assert result.train_loss is not None
    assert np.isfinite(result.train_loss)
    assert says in " ".join(result.lines())
    json.loads((folder / "model.json").read_text(), parse_constant=pytest.fail)
    assert "NaN" not in (folder / "report.html").read_text()


def test_not_asked_for_or_without_meaning(table: Path):
    assert train(job(table, statistics=False, num_epochs=2)).statistics is None
    assert train(job(table, loss="huber", num_epochs=2)).statistics is None


@pytest.mark.parametrize("settings", [{}, {"full_batch_engine": "stream"}])
def test_stops_near_the_optimum(table: Path, settings: dict[str, Any]):
    result = train(job(table, stop_at_se=0.01, **settings))
    assert "standard errors of the optimum" in result.stopped
    assert 0 < result.epochs < 400
    assert result.epochs % 10 == 0
    assert result.statistics
    assert result.statistics.learned.max_standard_errors <= 0.01
    earlier = train(job(table, num_epochs=result.epochs - 10, **settings))
    assert earlier.statistics
    assert earlier.statistics.learned.max_standard_errors > 0.01


def test_stops_where_the_gradient_is_small(table: Path):
    results = [
        train(job(table, early_stop_gradient_norm=1e-3, dtype="float64", full_batch_engine=engine, statistics=False))
        for engine in ("stream", "moments")
    ]
    assert all("the norm of the gradient is" in result.stopped for result in results)
    assert results[0].epochs == results[1].epochs < 400


def test_stops_when_the_test_loss_is_stale_and_stays_stopped(table: Path, tmp_path: Path):
    folder = tmp_path / "run"
    config = job(table, early_stop_patience=2, early_stop_every_epochs=3, run_dir=folder, dtype="float64")
    first = train(config)
    assert "the test loss has not been below" in first.stopped
    assert first.epochs % 3 == 0
    again = train(config)
    assert (again.digest, again.epochs, again.stopped) == (first.digest, first.epochs, first.stopped)
    assert json.loads((folder / "done.json").read_text())["stopped"] == first.stopped
    # What is left after a kill between the last checkpoint and the mark of success.
    (folder / "done.json").unlink()
    resumed = train(config)
    assert (resumed.digest, resumed.epochs) == (first.digest, first.epochs)
    assert resumed.stopped == first.stopped


def test_warm_start(table: Path, tmp_path: Path):
    first = train(job(table, run_dir=tmp_path / "first", num_epochs=50, dtype="float64"))
    none = train(job(table, init_from=tmp_path / "first", num_epochs=0, dtype="float64"))
    np.testing.assert_allclose(none.parameters, first.parameters, rtol=1e-9)
    raw = train(job(table, init_from=tmp_path / "first", num_epochs=0, standardize=False))
    assert raw.digest == first.digest
    with pytest.raises(
        InputError, match=r"--init_from=.*: must have the features area,rooms, but it has area,rooms,age"
    ):
        train(job(table, init_from=tmp_path / "first", features=("area", "rooms")))
    with pytest.raises(InputError, match=r"--init_from=.*: has a bias"):
        train(job(table, init_from=tmp_path / "first", fit_intercept=False))
    with pytest.raises(InputError, match=r"--init_from: .*is no run folder"):
        train(job(table, init_from=tmp_path / "nothing"))


def test_arrays_have_the_statistics_of_their_own_numbers(monkeypatch: pytest.MonkeyPatch):
    """Not of what float32 makes of them, however many rows there are."""
    monkeypatch.setattr("tapedist.regression.summary._AFFORDABLE", 0.0)
    random = np.random.default_rng(0)
    x = 1000 + 1e-3 * random.standard_normal((3000, 3))
    y = (x - 1000) @ [1.0, 2.0, 3.0] + 1e-4 * random.standard_normal(3000)
    columns = np.column_stack([x - 1000, np.ones(3000)])
    best, (squares,), *_ = np.linalg.lstsq(columns, y, rcond=None)
    result = train(
        TrainConfig(num_epochs=1, statistics=True, learning_rate=1e-9, full_batch_engine="moments"),
        source=ArraySource(x, y),
    )
    assert result.statistics
    np.testing.assert_allclose(result.statistics.fit.weights, best[:3], rtol=1e-6)
    assert result.statistics.fit.residual_std == pytest.approx(np.sqrt(squares / 2996), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_epochs": 2}, r"training ended \d+ standard errors .* --learning_rate=auto or more"),
        ({"num_epochs": 2, "mode": "mini_batch", "learning_rate": 1e-6}, r"training ended .*=auto or more"),
        ({"num_epochs": 2, "loss": "huber"}, r"the loss fell by no more than 0\.\d%.*the target keeps its units"),
        ({"loss": "absolute", "learning_rate": 3000.0}, ""),
        ({"l2": 1e-7}, ""),  # Not even at its own optimum is it near that of least squares.
        ({"num_epochs": 0}, ""),
        ({}, ""),
    ],
)
def test_says_when_training_came_to_little(
    table: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], words: str
):
    train(job(table, **settings), quiet=False)
    notices = [line for line in capsys.readouterr().out.splitlines() if "training ended" in line or "loss fell" in line]
    assert len(notices) == bool(words)
    assert not words or re.search(words, notices[0])
