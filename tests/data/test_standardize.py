"""Training on standardized columns: the units, the way back, and raw-unit answers to the same objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import own_tables
import pytest
from conftest import REPO
from sample_sources import ArraySource, TwoLayers

from tapedist.config import TrainConfig
from tapedist.data.source import row_blocks
from tapedist.data.standardize import RawUnits, StandardUnits
from tapedist.errors import InputError
from tapedist.run.train import train


def source(x: Any, y: Any = None, w: Any = None) -> ArraySource:
    x = np.asarray(x, np.float64)
    x = x[:, np.newaxis] if x.ndim == 1 else x
    y = np.arange(len(x), dtype=float) if y is None else np.asarray(y)
    return ArraySource(x, y, None if w is None else np.asarray(w, float), train=len(x))


def test_units_are_weighted_means_and_deviations():
    table = own_tables.columns(70_001)
    x = np.stack([table[name] for name in own_tables.NAMES[:3]], axis=1)
    units = StandardUnits.of(source(x, table["price"], table["times"]), fit_intercept=True)
    mean = np.average(x, axis=0, weights=table["times"])
    np.testing.assert_allclose(units.center, mean, rtol=1e-12)
    np.testing.assert_allclose(
        units.scale, np.sqrt(np.average((x - mean) ** 2, axis=0, weights=table["times"])), rtol=1e-11
    )
    assert units.target_center == pytest.approx(np.average(table["price"], weights=table["times"]), rel=1e-12)
    without = StandardUnits.of(source(x, table["price"]), fit_intercept=False)
    np.testing.assert_allclose(without.scale, np.sqrt((x**2).mean(axis=0)), rtol=1e-11)
    assert not without.center.any()
    assert without.target_center == 0


@pytest.mark.parametrize(
    ("column", "center", "scale"),
    [
        ([0.1] * 9, 0.1, 1.0),  # The mean of equal numbers is that number, and they do not vary.
        (1e9 + np.arange(9) / 1e6, 1e9 + 4e-6, np.std(1e9 + np.arange(9) / 1e6 - 1e9)),
        ([1e200, -1e200], 0.0, 1e200),
        ([1e-200, 3e-200], 2e-200, 1e-200),
        ([0.0, 0.0, 5.0], 5 / 3, np.std([0, 0, 5])),
        ([7.0], 7.0, 1.0),
    ],
)
def test_columns_that_are_hard_to_scale(column: Any, center: float, scale: float):
    units = StandardUnits.of(source(column), fit_intercept=True)
    np.testing.assert_allclose(units.center, [center], rtol=1e-15, atol=1e-300)
    np.testing.assert_allclose(units.scale, [scale], rtol=1e-9)


def test_squares_beyond_float64_are_refused():
    rows = np.ones(70_000)
    rows[-1] = 1e300
    with pytest.raises(InputError, match="column x0: its squares overflow"):
        StandardUnits.of(source(rows), fit_intercept=True)


def test_a_column_too_small_for_its_reciprocal_is_refused():
    for fit_intercept in (True, False):
        with pytest.raises(InputError, match=r"column x0: varies by .*e-31. only.*smaller units"):
            StandardUnits.of(source([1e-310, 3e-310, 2e-310]), fit_intercept=fit_intercept)


@pytest.mark.parametrize("scale", [2.0**-1021, 1e-200, 1e-155, 1.0, 1e155, 1e300])
@pytest.mark.filterwarnings("error")
def test_the_penalty_of_extreme_columns(scale: float):
    units = StandardUnits(np.zeros(2), np.array([scale, 1.0]), 0.0, True)
    for penalized in ([1.0, 1.0, 0.0], [0.0, 1.0, 0.0]):
        factors = units.penalized(np.array(penalized))
        assert np.isfinite(factors).all()
        np.testing.assert_array_equal(factors[1:], [1.0, 0.0])
        with np.errstate(all="ignore"):
            wanted = min((penalized[0] / scale) / scale, np.finfo(np.float64).max)
        np.testing.assert_allclose(factors[0], wanted, rtol=1e-12, atol=1e-320)


@pytest.mark.filterwarnings("error:.*encountered:RuntimeWarning")
def test_a_run_on_tiny_columns_says_nothing_of_overflow():
    settings = {"standardize": True, "dtype": "float64", "num_epochs": 200, "learning_rate": 0.3}
    result = train(TrainConfig(**settings), source=source([1e-200, 3e-200, 2e-200, 5e-200], np.array([1.0, 2, 3, 4])))
    wanted = np.polyfit([1.0, 3, 2, 5], [1.0, 2, 3, 4], 1)
    np.testing.assert_allclose(result.weights, wanted[0] * 1e200, rtol=1e-9)
    assert result.statistics is not None
    assert 0 < result.statistics.fit.coefficients[0].standard_error < 1e200


def test_there_and_back():
    units = StandardUnits(np.array([1e9, -3.0]), np.array([1e-3, 1e4]), 5e5, True)
    raw = np.array([2.5, -1e-4, 1e3])
    # The bias is a difference of numbers of size center * weight, of which each is rounded once.
    np.testing.assert_allclose(units.to_raw(units.from_raw(raw)), raw, rtol=1e-15, atol=2.5e9 * 1e-16)
    x = np.array([[1e9 + 0.5, 4.0]])
    trained = units.from_raw(raw)
    standard = ((x - units.center) / units.scale) @ trained[:2] + trained[2] + units.target_center
    np.testing.assert_allclose(standard, x @ raw[:2] + raw[2], rtol=1e-14)
    np.testing.assert_array_equal(RawUnits().to_raw(raw), raw)


def test_rows_in_standard_units_have_mean_0_and_deviation_1():
    table = source(np.random.default_rng(0).lognormal(size=(1000, 3)) * [1, 1e6, 1e-6])
    rows = StandardUnits.of(table, fit_intercept=True).rows(table)
    ((x, y, _),) = row_blocks(rows, "train")
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-13)
    np.testing.assert_allclose(x.std(axis=0), 1, rtol=1e-13)
    np.testing.assert_allclose(y.mean(), 0, atol=1e-9)
    assert rows.fingerprint() != table.fingerprint()


@pytest.mark.parametrize("engine", ["stream", "moments"])
def test_norris_to_ten_digits(engine: str):
    result = train(
        TrainConfig(
            data=REPO / "tests" / "nist" / "norris.csv", target="y", standardize=True, dtype="float64",
            test_fraction=0, learning_rate=0.3, num_epochs=150, full_batch_engine=engine, statistics=False,
        )
    )  # fmt: skip
    np.testing.assert_allclose(result.parameters, [1.00211681802045, -0.262323073774029], rtol=1e-10)


def test_the_penalty_is_on_the_raw_weights():
    """Ridge's optimum, whatever the units of training."""
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 2)) * [1, 20] + [3, -5]
    y = x @ [2.0, 0.5] + 1 + random.normal(size=200)
    centred = x - x.mean(axis=0)
    weights = np.linalg.solve(centred.T @ centred / 200 + 0.3 * np.eye(2), centred.T @ (y - y.mean()) / 200)
    result = train(
        TrainConfig(l2=0.3, standardize=True, dtype="float64", learning_rate=0.3, num_epochs=400, statistics=False),
        source=source(x, y),
    )
    np.testing.assert_allclose(result.weights, weights, rtol=1e-9)


def test_own_models_see_raw_rows(tmp_path: Path):
    with pytest.raises(InputError, match="--standardize=true: needs the linear model"):
        train(TrainConfig(standardize=True), model=TwoLayers, source=source(np.ones((5, 3))))


@pytest.mark.parametrize("engine", ["stream", "moments"])
def test_squares_that_overflow_without_standardizing(engine: str):
    rows = source([1e155, 2e155, -3e155, 1e155])
    settings = {"dtype": "float64", "num_epochs": 30, "learning_rate": 0.3, "full_batch_engine": engine}
    with pytest.raises(InputError, match=r"overflow.*; use --standardize"):
        train(TrainConfig(standardize=False, **settings), source=rows)
    result = train(TrainConfig(standardize=True, **settings), source=rows)
    assert result.train_loss is not None
    assert np.isfinite(result.train_loss)
