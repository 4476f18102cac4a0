"""`TapeRegressor` behaves as scikit-learn expects, and finds what scikit-learn finds."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tapedist.errors import InputError
from tapedist.sklearn import TapeRegressor


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 3)) * [1, 100, 0.01] + [0, 50, -3]
    return x, x @ [1.0, -0.02, 30.0] + 5 + random.normal(size=300)


def test_finds_the_least_squares_line(rows: tuple[np.ndarray, np.ndarray]):
    x, y = rows
    ours, theirs = TapeRegressor().fit(x, y), LinearRegression().fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-9)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-9)
    assert ours.n_features_in_ == 3
    assert ours.score(x, y) == pytest.approx(theirs.score(x, y), rel=1e-12)
    assert np.array_equal(ours.predict(x[:7]), ours.predict(x)[:7])


def test_without_intercept_and_with_weights(rows: tuple[np.ndarray, np.ndarray]):
    x, y = rows
    w = np.random.default_rng(1).integers(0, 3, len(y)).astype(float)
    ours = TapeRegressor(fit_intercept=False, num_epochs=20000).fit(x, y, sample_weight=w)
    theirs = LinearRegression(fit_intercept=False).fit(x, y, sample_weight=w)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8)
    assert ours.intercept_ == 0.0


def test_lives_in_pipelines_and_searches(rows: tuple[np.ndarray, np.ndarray]):
    x, y = rows
    pipeline = make_pipeline(StandardScaler(), TapeRegressor(num_epochs=200))
    ours = cross_val_score(pipeline, x, y, cv=2)
    np.testing.assert_allclose(ours, cross_val_score(LinearRegression(), x, y, cv=2), rtol=1e-6)
    search = GridSearchCV(TapeRegressor(num_epochs=50), {"learning_rate": [0.001, 0.2]}, cv=2).fit(x, y)
    assert search.best_params_ == {"learning_rate": 0.2}


def test_clones_pickles_and_parameters(rows: tuple[np.ndarray, np.ndarray]):
    x, y = rows
    model = TapeRegressor(num_epochs=10, config={"arithmetic": "fast"})
    twin = clone(model)
    assert twin.get_params() == model.get_params()
    model.fit(x, y)
    assert pickle.loads(pickle.dumps(model)).result_.digest == model.result_.digest == twin.fit(x, y).result_.digest


def test_refusals(rows: tuple[np.ndarray, np.ndarray]):
    x, y = rows
    with pytest.raises(NotFittedError):
        TapeRegressor().predict(x)
    with pytest.raises(ValueError, match="NaN"):
        TapeRegressor().fit(np.full((4, 1), np.nan), np.zeros(4))
    with pytest.raises(InputError, match="learning_rate"):
        TapeRegressor(learning_rate=-1).fit(x, y)
    with pytest.raises(ValueError, match="features"):
        TapeRegressor(num_epochs=1).fit(x, y).predict(x[:, :2])


def test_masks_are_refused(rows: tuple[np.ndarray, np.ndarray]):
    """scikit-learn's own checks take the numbers under a mask for rows."""
    x, y = (np.ma.array(column) for column in rows)
    model = TapeRegressor(num_epochs=1).fit(x, y, sample_weight=np.ma.ones(len(y)))  # A mask that hides nothing.
    model.predict(x)
    for name, position in (("X", 0), ("y", 1), ("sample_weight", 2)):
        arrays = [x.copy(), y.copy(), np.ma.ones(len(y))]
        arrays[position][:5] = np.ma.masked
        with pytest.raises(InputError, match=f"^{name}: .* of its numbers are under a mask"):
            TapeRegressor(num_epochs=1).fit(arrays[0], arrays[1], sample_weight=arrays[2])
    x[0, 0] = np.ma.masked
    with pytest.raises(InputError, match=r"^X: 1 of its numbers is under a mask"):
        model.predict(x)
