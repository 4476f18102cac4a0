"""The least-squares report: against statsmodels and scipy, against exact fractions, and where nothing is defined."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm

from tapedist.data.exact_moments import ExactMoments, as_columns
from tapedist.data.ranges import ranges_of_blocks
from tapedist.errors import InputError
from tapedist.regression.inference import student_t_p, student_t_quantile
from tapedist.regression.summary import (
    LeastSquares,
    as_dict,
    distance,
    from_moments,
    least_squares,
    residual_metrics,
    truth_errors,
)
from tapedist.results.coefficient_table import format_table

Array = np.ndarray


def _data(seed: int, n: int, d: int) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, d)) @ random.normal(size=(d, d)) + random.normal(size=d) * 3
    y = x @ random.normal(size=d) + 2 + random.normal(size=n)
    return x, y, random.uniform(0.1, 5, size=n)


def _blocks(x: Array, y: Array, w: Array | None = None, size: int = 100) -> Callable[[], Iterator[Any]]:
    def blocks() -> Iterator[Any]:
        for first in range(0, len(y), size):
            part = slice(first, first + size)
            yield x[part], y[part], None if w is None else w[part]

    return blocks


def _fit(x: Any, y: Any, w: Any = None, **options: Any) -> LeastSquares:
    x, y = np.asarray(x), np.asarray(y)
    return least_squares(_blocks(x, y, None if w is None else np.asarray(w)), num_features=x.shape[1], **options)


def _column(fit: LeastSquares, field: str) -> list[Any]:
    return [getattr(c, field) for c in fit.coefficients]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(("n", "d"), [(60, 1), (500, 3), (1000, 8), (40, 30)])
def test_equals_statsmodels(n: int, d: int, intercept: bool, weighted: bool) -> None:
    x, y, w = _data(n + d, n, d)
    # statsmodels takes any column of ones for the intercept; ours comes last.
    design = np.column_stack([x, np.ones(n)]) if intercept else x
    oracle = sm.WLS(y, design, weights=w).fit() if weighted else sm.OLS(y, design).fit()
    fit = _fit(x, y, w if weighted else None, fit_intercept=intercept)

    def close(ours: Any, theirs: Any, rtol: float = 1e-9) -> None:
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=0)

    close(_column(fit, "optimum"), oracle.params)
    close(_column(fit, "standard_error"), oracle.bse)
    close(_column(fit, "t"), oracle.tvalues)
    close(_column(fit, "p"), oracle.pvalues, rtol=1e-8)
    close(np.column_stack([_column(fit, "low"), _column(fit, "high")]), oracle.conf_int(), rtol=1e-8)
    close([fit.r2, fit.adjusted_r2], [oracle.rsquared, oracle.rsquared_adj])
    close(fit.residual_std, math.sqrt(oracle.scale))
    assert fit.degrees_of_freedom == oracle.df_resid
    prediction = oracle.get_prediction(design[:5])
    close(fit.standard_error_of_mean(x[:5]), prediction.se_mean)


@pytest.mark.parametrize("df", [2, 3, 10, 79, 81, 1000, 10**5, 10**7, 10**9, 10**12])
def test_student_t_equals_scipy(df: int) -> None:
    t = np.array([0, 1e-9, 1e-3, 0.5, 1.5, 2, 5, 12, 30, 37])
    expected = 2 * scipy.stats.t.sf(t, df)
    shown = expected > 1e-300
    ours = np.array([student_t_p(float(v), df) for v in t])
    np.testing.assert_allclose(ours[shown], expected[shown], rtol=1e-11)
    for level in (0.5, 0.9, 0.95, 0.99):
        assert student_t_quantile(df, level) == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, df), rel=1e-10)


def test_student_t_has_closed_forms() -> None:
    for t in (1e-8, 0.3, 2.0, 1e3, 1e12):
        assert student_t_p(t, 1) == pytest.approx(2 / math.pi * math.atan(1 / t), rel=1e-13)
        # 1 - t / sqrt(2 + t**2), without its cancellation.
        assert student_t_p(-t, 2) == pytest.approx(2 / (2 + t * t + t * math.sqrt(2 + t * t)), rel=1e-13)
    with pytest.raises(ValueError, match="must be inside"):
        student_t_quantile(5, 1.0)


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_exact(weighted: bool) -> None:
    """Products of numbers over twelve orders of magnitude, against fractions: 100 bits of the columns' lengths."""
    random = np.random.default_rng(3)
    x = random.normal(size=(50, 2)) * 10.0 ** random.integers(-6, 6, size=(50, 2))
    y, w = random.normal(size=50) + 1e9, random.uniform(0.1, 9, size=50) if weighted else np.ones(50)
    moments = ExactMoments(ranges_of_blocks(_blocks(x, y, w)(), ("a", "b", "y")), names=("a", "b"))
    for block in _blocks(x, y, w, size=7)():
        moments.add(as_columns(*block[:2]), block[2])
    columns = [
        [(Fraction(float(v)) - Fraction(float(shift))) / Fraction(2) ** int(exponent) for v in values]
        for values, shift, exponent in zip([*x.T, y], moments.shift, moments.exponents, strict=True)
    ]
    weights = [Fraction(float(v)) / Fraction(2) ** moments.weight_exponent for v in w]
    total = sum(weights)
    means = [sum(v * q for v, q in zip(column, weights, strict=True)) / total for column in columns]
    centred = [[v - mean for v in column] for column, mean in zip(columns, means, strict=True)]
    high, low = moments.centred()
    for i, a in enumerate(centred):
        for j, b in enumerate(centred):
            exact = sum(u * v * q for u, v, q in zip(a, b, weights, strict=True))
            length = sum(u * u * q for u, q in zip(a, weights, strict=True)) * sum(
                v * v * q for v, q in zip(b, weights, strict=True)
            )
            found = Fraction(float(high[i, j])) + Fraction(float(low[i, j]))
            assert (found - exact) ** 2 <= length * Fraction(1, 2**200), (i, j)


