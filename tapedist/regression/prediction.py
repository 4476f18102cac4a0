"""Predictions of a linear model with the same bits everywhere, their intervals, and measures of fit.

A prediction is `(((x_1 - c_1) w_1 + (x_2 - c_2) w_2) + ...) + b`, each operation in float64, in this order, where `b`
is the prediction at the center `c`. With the intercept, which is the prediction at zero, the sum would cancel for rows
that are far from zero, such as times in microseconds. A product of matrices would be faster, but its order of sums, and
so its bits, depend on the number of rows. `export` does the same in TensorFlow; nothing here imports it.

Legend: `k` rows, `d` features, `r` the rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from tapedist.data.source import RowArrays
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
    """The part of a least-squares fit that intervals depend on.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """Weighted errors over rows. What is undefined is None, never NaN.

    Attributes:
        num_rows: rows of positive weight.
        mse: mean squared error.
        rmse: its square root.
        mae: mean absolute error.
        r2: `1 - sum w r**2 / sum w (y - mean)**2`; None where all targets are equal.
        r2_about_zero: `1 - sum w r**2 / sum w y**2`; None where all targets are 0.
    """

    num_rows: int
    mse: float
    rmse: float
    mae: float
    r2: float | None
    r2_about_zero: float | None

    def all_r2(self, *, fit_intercept: bool) -> dict[str, float | None]:
        """R2 by name: without an intercept there are two of them, and other programs report either as R2."""
        if fit_intercept:
            return {"R2": self.r2}
        return {"R2 about 0": self.r2_about_zero, "R2 about the mean": self.r2}

    def line(self, name: str, *, fit_intercept: bool = True) -> str:
        """The console's line for a model with or without an intercept."""
        all_r2 = (
            f"{words} {'undefined' if r2 is None else format(r2, '.6g')}"
            for words, r2 in self.all_r2(fit_intercept=fit_intercept).items()
        )
        errors = f"MSE {self.mse:.6g}, RMSE {self.rmse:.6g}, MAE {self.mae:.6g}"
        return f"{name}: {self.num_rows} rows, {errors}, {', '.join(all_r2)}"


def evaluate_rows(
    blocks: Iterable[RowArrays], weights: np.ndarray, bias: float, center: np.ndarray | None = None
) -> Metrics | None:
    """The metrics of a linear model over `blocks` of rows `(x [k, d], y [k], w [k] or None)`; None without rows.

    Args:
        blocks: the rows, raw.
        weights: float64 `[d]`, raw units.
        bias: see `predict_rows`, as for `center`.
        center: float64 `[d]`, or None.
    """
    count, total, squares, absolute = 0, 0.0, 0.0, 0.0
    mean, spread, unit = 0.0, 0.0, 0.0
    for x, y, w in blocks:
        used = np.ones(len(y)) if w is None else np.asarray(w, np.float64)
        x, y, used = x[used > 0], y[used > 0], used[used > 0]
        if not len(y):
            continue
        # Weights are divided by the largest power of two among them, so that neither their sum nor a product overflows.
        heaviest = float(np.ldexp(1.0, np.frexp(used.max())[1] - 1))
        if heaviest > unit:
            shrink = unit / heaviest
            total, squares, absolute, spread = total * shrink, squares * shrink, absolute * shrink, spread * shrink
            unit = heaviest
        used = used / unit
        weight = float(used.sum())
        residuals = np.abs(y - predict_rows(x, weights, bias, center))
        squares += float((used * residuals**2).sum())
        absolute += float((used * residuals).sum())
        # Merged as by Chan, Golub and LeVeque (1979), so that targets far from 0 do not cancel.
        block_mean = y[0] + float((used * (y - y[0])).sum()) / weight
        gap, both = block_mean - mean, total + weight
        spread += float((used * (y - block_mean) ** 2).sum()) + gap**2 * (total * weight / both)
        mean += gap * weight / both
        total = both
        count += len(y)
    if not count:
        return None
    mse, about_zero = squares / total, spread + mean**2 * total
    known = math.isfinite(squares)
    return Metrics(
        num_rows=count,
        mse=mse,
        rmse=math.sqrt(mse),
        mae=absolute / total,
        r2=1 - squares / spread if spread > 0 and known else None,
        r2_about_zero=1 - squares / about_zero if about_zero > 0 and known else None,
    )
