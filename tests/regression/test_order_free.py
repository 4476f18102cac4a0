"""What NumPy decides about a run has no order of rows and no library's bits: units, survey, rates, metric, gaps."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tapedist.data import exact_moments, source
from tapedist.data.array_source import ArraySource
from tapedist.data.exact_moments import ExactMoments
from tapedist.data.ranges import ranges
from tapedist.data.standardize import ColumnMoments, StandardUnits
from tapedist.errors import InputError
from tapedist.regression import metric, summary
from tapedist.regression.curvature import curvature, inverse_hessian, power_iteration

_N = 700


def _numbers(count: int, seed: int) -> np.ndarray:
    """About normally distributed, float64 `[count]`: by integers, because the random draws of libraries may change."""
    words = (np.arange(count * 4, dtype=np.uint64) + np.uint64(seed * 1_000_003)) * np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    halves = (words >> np.uint64(11)).astype(np.float64) / 2.0**53 - 0.5
    return ((halves[0::4] + halves[1::4]) + halves[2::4]) + halves[3::4]


def _table(*, weighted: bool) -> tuple[np.ndarray, ...]:
    a, b, c, noise = (_numbers(_N, seed) for seed in range(4))
    x = np.stack([a * 3 + 1000, b + a, 1e-5 * c, np.full(_N, 0.3), a - 2 * b], axis=1)
    y = (x[:, 0] - 2 * x[:, 1]) + (1e5 * x[:, 2] + noise)
    rows = (x, y)
    if weighted:
        weights = np.abs(_numbers(_N, 9)) * 5
        weights[::7] = 0.0
        rows = (*rows, weights)
    return rows


def _found(rows: tuple[np.ndarray, ...], *, fit_intercept: bool, slices: int) -> dict[str, Any]:
    """All that is decided of these rows, as text that shows every bit."""
    source = ArraySource(*rows)
    known = ranges(source, "train")
    moments = exact_moments.exact_moments(source, known, num_slices=slices)
    surveyed = summary.survey(source, moments, fit_intercept=fit_intercept)
    assert surveyed
    fit = surveyed.fit
    columns = ColumnMoments.of(source)
    units = StandardUnits.of(source, fit_intercept=fit_intercept, columns=columns, left_out=fit.aliased)
    measured = metric.Metric(fit, units)
    count = source.num_features + fit_intercept
    at, l2 = np.linspace(-1.0, 1.0, count), np.full(count, 0.125)
    l2[source.num_features :] = 0.0
    gaps = [
        metric.NewtonGap(measured, source, delta=delta, l2=penalty)(at)
        for delta in (np.inf, 2.0)
        for penalty in (l2, 0 * l2)
    ]
    centred = np.ldexp(moments.centred()[0], np.add.outer(moments.exponents, moments.exponents))
    curved = curvature(
        sum_weights=float(moments.total()[0]), means=moments.means()[0], centred=centred, fit_intercept=fit_intercept
    )
    results = {
        "units": [units.center, units.scale, [units.target_center]],
        "fit": [fit.weights, [fit.bias, fit.loss, fit.condition_number], fit.aliased, fit.combinations],
        "errors": [[c.standard_error or 0.0 for c in fit.coefficients]],
        "curvature": [[curved.lambda_max, curved.lambda_min, curved.lambda_min_curved]],
        "metric": [measured.inverse_hessian(), measured.inverse_hessian(l2[: source.num_features])],
        "length": [[measured.length(at), measured.target_deviation]],
        "leverage": [[metric.largest_leverage(source, fit)]],
        "share": [[metric.share_of_small_residuals(source, measured, 0.3)]],
        "gaps": gaps,
    }
    return {name: [_bits(part) for part in parts] for name, parts in results.items()}


def _bits(part: Any) -> Any:
    if isinstance(part, (tuple, list)):
        return [_bits(value) for value in part]
    return part.hex() if isinstance(part, float) else np.asarray(part).astype("<f8").tobytes().hex()


@pytest.mark.parametrize("slices", [3, 6])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
def test_rows_have_no_order(intercept: bool, weighted: bool, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _table(weighted=weighted)
    expected = _found(rows, fit_intercept=intercept, slices=slices)
    assert json.dumps(expected).count("nan") == 0
    for size in (37, 256):
        monkeypatch.setattr(source, "row_ranges", _small_ranges(size))
        monkeypatch.setattr(exact_moments, "SLICE_ROWS", size)
        monkeypatch.setattr(exact_moments, "_LEAST_ROWS", 1)
        order = np.random.default_rng(size).permutation(_N)
        assert _found(tuple(part[order] for part in rows), fit_intercept=intercept, slices=slices) == expected


def _small_ranges(size: int) -> Any:
    def row_ranges(source: Any, split: str, **_: Any) -> Iterator[range]:
        n = source.num_rows(split)
        for first in range(0, n, size):
            yield range(first, min(first + size, n))

    return row_ranges


def _surroundings() -> list[dict[str, str]]:
    found = [{"OPENBLAS_NUM_THREADS": threads} for threads in "12"]
    if platform.machine() in ("x86_64", "AMD64"):
        found += [{"OPENBLAS_CORETYPE": kind} for kind in ("Prescott", "Haswell", "Zen")]
        found += [{"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX", "OPENBLAS_CORETYPE": "Nehalem"}]
    return found


def test_no_library_has_a_say() -> None:
    program = (
        "import json, sys; sys.path.insert(0, 'tests/regression'); import test_order_free as t\n"
        "print(json.dumps([t._found(t._table(weighted=w), fit_intercept=i, slices=s) for w, i, s in "
        "((False, True, 3), (True, True, 6), (True, False, 3))] + [t.many_features()]))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program], env={**os.environ, **other}, stdout=subprocess.PIPE
        )
        for other in _surroundings()
    ]
    found = [process.communicate()[0] for process in running]
    assert all(found)
    assert len(set(found)) == 1


def many_features() -> list[Any]:
    """Of more features than the tables above have."""
    x = _numbers(90 * 200, 5).reshape(200, 90)
    rows = (x, x[:, 0] + _numbers(200, 6))
    source = ArraySource(*rows)
    moments = exact_moments.exact_moments(source, ranges(source, "train"))
    centred = np.ldexp(moments.centred()[0], np.add.outer(moments.exponents, moments.exponents))
    curved = curvature(sum_weights=200.0, means=moments.means()[0], centred=centred, l2=0.5)
    matrix = inverse_hessian(centred[:-1, :-1] / 200, means=moments.means()[0][:-1], l2=0.5)
    largest = power_iteration(lambda: [rows], num_features=90, iterations=3)
    return [_bits([curved.lambda_max, curved.lambda_min, largest]), _bits(matrix)]


def test_units_are_rounded_once() -> None:
    """Means and deviations are the float64 numbers nearest to the exact ones, but for the root's own rounding."""

    source = ArraySource(*_table(weighted=True))
    columns = ColumnMoments.of(source)
    x, y, w = (np.asarray(part) for part in _table(weighted=True))
    weights = [Fraction(v) for v in w.tolist()]
    for place, column in enumerate([*x.T, y]):
        values = [Fraction(v) for v in column.tolist()]
        mean = sum(a * b for a, b in zip(weights, values, strict=True)) / sum(weights)
        variance = sum(a * (b - mean) ** 2 for a, b in zip(weights, values, strict=True)) / sum(weights)
        assert columns.means[place] == float(mean)
        assert columns.deviations[place] == pytest.approx(float(np.sqrt(float(variance))), rel=3e-16)


def test_one_pass_says_what_many_passes_say() -> None:
    source = ArraySource(*_table(weighted=False))
    known = ranges(source, "train")
    whole = ColumnMoments.of_exact(exact_moments.exact_moments(source, known))
    single = ColumnMoments.of(source)
    for field in ("means", "deviations", "sizes"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(single, field))


def test_rows_beyond_their_ranges_are_refused() -> None:
    source = ArraySource(*_table(weighted=False))
    moments = ExactMoments(ranges(source, "train"), names=source.feature_names)

    with pytest.raises(InputError, match=r"'x1': .*its rows have changed since they were first read"):
        moments.add(np.full([6, 1], [[1000.0], [50.0], [0.0], [0.3], [0.0], [1000.0]]))