def test_block_size_and_row_order_do_not_matter() -> None:
    x, y, w = _data(5, 300, 4)
    reference = _fit(x, y, w)
    order = np.random.default_rng(0).permutation(300)
    for size in (1, 7, 300):
        fit = least_squares(_blocks(x[order], y[order], w[order], size=size), num_features=4)
        assert as_dict(fit) == as_dict(reference)


def test_weights_count_only_relatively_and_zero_weights_not_at_all() -> None:
    x, y, w = _data(6, 80, 2)
    reference = _fit(x, y, w)
    scaled = _fit(x, y, w * 1e-30)
    np.testing.assert_allclose(_column(scaled, "standard_error"), _column(reference, "standard_error"), rtol=1e-14)
    assert scaled.loss == pytest.approx(reference.loss, rel=1e-14)
    assert scaled.residual_std == pytest.approx(reference.residual_std * 1e-15, rel=1e-14)
    padded = _fit(np.vstack([x, np.full((9, 2), np.nan)]), np.append(y, [np.inf] * 9), np.append(w, [0] * 9))
    assert as_dict(padded) == as_dict(reference)
    ones = _fit(x, y, np.ones(80))
    assert as_dict(ones) == as_dict(_fit(x, y))


@pytest.mark.parametrize(("factor", "offset"), [(2.0**40, 0.0), (2.0**-1, 2.0**30), (1e140, 0.0), (1e-140, 0.0)])
def test_units_of_a_feature_change_its_own_row_only(factor: float, offset: float) -> None:
    x, y, _ = _data(7, 200, 2)
    # Few bits, so that the change of units rounds nothing.
    x = np.round(x * 256) / 256
    reference, moved = _fit(x, y), _fit(np.column_stack([x[:, 0] * factor + offset, x[:, 1]]), y)
    first, other = reference.coefficients[0], moved.coefficients[0]
    assert other.optimum * factor == pytest.approx(first.optimum, rel=1e-13)
    assert other.t == pytest.approx(first.t, rel=1e-13)
    assert moved.coefficients[1].p == pytest.approx(reference.coefficients[1].p, rel=1e-10)
    assert moved.condition_number == pytest.approx(reference.condition_number, rel=1e-12)


