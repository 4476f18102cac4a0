"""Aliased features: which columns are left out, and the rest of the result without them, against R's rule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm

from tapedist.regression.least_squares import LeastSquares, from_moments, least_squares
from tapedist.regression.prediction import IntervalShape
from tapedist.regression.summary import as_dict, distance, truth_errors
from tapedist.results.coefficient_table import format_table

Array = np.ndarray


def _aliased_by_r(x: Array, w: Array, *, intercept: bool) -> list[int]:
    """R's rule in long double: columns from left to right, left out where at most 1e-7 of their length is left.

    `lm` measures against the raw length (LINPACK's dqrdc2), here as documented against the centred one. Gram-Schmidt
    is run twice, which makes it as good as Householder's reflections (Higham, 2nd ed., 19.8).
    """
    wide = x.astype(np.longdouble)
    root = np.sqrt(w.astype(np.longdouble))
    if intercept:
        wide = wide - (root**2 @ wide) / (root**2).sum()
    basis: list[Array] = []
    left_out = []
    for j, column in enumerate((wide * root[:, np.newaxis]).T):
        rest = column
        for _ in range(2):
            for direction in basis:
                rest = rest - direction * (direction @ rest)
        length, raw = np.linalg.norm(column), np.linalg.norm(x[:, j] * root)
        if len(basis) + intercept >= (w > 0).sum() or np.linalg.norm(rest) <= max(1e-7 * length, 1e-17 * raw):
            left_out.append(j)
        else:
            basis.append(rest / np.sqrt(rest @ rest))
    return left_out


def _fit(x: Array, y: Array, w: Array | None = None, **options: Any) -> LeastSquares:
    def blocks() -> Iterator[Any]:
        for first in range(0, len(y), 64):
            part = slice(first, first + 64)
            yield x[part], y[part], None if w is None else w[part]

    return least_squares(blocks, num_features=x.shape[1], **options)


_N = 300
_RANDOM = np.random.default_rng(7)
_A, _B, _C, _D = _RANDOM.normal(size=(4, _N))
_HOUR, _MINUTE = _RANDOM.integers(5, 24, size=_N), _RANDOM.integers(0, 60, size=_N)
_LEVEL = _RANDOM.integers(0, 3, size=_N)
_DUMMIES = [np.where(level == _LEVEL, 1.0, 0.0) for level in range(3)]
_MANY = list(_RANDOM.normal(size=(20, _N)))
_RAMP = np.linspace(5, 10, _N)
_MICROSECONDS = 1.7e15 + np.cumsum(_RANDOM.integers(1, 10**6, size=_N)).astype(float)
_FLIGHTS = {
    "year": np.full(_N, 2013.0), "month": _RANDOM.integers(1, 13, size=_N), "sched": 100 * _HOUR + _MINUTE,
    "distance": _RANDOM.integers(80, 5000, size=_N), "hour": _HOUR, "minute": _MINUTE,
}  # fmt: skip

# Columns, and which of them R's rule leaves out: recorded.
_TABLES: dict[str, tuple[list[Array], tuple[int, ...]]] = {
    "flights": (list(_FLIGHTS.values()), (0, 5)),
    "dummies": ([_A, *_DUMMIES], (3,)),
    "duplicate": ([_A, _B, _A], (2,)),
    "scaled copies": ([1e-12 * _A, _A, 1e12 * _A + 3e12, _B], (1, 2)),
    "sum of many": ([*_MANY, np.sum(_MANY, axis=0), _A], (20,)),
    "first is a sum": ([_A + _B, _A, _B, _C], (2,)),
    "polynomial": ([_RAMP**k for k in range(1, 12)], (8, 10)),
    "interleaved": ([_A, 2 * _A, _B, _A - _B, _C, np.zeros(_N), 0.1 * _C + _B, _D], (1, 3, 5, 6)),
    "all constant": ([np.full(_N, 0.1), np.full(_N, 1e15), np.zeros(_N)], (0, 1, 2)),
    "nearly dependent": ([_A, _A + 1.2e-7 * _B, _C, _C + 0.8e-7 * _D], (3,)),
    "microseconds since 1970": ([_MICROSECONDS, _MICROSECONDS + np.round(1e5 * _A)], ()),
    "differences": ([_MICROSECONDS, _MICROSECONDS + np.round(1e5 * _A), np.round(1e5 * _A), _B], (2,)),
    "units": ([32 + 1.8 * _A, _A, _B, 1.8 * _B + 32], (1, 3)),
    "none": ([_A, _B], ()),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("name", _TABLES)
def test_as_r_does(name: str, intercept: bool, weighted: bool) -> None:
    columns, recorded = _TABLES[name]
    x = np.stack(columns, axis=1).astype(float)
    random = np.random.default_rng(1)
    w = np.where(np.arange(_N) % 5 == 0, 0.0, random.uniform(0.1, 3, size=_N)) if weighted else np.ones(_N)
    y = 0.3 * x[:, 0] / np.abs(x[:, 0]).max() + _B - 2 * _C + random.normal(size=_N)
    fit = _fit(x, y, w if weighted else None, fit_intercept=intercept)
    expected = _aliased_by_r(x, w, intercept=intercept)
    assert fit.aliased == tuple(expected)
    if intercept:
        assert fit.aliased == recorded
    kept = [j for j in range(x.shape[1]) if j not in expected]
    _equals_a_fit_without_them(fit, x, y, w, kept)
    assert fit.degrees_of_freedom == (w > 0).sum() - len(kept) - intercept


def _equals_a_fit_without_them(fit: LeastSquares, x: Array, y: Array, w: Array, kept: list[int]) -> None:
    """Every number is that of the same rows without the aliased columns; their own are 0 and None."""
    without = _fit(x[:, kept], y, w, fit_intercept=fit.fit_intercept)
    assert without.aliased == ()
    entries = [c for j, c in enumerate(fit.coefficients) if j in kept or j == x.shape[1]]
    for field in ("optimum", "standard_error", "t", "p", "low", "high"):
        ours, theirs = ([getattr(c, field) for c in part] for part in (entries, without.coefficients))
        np.testing.assert_allclose(np.array(ours, float), np.array(theirs, float), rtol=1e-9)
    for j in fit.aliased:
        entry = fit.coefficients[j]
        assert (entry.optimum, fit.weights[j]) == (0, 0)
        assert {entry.standard_error, entry.t, entry.p, entry.low, entry.high} == {None}
    for field in ("r2", "adjusted_r2", "residual_std", "rmse", "loss", "condition_number"):
        ours, theirs = getattr(fit, field), getattr(without, field)
        assert ours == theirs or ours == pytest.approx(theirs, rel=1e-9)
    if not kept:
        return
    # As `lm` computes it, with the columns centred beforehand: raw powers and microseconds are too much for float64.
    root = np.sqrt(w)[:, np.newaxis]
    shift = w @ x[:, kept] / w.sum() if fit.fit_intercept else 0.0
    design = root * np.column_stack([x[:, kept] - shift, np.ones(len(y))][: 1 + fit.fit_intercept])
    q, r = np.linalg.qr(design)
    best = np.linalg.solve(r, q.T @ (root[:, 0] * y))
    left = root[:, 0] * y - design @ best
    errors = np.sqrt(left @ left / fit.degrees_of_freedom) * np.linalg.norm(np.linalg.inv(r), axis=1)
    slopes, digits = slice(0, len(kept)), 1e-14 * (fit.condition_number or 1) + 1e-9
    np.testing.assert_allclose([c.standard_error for c in entries][slopes], errors[slopes], rtol=10 * digits)
    np.testing.assert_allclose(
        [c.optimum for c in entries][slopes], best[slopes], rtol=digits, atol=digits * errors.max()
    )


@pytest.mark.parametrize("intercept", [True, False])
def test_more_features_than_rows(intercept: bool) -> None:
    """As by `lm`: the later columns are left out, and no degree of freedom is left for standard errors."""
    x, y = _RANDOM.normal(size=(6, 9)), _RANDOM.normal(size=6)
    x[:, 1] = 3 * x[:, 0]
    fit = _fit(x, y, fit_intercept=intercept)
    expected = (1, 6, 7, 8) if intercept else (1, 7, 8)
    assert fit.aliased == tuple(_aliased_by_r(x, np.ones(6), intercept=intercept)) == expected
    assert (fit.degrees_of_freedom, fit.loss, fit.r2) == (0, 0, 1)
    assert fit.residual_std is fit.adjusted_r2 is fit.coefficients[0].standard_error is None
    np.testing.assert_allclose(x @ fit.weights + fit.bias, y, atol=1e-10)
    many = "x7, x8, x9" if intercept else "x8, x9"
    assert fit.left_out() == [
        "x2 is a linear combination of x1", f"{many} are too many: 6 rows determine no more parameters",
    ]  # fmt: skip
    json.dumps(as_dict(fit), allow_nan=False)
    assert IntervalShape.of(fit) is None


def test_a_single_row_and_no_varying_column() -> None:
    fit = _fit(np.array([[1.0, 2.0]]), np.array([3.0]))
    assert fit.aliased == (0, 1)
    assert (fit.bias, fit.weights.tolist(), fit.degrees_of_freedom, fit.loss) == (3, [0, 0], 0, 0)
    raw = _fit(np.array([[2.0, 2.0]]), np.array([3.0]), fit_intercept=False)
    assert raw.weights.tolist() == [1.5, 0]
    assert raw.left_out() == ["x2 is one too many: 1 row determines no more parameters"]


def test_what_rounding_could_have_made_is_aliased() -> None:
    y = _A + _B
    for column in (
        np.where(_LEVEL > 0, 0.3, 0.1 + 0.2),  # The same number, written twice.
        np.where(_LEVEL > 0, 1e15 + 0.3, 1e15 + 0.4),
        np.where(_LEVEL > 0, 0.7, 7 * 0.1),
        np.add.accumulate(np.full(_N, 1e-30)) + 1.1,
    ):
        fit = _fit(np.stack([column, _B], axis=1), y)
        assert fit.left_out() == ["x1 does not vary"]
    large = 1e12 + np.arange(_N)
    for column, reason in (
        (0.1 * large, "x2 is a linear combination of x1"),
        (large / 3 + 0.1, "x2 is a linear combination of x1"),
    ):
        assert _fit(np.stack([large, column], axis=1), y).left_out() == [reason]
    for column in (  # Exact numbers vary, however little.
        np.where(_LEVEL > 0, 2.0**52, 2.0**52 + 1),
        np.where(_LEVEL > 0, 2.0**40 + 0.25, 2.0**40),
        1e15 + np.round(_A),
        np.where(np.arange(_N) == 299, 1e-300, 0.0),
    ):
        assert _fit(np.stack([column, _B], axis=1), y).aliased == ()


def test_reasons_name_the_columns() -> None:
    fit = _fit(np.stack([*_FLIGHTS.values()], axis=1).astype(float), _A, names=tuple(_FLIGHTS))
    assert fit.left_out() == ["year does not vary", "minute is a linear combination of sched, hour"]
    lines = format_table(fit, distance(fit, fit.weights, fit.bias), parameters=[*fit.weights, fit.bias]).splitlines()
    (place,) = [i for i, line in enumerate(lines) if "Left out" in line]
    assert lines[place] == (
        "  Left out, with weight 0: year does not vary; minute is a linear combination of sched, hour"
    )
    assert lines[place - 1].split()[0] == "intercept"
    assert [lines[row].split() for row in (2, 7)] == [["year", "0"], ["minute", "0"]]
    content = json.loads(json.dumps(as_dict(fit), allow_nan=False))
    assert content["aliased"][1] == {
        "feature": 5, "name": "minute", "because": "is a linear combination of sched, hour",
    }  # fmt: skip
    many = _fit(np.stack(_TABLES["sum of many"][0], axis=1), _A)
    assert many.left_out()[0].endswith("combination of x1, x2, x3, x4, x5, x6, x7, x8 and 12 more")
    zero = _fit(np.stack([np.zeros(_N), _A], axis=1), _B, fit_intercept=False)
    assert zero.left_out() == ["x1 is zero in every row"]


@pytest.mark.parametrize("intercept", [True, False])
def test_moments_find_the_same_or_decline(intercept: bool) -> None:
    for columns, _ in _TABLES.values():
        x = np.stack(columns, axis=1).astype(float)
        y = _A + _B
        table = np.column_stack([x, y])
        means = (table - table[0]).mean(axis=0) + table[0]
        centred = (table - means).T @ (table - means)
        moments: dict[str, Any] = {
            "num_rows": _N, "sum_weights": float(_N), "means": means, "centred": centred, "fit_intercept": intercept,
        }  # fmt: skip
        expected = _fit(x, y, fit_intercept=intercept)
        fit = from_moments(**moments)
        if fit is None:
            fit = from_moments(**moments, aliased=expected.aliased, digits=4)
        if fit is not None:
            assert fit.aliased == expected.aliased
            np.testing.assert_allclose(fit.weights, expected.weights, rtol=1e-4, atol=1e-12)
    copied = np.column_stack([_A, _B, 3 * _A, _B])
    means = copied.mean(axis=0)
    centred = (copied - means).T @ (copied - means)
    rough = from_moments(num_rows=_N, sum_weights=1.0 * _N, means=means, centred=centred, digits=0)
    assert rough is not None
    assert rough.aliased == (2,)
    assert from_moments(num_rows=_N, sum_weights=1.0 * _N, means=means, centred=centred) is None


def test_a_decision_that_was_made_before_is_kept() -> None:
    x = np.stack([_A, _B, _A + 1e-4 * _C, _D], axis=1)
    decided = _fit(x, _D + _A, aliased=(0, 2))
    assert decided.aliased == (0, 2)
    without = _fit(x[:, [1, 3]], _D + _A)
    np.testing.assert_allclose(decided.weights[[1, 3]], without.weights, rtol=1e-13)
    assert decided.loss == pytest.approx(without.loss, rel=1e-13)
    # Nothing is kept of which nothing is left.
    assert _fit(np.stack([_A, _A], axis=1), _B, aliased=()).aliased == (1,)
    # What is not in the decision is kept, however little is left of it.
    near = np.stack([_A, _A + 0.9e-7 * _C], axis=1)
    assert _fit(near, _B).aliased == (1,)
    assert _fit(near, _B, aliased=()).aliased == ()
    assert _fit(near, _B, tolerance=1e-8).aliased == ()
    assert _fit(np.stack([_A, _A + 1e-3 * _C], axis=1), _B, tolerance=1e-2).aliased == (1,)


def test_the_distance_leaves_aliased_features_out_and_is_honest_about_their_weights() -> None:
    x = np.stack([np.full(_N, 2013.0), _A, _B, _A - 2 * _B], axis=1)
    y = 3 * _A + _B + _C
    fit = _fit(x, y)
    assert fit.aliased == (0, 3)
    here = distance(fit, fit.weights, fit.bias)
    assert here.excess_loss == pytest.approx(0, abs=1e-30)
    assert here.standard_errors[0] is here.standard_errors[3] is None
    assert here.max_standard_errors is not None
    assert here.max_standard_errors < 1e-12
    # The same predictions in another way: no loss, but parameters that are not the optimum's.
    same = distance(fit, np.add(fit.weights, [1.0, -1.0, 2.0, 1.0]), fit.bias - 2013)
    assert same.excess_loss == pytest.approx(0, abs=1e-15)
    assert same.max_standard_errors is None
    for weights, bias in ((np.array([0.0, 1, 1, 1]), 0.5), (np.array([1e-3, 3, 1, -0.5]), -2.0)):
        loss = np.mean((x @ weights + bias - y) ** 2)
        assert distance(fit, weights, bias).loss == pytest.approx(loss, rel=1e-12)
    errors = truth_errors(fit, np.array([0.0, 3.0, 1.0, 0.0]), 0.0)
    assert errors[0] is errors[3] is None
    assert all(abs(error) < 5 for error in errors if error is not None)


def test_what_is_left_of_an_aliased_feature_counts_in_the_loss() -> None:
    """1e-8 of it is: with a weight of 1e8 that is much, and may even be good for the loss."""
    x = np.stack([_A, _A + 1e-8 * _C], axis=1)
    y = _B + _C
    fit = _fit(x, y)
    assert fit.aliased == (1,)
    for weights in (np.array([-1e8, 1e8]), np.array([1e8, -1e8]), np.array([5.0, 2e7])):
        loss = np.mean((x @ weights - y) ** 2)
        found = distance(fit, weights)
        assert found.loss == pytest.approx(loss, rel=1e-6)
        assert found.max_standard_errors is None
    better = distance(fit, np.array([-1e8, 1e8]))
    assert better.excess_loss is not None
    assert better.excess_loss < 0
    assert " below the optimum)" in format_table(fit, better)


def test_intervals_leave_aliased_features_out() -> None:
    x = np.stack([_A, np.full(_N, 2013.0), 2 * _A, _B], axis=1)
    y = _A + _C
    fit = _fit(x, y)
    shape = IntervalShape.of(fit)
    assert shape is not None
    oracle = sm.OLS(y, sm.add_constant(x[:, [0, 3]], prepend=False)).fit()
    rows = sm.add_constant(x[:5][:, [0, 3]], prepend=False)
    frame = oracle.get_prediction(rows).summary_frame(alpha=0.1)
    half = (frame["obs_ci_upper"] - frame["obs_ci_lower"]) / 2
    new = x[:5].copy()
    new[:, 1] = 2034  # Of another year, or another combination, the rows say nothing.
    new[:, 2] = -7
    np.testing.assert_allclose(shape.margins(new, level=0.9), half, rtol=1e-10)
    np.testing.assert_allclose(IntervalShape.from_json(shape.as_json()).margins(new, level=0.9), half, rtol=1e-10)
    np.testing.assert_allclose(fit.standard_error_of_mean(new), frame["mean_se"], rtol=1e-10)
