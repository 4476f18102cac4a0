"""How well a fitted model predicts rows: one pass, in constant memory. Imports no TensorFlow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from tapedist.data.source import RowArrays
from tapedist.regression.prediction import predict_rows


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
        """R2 by name: without an intercept there are two of them, and either is called R2 somewhere."""
        if fit_intercept:
            return {"R2": self.r2}
        return {"R2 about 0": self.r2_about_zero, "R2 about the mean": self.r2}

    def line(self, name: str, *, fit_intercept: bool = True) -> str:
        """What the console shows of a model with or without an intercept."""
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
        # Weights count in units of the largest power of two among them: neither their sum nor a product overflows.
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
        # Merged as by Chan, Golub and LeVeque (1979), so that a large common part of the targets cancels nothing.
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