def test_a_large_mean_costs_no_digits() -> None:
    tiny = np.arange(50) / 2**20
    fit = _fit((1e9 + tiny)[:, None], 3 * tiny + 7)
    assert fit.weights[0] == pytest.approx(3, rel=1e-13)
    assert fit.aliased == ()


@pytest.mark.parametrize("intercept", [False, True])
def test_moments_give_the_same_without_the_rows(intercept: bool) -> None:
    x, y, w = _data(8, 500, 5)
    table = np.column_stack([x, y])
    means = w @ table / w.sum()
    centred = (table - means).T @ ((table - means) * w[:, None])
    fit = from_moments(num_rows=500, sum_weights=w.sum(), means=means, centred=centred, fit_intercept=intercept)
    assert fit is not None
    expected = _fit(x, y, w, fit_intercept=intercept)
    for field in ("optimum", "standard_error", "t", "low", "high"):
        np.testing.assert_allclose(_column(fit, field), _column(expected, field), rtol=1e-10)
    assert fit.r2 == pytest.approx(expected.r2, rel=1e-12)
    assert distance(fit, np.ones(5), 1.0).loss == pytest.approx(distance(expected, np.ones(5), 1.0).loss, rel=1e-11)


def test_moments_decline_where_digits_are_doubtful() -> None:
    x, y, _ = _data(9, 100, 2)

    def fit(x: Array, y: Array, digits: int = 9) -> LeastSquares | None:
        table = np.column_stack([x, y])
        centred = table - table.mean(axis=0)
        means, products = table.mean(axis=0), centred.T @ centred
        return from_moments(num_rows=100, sum_weights=100.0, means=means, centred=products, digits=digits)

    assert fit(x, y) is not None
    assert fit(np.column_stack([x, x[:, 0] + 1e-5 * x[:, 1]]), y) is None, "nearly collinear"
    rough = fit(np.column_stack([x, x[:, 0] + 1e-5 * x[:, 1]]), y, digits=0)
    assert rough is not None
    assert fit(x, x @ [1.0, 2.0]) is None, "exact fit"
    assert fit(np.where(x > 0, np.inf, x)[:, :0], y) is not None, "no feature"
    constant = fit(np.column_stack([x, np.full(100, 3.0)]), y)
    assert constant is not None
    assert constant.left_out() == ["x3 does not vary"]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([[1.0]], [2.0]),
        ([[1.0], [2.0]], [2.0, 5.0]),
        ([[1.0], [2.0], [4.0]], [0.1, 0.1, 0.1]),
        ([[0.1], [0.2], [0.4]], [0.3, 0.5, 0.9]),
        ([[1e200], [2e200], [4e200]], [1.0, 2.0, 2.0]),
        ([[1.0], [2.0], [4.0]], [1e149, 2e149, 2e149]),
    ],
    ids=["one row", "as many rows as parameters", "constant target", "exact fit", "huge feature", "huge target"],
)
def test_nothing_is_nan(x: list[list[float]], y: list[float]) -> None:
    fit = _fit(x, y)
    text = json.dumps(as_dict(fit), allow_nan=False)
    assert "nan" not in (text + format_table(fit, distance(fit, np.zeros(1)))).lower()
    assert (fit.r2 is None) == (len(set(y)) == 1)
    if fit.degrees_of_freedom < 1:
        assert fit.residual_std is fit.adjusted_r2 is None
        assert all(c.standard_error is c.p is None for c in fit.coefficients)


