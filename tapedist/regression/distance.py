"""How good learned parameters are: their distance to the optimum and to the truth, and their errors over rows.

The names of the optimum itself are handed on, so that users of the room need this door only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from tapedist.data.source import RowArrays
from tapedist.regression.double_double import Extended
from tapedist.regression.least_squares import LeastSquares, from_moments, least_squares

__all__ = [
    "AGREES_WITHIN",
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


# Learned parameters so near the optimum, in standard errors, are it for every purpose: one column shows both.
AGREES_WITHIN = 0.01


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far given parameters are from the optimum.

    Attributes:
        loss: data loss at the parameters, without penalty; None if it is not finite.
        excess_loss: how much of it is above the optimum's; None likewise.
        standard_errors: per parameter (weights, then the intercept if there is one) `|given - optimum|` in standard
            errors; None where that is undefined, as for aliased features.
        max_standard_errors: the largest of them; None if one is undefined. An aliased feature of weight 0 does not
            count; one of any other weight is as far from the optimum as nobody can tell.
    """

    loss: float | None
    excess_loss: float | None
    standard_errors: tuple[float | None, ...]
    max_standard_errors: float | None

    @property
    def agrees(self) -> bool:
        """Whether the parameters are the optimum to within `AGREES_WITHIN`."""
        return self.max_standard_errors is not None and self.max_standard_errors <= AGREES_WITHIN


def distance(fit: LeastSquares, weights: np.ndarray, bias: float | Extended = 0.0) -> Distance:
    """Distance of `weights [d]` and `bias`, float64 in raw units, to the optimum of `fit`.

    The differences are taken in extended precision, so that they mean something below one rounding of the parameters.
    """
    with np.errstate(all="ignore"):
        excess = fit.excess_loss(weights, bias)
        gaps = (Extended.of(weights) - fit.form.weights).hi.tolist()
        if fit.fit_intercept:
            gaps.append(float((Extended.of(bias) - fit.form.bias).hi))
    ratios = tuple(_ratio(abs(gap), c.standard_error) for gap, c in zip(gaps, fit.coefficients, strict=True))
    left_out = {j for j in fit.aliased if gaps[j] == 0}
    counted = [ratio for j, ratio in enumerate(ratios) if j not in left_out]
    defined = [ratio for ratio in counted if ratio is not None]
    largest = max(defined) if defined and len(defined) == len(counted) else None
    if not math.isfinite(fit.loss + excess):
        return Distance(None, None, ratios, largest)
    return Distance(fit.loss + excess, excess, ratios, largest)


def truth_errors(fit: LeastSquares, weights: np.ndarray, bias: float = 0.0) -> tuple[float | None, ...]:
    """`(optimum - truth) / standard error` per parameter, for data whose true `weights [d]` and `bias` are known.

    About 95 % of them lie within 2 of zero. None where undefined.
    """
    truth = [*np.asarray(weights, np.float64).tolist(), float(bias)]
    return tuple(_ratio(c.optimum - t, c.standard_error) for c, t in zip(fit.coefficients, truth, strict=False))


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
    blocks: Iterable[RowArrays], weights: np.ndarray, bias: float = 0.0, center: np.ndarray | float = 0.0
) -> ResidualMetrics | None:
    """One pass over `blocks` of rows (as `least_squares` takes them), predicted from `weights [d]` and the prediction
    `bias` at `center [d]`; None without rows.
    """
    sums, count, unit = Extended.zeros(3), 0, 0.0
    for x, y, w in blocks:
        used = np.ones(len(y)) if w is None else np.asarray(w, np.float64)
        x, y, used = x[used > 0], y[used > 0], used[used > 0]
        if not len(y):
            continue
        # Weights count in units of the largest power of two among them: neither their sum nor a product overflows.
        heaviest = float(np.ldexp(1.0, np.frexp(used.max())[1] - 1))
        if heaviest > unit:
            sums, unit = sums.scaled(unit / heaviest), heaviest
        used = used / unit
        residuals = np.abs(np.asarray(y, np.float64) - ((np.asarray(x, np.float64) - center) @ weights + bias))
        sums = sums + np.array([used.sum(), used @ residuals**2, used @ residuals])
        count += len(y)
    if not count:
        return None
    total, squares, absolute = sums.hi.tolist()
    return ResidualMetrics(count, total * unit, squares / total, math.sqrt(squares / total), absolute / total)


def as_dict(fit: LeastSquares) -> dict[str, Any]:
    """The result as plain JSON values: undefined ones are None, nothing is NaN or infinite."""
    skipped = ("form", "weights", "coefficients", "names", "aliased", "combinations")
    fields = {f.name: getattr(fit, f.name) for f in dataclasses.fields(fit) if f.name not in skipped}
    values = {
        **fields,
        "names": list(fit.names),
        "weights": fit.weights.tolist(),
        "aliased": [
            {"feature": feature, "name": fit.names[feature], "because": reason}
            for feature, reason in zip(fit.aliased, fit.aliased_because(), strict=True)
        ],
        "coefficients": [dataclasses.asdict(c) for c in fit.coefficients],
    }
    return _finite(values)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
