"""How good learned parameters are: their distance to the optimum and to the truth, and their errors over rows.

The names of the optimum itself are handed on, so that users of the room need this door only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from tapedist.results.extended import Extended
from tapedist.results.extended_moments import Rows
from tapedist.results.least_squares import LeastSquares, from_moments, least_squares

__all__ = [
    "Distance",
    "LeastSquares",
    "ResidualMetrics",
    "as_dict",
    "distance",
    "from_moments",
    "least_squares",
    "residual_metrics",
    "truth_errors",
]


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far given parameters are from the optimum.

    Attributes:
        loss: data loss at the parameters, without penalty; None if it is not finite.
        excess_loss: how much of it is above the optimum's; None likewise.
        standard_errors: per parameter (weights, then the intercept if there is one) `|given - optimum|` in standard
            errors; None where that is undefined.
        max_standard_errors: the largest of them; None if one is undefined or the optimum is not unique.
    """

    loss: float | None
    excess_loss: float | None
    standard_errors: tuple[float | None, ...]
    max_standard_errors: float | None


def distance(fit: LeastSquares, weights: np.ndarray, bias: float | Extended = 0.0) -> Distance:
    """Distance of `weights [d]` and `bias`, float64 in raw units, to the optimum of `fit`.

    The differences are taken in extended precision, so that they mean something below one rounding of the parameters.
    """
    with np.errstate(all="ignore"):
        excess = fit.excess_loss(weights, bias)
        gaps = (Extended.of(weights) - fit.form.weights).hi.tolist()
        if fit.fit_intercept:
            gaps.append(float((Extended.of(bias) - fit.form.bias).hi))
    # Without coefficients there is nothing to count in, whatever the parameters.
    ratios = tuple(_ratio(abs(gap), c.standard_error) for gap, c in zip(gaps, fit.coefficients, strict=False))
    defined = [r for r in ratios if r is not None]
    largest = max(defined) if defined and len(defined) == len(ratios) else None
    if not math.isfinite(fit.loss + excess):
        return Distance(None, None, ratios, largest)
    return Distance(fit.loss + excess, excess, ratios, largest)


def truth_errors(fit: LeastSquares, weights: np.ndarray, bias: float = 0.0) -> tuple[float | None, ...]:
    """`(optimum - truth) / standard error` per parameter, for data whose true `weights [d]` and `bias` are known.

    About 95 % of them lie within 2 of zero. None where undefined; empty if the optimum is not unique.
    """
    truth = [*np.asarray(weights, np.float64).tolist(), float(bias)]
    return tuple(_ratio(c.estimate - t, c.standard_error) for c, t in zip(fit.coefficients, truth, strict=False))


def _ratio(gap: float, standard_error: float | None) -> float | None:
    if standard_error is None:
        return None
    if standard_error == 0:
        return 0.0 if gap == 0 else None
    ratio = gap / standard_error
    return ratio if math.isfinite(ratio) else None


@dataclasses.dataclass(frozen=True)
class ResidualMetrics:
    """Errors of given parameters over rows, weighted.

    Attributes:
        num_rows: rows of positive weight.
        sum_weights: sum of the weights.
        loss: mean squared error.
        rmse: its square root.
        mae: mean absolute error.
    """

    num_rows: int
    sum_weights: float
    loss: float
    rmse: float
    mae: float


def residual_metrics(
    blocks: Iterable[Rows], weights: np.ndarray, bias: float = 0.0, center: np.ndarray | float = 0.0
) -> ResidualMetrics | None:
    """One pass over `blocks` of rows (as `least_squares` takes them), predicted from `weights [d]` and the prediction
    `bias` at `center [d]`; None without rows.
    """
    sums, count = Extended.zeros(3), 0
    for x, y, w in blocks:
        used = np.ones(len(y)) if w is None else np.asarray(w, np.float64)
        x, y, used = x[used > 0], y[used > 0], used[used > 0]
        residuals = np.abs(np.asarray(y, np.float64) - ((np.asarray(x, np.float64) - center) @ weights + bias))
        sums = sums + np.array([used.sum(), used @ residuals**2, used @ residuals])
        count += len(y)
    total, squares, absolute = sums.hi.tolist()
    if not count:
        return None
    return ResidualMetrics(count, total, squares / total, math.sqrt(squares / total), absolute / total)


def as_dict(fit: LeastSquares) -> dict[str, Any]:
    """The result as plain JSON values: undefined ones are None, nothing is NaN or infinite."""
    skipped = ("form", "weights", "coefficients", "names")
    fields = {f.name: getattr(fit, f.name) for f in dataclasses.fields(fit) if f.name not in skipped}
    values = {
        **fields,
        "names": list(fit.names),
        "weights": None if fit.weights is None else fit.weights.tolist(),
        "coefficients": [dataclasses.asdict(c) for c in fit.coefficients],
    }
    return _finite(values)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