def test_an_exact_fit_has_no_error_and_no_t() -> None:
    fit = _fit([[0.1], [0.2], [0.4]], [0.3, 0.5, 0.9])
    slope = fit.coefficients[0]
    assert (slope.standard_error, slope.t, slope.p, slope.low) == (0.0, None, None, slope.optimum)
    assert fit.loss == fit.residual_std == 0
    assert distance(fit, np.array([3.0])).max_standard_errors is None


def _exact_line(x: Array, y: Array) -> tuple[float, float, float]:
    """Slope, its standard error and the residual standard deviation, by fractions."""
    rows = [(Fraction(float(a)), Fraction(float(b))) for a, b in zip(x, y, strict=True)]
    n, sx, sy = len(rows), sum(a for a, _ in rows), sum(b for _, b in rows)
    sxx = sum(a * a for a, _ in rows) - sx * sx / n
    sxy = sum(a * b for a, b in rows) - sx * sy / n
    left = sum(b * b for _, b in rows) - sy * sy / n - sxy * sxy / sxx
    # Roots of ratios near 1 times powers of two: squares of the smallest and largest targets are beyond float64.
    half = (left.numerator.bit_length() - left.denominator.bit_length()) // 2
    root = math.sqrt(left / Fraction(4) ** half)
    std = math.ldexp(root / math.sqrt(n - 2), half)
    lengths = (sxx.numerator.bit_length() - sxx.denominator.bit_length()) // 2
    return float(sxy / sxx), math.ldexp(std / math.sqrt(sxx / Fraction(4) ** lengths), -lengths), std


_TIME = np.arange(60.0)
_NOISE = np.random.default_rng(3).normal(size=60)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (1.7e15 + _TIME, _TIME + 0.3 * _NOISE),  # Microseconds since 1970.
        (1.7e15 + _TIME / 4, _TIME + 0.3 * _NOISE),  # Every number is a multiple of its last bit.
        (1.7e18 + 1024 * _TIME, _TIME + 0.2 * _NOISE),
        (1.7e9 + 0.001 * _TIME, 0.001 * _TIME + 1e-6 * _NOISE),
        (1e9 + _TIME / 1024, _TIME / 1024 + np.round(4 * _NOISE) / 4096),
        (1e12 + 0.1 * _TIME, 1e9 + _NOISE),
        (_TIME, 1e9 + 2e-7 * _NOISE),  # Twice the distance of neighbours.
        (2.0**52 + _TIME, 2.0**52 + _TIME + np.round(2 * _NOISE)),
        (_TIME, _TIME + 1e-6 * _NOISE),
        (_TIME, 1e-40 * (_TIME + _NOISE)),
        (_TIME, 1e-300 * (_TIME + _NOISE)),
        (_TIME, 1e148 * (_TIME + _NOISE)),
        (1e-300 * _TIME, _TIME + _NOISE),
        (1e297 * _TIME, _TIME + _NOISE),
        (np.where(_TIME < 50, 0, 1e160 * _TIME), _TIME + _NOISE),  # The first block is no measure of the others.
        (np.where(_TIME < 50, 1e-200, 1e100) * _TIME, _TIME + _NOISE),
    ],
)
def test_a_residual_is_not_taken_for_rounding(x: Array, y: Array) -> None:
    fit = least_squares(_blocks(x[:, None], y, size=17), num_features=1)
    slope, error, std = _exact_line(x, y)
    assert fit.aliased == ()
    assert fit.coefficients[0].optimum == pytest.approx(slope, rel=1e-12)
    assert fit.coefficients[0].standard_error == pytest.approx(error, rel=1e-8)
    assert fit.residual_std == pytest.approx(std, rel=1e-8)
    assert fit.rmse == pytest.approx(std * math.sqrt(58 / 60), rel=1e-8)
    assert fit.r2 is not None
    assert fit.r2 < 1


