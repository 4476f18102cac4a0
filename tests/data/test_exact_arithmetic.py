"""Exact sums against fractions, folded ones against their definition, singular values against LAPACK's."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tapedist.data.exact_arithmetic import (
    ExactSums,
    chain,
    eliminated,
    exponent_above,
    folded,
    outer_sum,
    rounded,
    sliced_product,
    slices,
)
from tapedist.regression.curvature import condition, extremes

_RANDOM = np.random.default_rng(7)


def _fold(values: list[float]) -> float:
    width = 1
    while width < len(values):
        width *= 2
    values = values + [0.0] * (width - len(values))
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100, 513])
def test_folded_is_a_fixed_tree(size: int) -> None:
    values = _RANDOM.normal(size=(3, size)) * 10.0 ** _RANDOM.integers(-9, 9, size=(3, size))
    assert folded(values).tolist() == [_fold(row) for row in values.tolist()]
    assert folded(values.T, axis=0).tolist() == folded(values).tolist()
    assert folded(np.zeros([2, 0])).tolist() == [0.0, 0.0]


def test_slices_add_up_to_the_numbers() -> None:
    high = _RANDOM.uniform(-1, 1, size=200) * 2.0 ** _RANDOM.integers(-40, 1, size=200)
    low = high * 2.0**-54 * _RANDOM.uniform(-1, 1, size=200)
    high[:3], low[:3] = [1.0, -1.0, 0.0], 0.0
    cut = [*slices(high, low, 6)]
    assert max(float(np.abs(part).max()) for part in cut) <= 2**20
    for place in range(200):
        found = sum(Fraction(float(part[place])) / 2 ** (20 + 21 * a) for a, part in enumerate(cut))
        assert abs(found - Fraction(float(high[place])) - Fraction(float(low[place]))) <= Fraction(1, 2**126)


def test_exact_sums_are_the_rounded_exact_ones_in_any_order() -> None:
    terms = np.round(_RANDOM.uniform(-3, 3, size=(2, 40_000)) * 2.0**30) / 2.0**30
    orders = []
    for order in (np.arange(40_000), _RANDOM.permutation(40_000)):
        sums = ExactSums(np.array([3.0, 1e5]))
        for part in np.array_split(terms[:, order], 7, axis=1):
            sums.add(part)
        orders.append(sums.values().tolist())
    assert orders[0] == orders[1] == [math.fsum(row) for row in terms]


def test_rounded_quotients() -> None:
    numerators = np.array([0, 1, -7, 10**40 + 1, -(2**300)], object)
    high, low = rounded(numerators, 3, -5)
    for place, numerator in enumerate(numerators):
        exact = Fraction(numerator, 96)
        assert high[place] == float(exact)
        assert low[place] == float(exact - Fraction(high[place]))


def test_exponents_and_products() -> None:
    assert exponent_above(np.array([0.0, 1.0, 1.5, 2.0, -0.25, 5e-324])).tolist() == [0, 0, 1, 1, -2, -1074]
    x, matrix = _RANDOM.normal(size=(50, 9)) * 1e5, _RANDOM.normal(size=(9, 4))
    bounds = np.abs(x).max(axis=0)
    np.testing.assert_allclose(sliced_product(x, matrix, bounds), x @ matrix, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(outer_sum(x, x), x @ x.T, rtol=1e-10, atol=1e-5)
    assert chain(x, matrix[:, 0], 2.0)[0] == sum((a * b for a, b in zip(x[0], matrix[:, 0], strict=True)), start=2.0)
    spread = x.T @ x
    found, pivots = eliminated(spread, matrix)
    np.testing.assert_allclose(found, np.linalg.solve(spread, matrix), rtol=1e-9)
    assert (pivots > 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (9, 5), (4, 9), (60, 60)])
def test_singular_values_equal_lapack(shape: tuple[int, int]) -> None:
    matrix = _RANDOM.normal(size=shape)
    expected = np.linalg.svd(matrix, compute_uv=False)
    largest, least, count = extremes(matrix)
    assert (largest, least) == pytest.approx((expected[0], expected[-1]), rel=1e-12)
    assert count == min(shape)
    if shape[0] >= shape[1]:
        assert condition(matrix) == pytest.approx(expected[0] / expected[-1], rel=1e-12)


def test_singular_values_that_are_nothing() -> None:
    column = _RANDOM.normal(size=(7, 1))
    largest, least, count = extremes(np.hstack([column, 2 * column, np.zeros([7, 2])]))
    assert largest == least == pytest.approx(math.sqrt(5) * np.linalg.norm(column), rel=1e-14)
    assert count == 1
    assert extremes(np.zeros([3, 2])) == (0.0, 0.0, 0)
    assert condition(np.zeros([3, 2])) == math.inf
