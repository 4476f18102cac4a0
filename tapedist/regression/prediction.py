"""What a linear model predicts, with the same bits wherever it is computed, and how sure that is; no TensorFlow here.

Legend: `k` rows, `d` features, `r` the rank.

A prediction is `(((x_1 - c_1) w_1 + (x_2 - c_2) w_2) + ...) + b`, each operation in float64, in this order, where `b`
is the prediction at the center `c`. The intercept, which is the prediction at zero, has no digits left for rows that
are far from zero, as times in microseconds are. A product of matrices would be faster, but its order of sums, and so
its bits, depend on how many rows it is given. `export` says the same in TensorFlow.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tapedist.errors import InputError
from tapedist.regression.inference import student_t_quantile
from tapedist.regression.least_squares import LeastSquares


def predict_rows(x: Any, weights: np.ndarray, bias: float, center: np.ndarray | None = None) -> np.ndarray:
    """Predictions float64 `[k]`, in raw units.

    Args:
        x: `[k, d]`, anything that converts to float64.
        weights: float64 `[d]`.
        bias: the prediction at `center`; 0.0 if the model has no bias.
        center: float64 `[d]`, subtracted from the features; None subtracts nothing, and so do zeros.

    Raises:
        InputError: if `x` is not of shape `[k, d]`.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[1] != len(weights):
        raise InputError(f"x: has shape {list(x.shape)}; must be [rows, {len(weights)}], one column per feature")
    center = np.zeros(len(weights)) if center is None else center
    total = (x[:, 0] - center[0]) * weights[0]
    for j in range(1, len(weights)):
        total += (x[:, j] - center[j]) * weights[j]
    return total + bias


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class IntervalShape:
    """What an interval needs of a least-squares fit.

    For a row `x`, the variance of the mean response is `residual_std**2 * (|inverse' (x - means)|**2 + at_means)`; a
    new row of weight 1 adds `residual_std**2` (Draper and Smith, "Applied Regression Analysis", 3rd ed., 3.1). Aliased
    features play no part.

    Attributes:
        means: float64 `[d]`.
        inverse: float64 `[d, r]`; rows of aliased features are 0.
        at_means: leverage at the means.
        residual_std: of one row of weight 1.
        degrees_of_freedom: of the residuals, at least 1.
    """

    means: np.ndarray
    inverse: np.ndarray
    at_means: float
    residual_std: float
    degrees_of_freedom: int

    @classmethod
    def of(cls, fit: LeastSquares) -> IntervalShape | None:
        """The shape of a fit; None where its intervals are undefined."""
        if fit.residual_std is None:
            return None
        form = fit.form
        return cls(
            means=np.asarray(form.means.hi, np.float64),
            inverse=np.asarray(form.inverse.hi, np.float64) / np.sqrt(form.weight_scale),
            at_means=form.intercept_at_means / form.weight_scale,
            residual_std=fit.residual_std,
            degrees_of_freedom=fit.degrees_of_freedom,
        )

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "means": self.means.tolist(), "inverse": self.inverse.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> IntervalShape:
        arrays = {name: np.asarray(content[name], np.float64) for name in ("means", "inverse")}
        return cls(**{**content, **arrays})

    def margins(self, x: np.ndarray, *, level: float) -> np.ndarray:
        """Half widths `[k]` of the prediction intervals of new rows `x [k, d]` of weight 1."""
        leverage = (((np.asarray(x, np.float64) - self.means) @ self.inverse) ** 2).sum(axis=1) + self.at_means
        return student_t_quantile(self.degrees_of_freedom, level) * self.residual_std * np.sqrt(1 + leverage)