def test_an_exact_fit_is_found_at_any_offset() -> None:
    for x, y in (
        (_TIME, 3 * _TIME + 7),
        (0.1 * _TIME, np.round(0.3 * _TIME + 0.7, 6)),
        (1.7e15 + _TIME, 2 * _TIME + 1),
        (1e9 + _TIME / 8, 2 * (1e9 + _TIME / 8) + 1),
        (_TIME, 1e-200 * _TIME),
    ):
        fit = _fit(x[:, None], y)
        assert (fit.loss, fit.residual_std, fit.r2, fit.coefficients[0].standard_error) == (0, 0, 1, 0)


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1.0, 1e200, 1e308])
def test_weights_of_any_scale(scale: float) -> None:
    x, y, w = _data(13, 90, 2)
    w = w / w.max() * scale
    fit, reference = _fit(x, y, w), _fit(x, y, w / scale)
    for field in ("optimum", "standard_error", "t", "p", "low"):
        np.testing.assert_allclose(_column(fit, field), _column(reference, field), rtol=1e-12)
    assert fit.residual_std == pytest.approx(reference.residual_std * math.sqrt(scale), rel=1e-12)
    np.testing.assert_allclose(fit.standard_error_of_mean(x[:3]), reference.standard_error_of_mean(x[:3]), rtol=1e-12)
    found, expected = (residual_metrics(_blocks(x, y, v)(), np.ones(2), 1.0) for v in (w, w / scale))
    assert found is not None
    assert expected is not None
    assert (found.loss, found.mae) == pytest.approx((expected.loss, expected.mae), rel=1e-13)
    json.dumps(as_dict(fit), allow_nan=False)  # The sum of the largest is beyond float64.
    # The first rows may be no measure of the others.
    uneven = np.where(np.arange(90) < 50, w * 1e-200, w)
    late = _fit(x, y, uneven)
    np.testing.assert_allclose(late.weights, _fit(x[50:], y[50:], w[50:]).weights, rtol=1e-10)


def test_distance_is_exact_next_to_the_optimum() -> None:
    """`L(theta) - L(optimum)` by fractions, where subtracting two losses in float64 would leave nothing."""
    x, y, _ = _data(11, 60, 1)
    fit = _fit(x, y)
    rows = [(Fraction(float(a)), Fraction(float(b))) for a, b in zip(x[:, 0], y, strict=True)]
    n, sx, sy = len(rows), sum(a for a, _ in rows), sum(b for _, b in rows)
    slope = (sum(a * b for a, b in rows) - sx * sy / n) / (sum(a * a for a, _ in rows) - sx * sx / n)

    def loss(weight: Fraction, bias: Fraction) -> Fraction:
        return sum(((weight * a + bias - b) ** 2 for a, b in rows), Fraction(0)) / n

    best = loss(slope, (sy - slope * sx) / n)
    assert fit.loss == pytest.approx(float(best), rel=1e-15)
    for step in (1.0, 1e-3, 1e-9, 1e-14):
        weight, bias = fit.weights[0] + step, fit.bias - 2 * step
        exact = float(loss(Fraction(float(weight)), Fraction(float(bias))) - best)
        found = distance(fit, np.array([weight]), bias)
        assert found.excess_loss == pytest.approx(exact, rel=1e-9)
        gap = abs(Fraction(float(weight)) - slope)
        assert found.standard_errors[0] == pytest.approx(float(gap) / fit.coefficients[0].standard_error, rel=1e-9)
        assert found.max_standard_errors == max(found.standard_errors)
    assert distance(fit, fit.weights, fit.bias).max_standard_errors < 1e-14


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_distance_of_diverged_parameters_is_none(value: float) -> None:
    fit = _fit([[1.0], [2.0], [4.0]], [1.0, 2.0, 2.0])
    away = distance(fit, np.array([value]), value)
    assert (away.loss, away.excess_loss) == (None, None)
    assert away.max_standard_errors is None or math.isfinite(away.max_standard_errors)
    assert "not finite" in format_table(fit, away)


