"""Stability bounds: the Hessian against the definition, the bounds against iterations just below and above them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tapedist.regression.curvature import Curvature, curvature, hessian

_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(size=(50, 3)) @ _RANDOM.normal(size=(3, 3)) + 2
_Y = _RANDOM.normal(size=50)
_W = _RANDOM.uniform(0.5, 2, size=50)


def _moments(x: np.ndarray, y: np.ndarray = _Y, w: np.ndarray = _W) -> dict[str, Any]:
    table = np.column_stack([x, y])
    means = w @ table / w.sum()
    return {"sum_weights": w.sum(), "means": means, "centred": (table - means).T @ ((table - means) * w[:, None])}


@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("intercept", [False, True])
def test_hessian_is_that_of_the_loss(intercept: bool, l2: float) -> None:
    design = np.column_stack([_X, np.ones(50)]) if intercept else _X
    penalty = np.diag([l2] * 3 + [0.0] * intercept)
    expected = 2 * (design.T @ (design * _W[:, None]) / _W.sum() + penalty)
    np.testing.assert_allclose(hessian(**_moments(_X), fit_intercept=intercept, l2=l2), expected, rtol=1e-12)
    found = curvature(**_moments(_X), fit_intercept=intercept, l2=l2)
    eigenvalues = np.linalg.eigvalsh(expected)
    assert found.lambda_max == pytest.approx(eigenvalues[-1], rel=1e-12)
    assert found.lambda_min == found.lambda_min_curved == pytest.approx(eigenvalues[0], rel=1e-10)
    assert found.auto_rate == pytest.approx(2 / (eigenvalues[0] + eigenvalues[-1]), rel=1e-12)


def test_small_curvature_survives_large_means() -> None:
    """With a mean of 1e6 the smallest eigenvalue is about 2 var / mean**2 = 2e-12, of a largest of 2e12."""
    found = curvature(**_moments(_X[:, :1] / _X[:, :1].std() + 1e6))
    covariance = np.average((_X[:, 0] - np.average(_X[:, 0], weights=_W)) ** 2, weights=_W) / _X[:, 0].var()
    # The product of the two eigenvalues is the determinant, 4 var.
    assert found.lambda_min * found.lambda_max == pytest.approx(4 * covariance, rel=1e-4)


def test_flat_directions_are_told_apart() -> None:
    found = curvature(**_moments(np.column_stack([_X[:, 0], 2 * _X[:, 0] + 1])))
    assert found.lambda_min == 0
    assert 0 < found.lambda_min_curved <= found.lambda_max
    assert found.auto_rate is not None
    assert found.auto_rate < found.stable_bound("sgd")
    flat = curvature(**_moments(np.zeros((50, 2))), fit_intercept=False)
    assert (flat.lambda_max, flat.auto_rate, flat.stable_bound("sgd")) == (0.0, None, None)
    assert curvature(**_moments(np.zeros((50, 2)))).lambda_max == pytest.approx(2.0)


def _norm_after(optimizer: str, rate: float, h: float, momentum: float, steps: int = 4000) -> float:
    """Distance to the optimum of the loss `h theta**2 / 2` after some steps from 1."""
    theta, velocity = 1.0, 0.0
    for _ in range(steps):
        if optimizer == "sgd":
            theta -= rate * h * theta
            continue
        ahead = theta + momentum * velocity if optimizer == "nesterov" else theta
        velocity = momentum * velocity - rate * h * ahead
        theta += velocity
        if not math.isfinite(theta) or abs(theta) > 1e30:
            return math.inf
    return abs(theta)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov"])
def test_the_bound_parts_convergence_from_divergence(optimizer: str, momentum: float) -> None:
    bound = Curvature(7.0, 0.1, 0.1).stable_bound(optimizer, momentum)
    assert bound is not None
    assert _norm_after(optimizer, 0.98 * bound, 7.0, momentum) < 1e-3
    assert _norm_after(optimizer, 1.02 * bound, 7.0, momentum) > 1e3


def test_other_optimizers_have_no_bound() -> None:
    assert Curvature(7.0, 0.1, 0.1).stable_bound("adam") is None
