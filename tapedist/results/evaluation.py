"""How well a fitted model predicts rows: one pass, in constant memory. Imports no TensorFlow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from tapedist.data.row_arrays import RowArrays
from tapedist.results.prediction import predict_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """Weighted errors over rows. What is undefined is None, never NaN.

    Attributes:
        num_rows: rows of positive weight.
        mse: mean squared error.
        rmse: its square root.
        mae: mean absolute error.
        r2: `1 - sum w r**2 / sum w (y - mean)**2`; None where all targets are equal.
    """

    num_rows: int
    mse: float
    rmse: float
    mae: float
    r2: float | None

    def line(self, name: str) -> str:
        """What the console shows."""
        r2 = "undefined" if self.r2 is None else f"{self.r2:.6g}"
        return f"{name}: {self.num_rows} rows, MSE {self.mse:.6g}, RMSE {self.rmse:.6g}, MAE {self.mae:.6g}, R2 {r2}"


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
    mean, spread = 0.0, 0.0
    for x, y, w in blocks:
        used = np.ones(len(y)) if w is None else w
        weight = float(used.sum())
        if not weight > 0:
            continue
        residuals = np.abs(y - predict_rows(x, weights, bias, center))
        squares += float((used * residuals**2).sum())
        absolute += float((used * residuals).sum())
        # Merged as by Chan, Golub and LeVeque (1979), so that a large common part of the targets cancels nothing.
        block_mean = y[0] + float((used * (y - y[0])).sum()) / weight
        gap, both = block_mean - mean, total + weight
        spread += float((used * (y - block_mean) ** 2).sum()) + gap**2 * (total * weight / both)
        mean += gap * weight / both
        total = both
        count += int((used > 0).sum())
    if not count:
        return None
    mse = squares / total
    r2 = 1 - squares / spread if spread > 0 and math.isfinite(squares) else None
    return Metrics(num_rows=count, mse=mse, rmse=math.sqrt(mse), mae=absolute / total, r2=r2)