def test_distance_to_the_truth_is_normal() -> None:
    truth = np.array([9.0, -1.0])
    errors = []
    for seed in range(200):
        random = np.random.default_rng(seed)
        x = random.normal(size=(40, 2))
        errors += truth_errors(_fit(x, x @ truth - 2 + random.normal(size=40)), truth, -2.0)
    assert len(errors) == 600
    assert scipy.stats.kstest(errors, scipy.stats.t(37).cdf).pvalue > 1e-3


def test_residual_metrics() -> None:
    x, y, w = _data(12, 100, 3)
    found = residual_metrics(_blocks(x, y, w, size=9)(), np.ones(3), 2.0)
    assert found is not None
    gaps = x @ np.ones(3) + 2 - y
    assert found.loss == pytest.approx(np.average(gaps**2, weights=w), rel=1e-13)
    assert found.mae == pytest.approx(np.average(np.abs(gaps), weights=w), rel=1e-13)
    assert (found.rmse, found.num_rows) == (math.sqrt(found.loss), 100)
    assert found.loss == pytest.approx(distance(_fit(x, y, w), np.ones(3), 2.0).loss, rel=1e-12)
    assert residual_metrics([(x, y, np.zeros(100))], np.ones(3)) is None


@pytest.mark.parametrize(
    ("x", "y", "w", "message"),
    [
        (
            [[1.0], [np.nan]],
            [1.0, 2.0],
            None,
            "column x1 of train row 1 is nan; must be finite",
        ),
        ([[1.0], [2.0]], [1.0, np.inf], None, "column target of train row 1 is inf"),
        ([[1.0], [2.0]], [1.0, 2.0], [1.0, -1.0], "the weight of train row 1 is -1; must be finite and at least 0"),
        ([[1.0], [2.0]], [1.0, 2.0], [0.0, 0.0], "weights: no row has a positive weight; at least one is needed"),
    ],
)
def test_bad_rows_are_refused(x: Any, y: Any, w: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _fit(x, y, w)


def test_names_must_fit() -> None:
    with pytest.raises(ValueError, match="must be 1 names"):
        _fit([[1.0], [2.0]], [1.0, 2.0], names=["a", "b"])


def test_table_is_aligned_and_fits_the_screen() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(100, 2))
    names = ["a feature with a rather long name, longer than the screen has room for beside its numbers", "esc\x1b[31m"]
    fit = _fit(x, x @ [1234567.0, 0.001] + random.normal(size=100), names=names)
    learned = distance(fit, np.zeros(2))
    for width in (80, 100, 130):
        lines = format_table(fit, learned, parameters=[0.0, 0.0, 0.0], width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert ("t" in lines[1].split()) == (width == 130), "the narrow table leaves out what can be computed"
    assert lines[0] == "Least squares: 100 rows, 97 residual degrees of freedom"
    columns = ["learned", "optimum", "std error", "t", "p", "95 % interval", "off by"]
    assert lines[1].split() == " ".join(columns).split()
    assert len({len(line) for line in lines[1:5]}) == 1
    assert "..." in lines[2]
    assert "<1e-300" not in lines[3]
    assert "'esc\\x1b[31m'" in lines[3]
    assert "\x1b" not in "".join(lines)
    assert lines[4].startswith("  intercept")
    assert lines[5].startswith("  R2 1 | adjusted R2 1 | residual std 1.117")
    assert lines[-1].startswith("Learned parameters: loss 1.")
    with_truth = format_table(fit, None, truth_errors(fit, np.array([1234567.0, 0.001])), width=120).splitlines()
    assert with_truth[1].endswith("truth off by")
    assert all(line.endswith(" SE") for line in with_truth[2:5])
    many = format_table(_fit(*_data(1, 60, 30)[:2])).splitlines()
    assert len(many) < 30
    assert "  ... and 11 more" in many


def test_learned_parameters_that_are_the_optimum_have_one_column() -> None:
    x, y, _ = _data(5, 200, 2)
    fit = _fit(x, y)
    for steps, agrees in ((0.009, True), (0.011, False)):
        given = np.add(fit.weights, [steps * fit.coefficients[0].standard_error, 0.0])
        found = distance(fit, given, fit.bias)
        lines = format_table(fit, found, parameters=[*given, fit.bias]).splitlines()
        sentence = "learned is the least-squares optimum to within 0.01 standard errors"
        assert lines[0].endswith(f"197 residual degrees of freedom, {sentence}") == agrees
        assert lines[1].split()[:2] == (["learned", "std"] if agrees else ["learned", "optimum"])
        assert lines[1].endswith("interval" if agrees else "off by")
        assert found.agrees == agrees
    narrow = format_table(fit, distance(fit, fit.weights, fit.bias), parameters=[*fit.weights, fit.bias], width=80)
    assert max(map(len, narrow.splitlines())) <= 80
    # Without standard errors nobody can say whether they agree.
    exact = _fit([[1.0], [2.0]], [1.0, 2.0])
    assert not distance(exact, exact.weights, exact.bias).agrees
    assert "optimum" in format_table(exact, distance(exact, exact.weights, exact.bias), parameters=[1.0, 0.0])


def test_table_says_about_what_r2_is() -> None:
    x, y, _ = _data(3, 50, 2)
    assert "  R2 0." in format_table(_fit(x, y))
    fit = _fit(x, y, fit_intercept=False)
    errors = fit.loss * len(y)
    assert fit.r2 == pytest.approx(1 - errors / (y @ y), rel=1e-12)
    assert fit.r2_about_mean == pytest.approx(1 - errors / ((y - y.mean()) ** 2).sum(), rel=1e-12)
    assert f"  R2 about 0 {fit.r2:.6g} | R2 about the mean {fit.r2_about_mean:.6g} | " in format_table(fit)


def test_closing_sentence_fits_a_line() -> None:
    x, y, _ = _data(4, 200, 3)
    fit = _fit(x, 12.3456 * y)
    learned = distance(fit, fit.weights + 1e-9, fit.bias)
    last = format_table(fit, learned, mae=123.456).splitlines()[-1]
    assert last.startswith("Learned parameters: loss ")
    assert ", MAE 123.456, at most " in last
    away = distance(fit, fit.weights + 1e-3, fit.bias)
    lines = format_table(fit, away, mae=123.456, width=len(last) - 4).splitlines()
    assert lines[-2].endswith(", MAE 123.456,")
    assert lines[-1].startswith("  at most ")
    assert lines[-1].endswith(" SE away")


def test_in_a_file_nothing_is_left_out_or_wrapped() -> None:
    x, y, _ = _data(4, 200, 3)
    fit = _fit(x, 1e6 * y, names=["a name of " + "many " * 20 + "words", "b", "c"])
    lines = format_table(fit, distance(fit, fit.weights, fit.bias), truth_errors(fit, fit.weights)).splitlines()
    assert len(lines[1]) > 120
    assert "t" in lines[1].split()
    assert "interval" in lines[1].split()
    assert "words" in lines[2]
    dependent = _fit(np.column_stack([x, *[x[:, :1]] * 9, *[k * x[:, k % 3] + x[:, 0] for k in range(1, 12)]]), y)
    (line,) = [line for line in format_table(dependent).splitlines() if "Left out" in line]
    assert len(line) > 120
    assert "x4, x5, x6, x7, x8, x9, x10, x11 and 4 more are each a linear combination of x1; x13, x16" in line


def test_tensorflow_is_not_imported() -> None:
    modules = "tapedist.results.coefficient_table, tapedist.regression.curvature"
    code = f"import sys, {modules}; print('tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
