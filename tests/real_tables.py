"""Tables that packages of the test environment ship, and references for a finished fit of them.

Nothing here uses tapedist.
"""

from __future__ import annotations

import numpy as np
import pandas as pd


def fair() -> tuple[pd.DataFrame, str]:
    """6,366 answers to a magazine's questions, 8 features (Fair 1978, by statsmodels)."""
    from statsmodels.datasets import fair

    return fair.load_pandas().data, "affairs"


def diabetes() -> tuple[pd.DataFrame, str]:
    """442 patients, 10 features, of which six blood values are close to collinear (by scikit-learn)."""
    from sklearn.datasets import load_diabetes

    return load_diabetes(as_frame=True).frame, "target"


def longley() -> tuple[pd.DataFrame, str]:
    """16 years of the economy, 6 features of condition number 1e5 (Longley 1967, by statsmodels)."""
    from statsmodels.datasets import longley

    return longley.load_pandas().data, "TOTEMP"


def departures(rows: int = 4000) -> tuple[pd.DataFrame, str]:
    """Made like the flights of New York: a constant year, an hour and a minute that make up the time, outliers."""
    random = np.random.default_rng(7)
    hour, minute = random.integers(5, 24, rows), random.integers(0, 60, rows)
    late, far = random.gamma(1.0, 20.0, rows) - 10, random.uniform(100, 3000, rows)
    noise = random.standard_t(3, rows) * 12
    table = {
        "year": 2013, "hour": hour, "time": 100 * hour + minute, "minute": minute, "late": late, "distance": far,
        "arrival": 1.02 * late - 0.002 * far + 0.2 * hour + noise,
    }  # fmt: skip
    return pd.DataFrame(table), "arrival"


TABLES = {"fair": fair, "diabetes": diabetes, "longley": longley, "departures": departures}


class Reference:
    """Least squares or the huber loss on standardized columns, with those that `lm` would leave out at weight 0.

    Attributes:
        left_out: numbers of the aliased features, by Gram and Schmidt from left to right, tolerance 1e-7.
        parameters: float64 `[d + 1]`, raw units.
        errors: standard errors of least squares, 0 for aliased features.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, *, huber_delta: float | None = None):
        kept, self.left_out = _kept(x)
        center, scale = x[:, kept].mean(axis=0), x[:, kept].std(axis=0)
        z = np.column_stack([(x[:, kept] - center) / scale, np.ones(len(y))])
        solution = np.linalg.lstsq(z, y, rcond=None)[0]
        variance = ((y - z @ solution) ** 2).sum() / (len(y) - z.shape[1])
        back = np.diag(np.append(1 / scale, 1.0))
        back[-1, :-1] = -center / scale
        errors = np.sqrt(np.diag(back @ np.linalg.inv(z.T @ z) @ back.T) * variance)
        if huber_delta is not None:
            solution = _huber(z, y, solution, huber_delta)
        places = [*kept, x.shape[1]]
        self.parameters, self.errors = np.zeros(x.shape[1] + 1), np.zeros(x.shape[1] + 1)
        self.parameters[places], self.errors[places] = back @ solution, errors

    def distance(self, parameters: np.ndarray) -> float:
        """The largest distance of parameters `[d + 1]` in standard errors; aliased ones must be 0."""
        assert not parameters[self.left_out].any()
        kept = self.errors > 0
        return float((np.abs(parameters - self.parameters)[kept] / self.errors[kept]).max())


def _kept(x: np.ndarray) -> tuple[list[int], list[int]]:
    kept, left_out, basis = [], [], [np.full(len(x), len(x) ** -0.5)]
    for j, column in enumerate(x.T):
        rest = column - column.mean()
        length = np.linalg.norm(rest)
        for _ in range(2):
            for direction in basis:
                rest = rest - direction * (direction @ rest)
        if np.linalg.norm(rest) <= 1e-7 * length:
            left_out.append(j)
        else:
            kept.append(j)
            basis.append(rest / np.linalg.norm(rest))
    return kept, left_out


def _huber(z: np.ndarray, y: np.ndarray, start: np.ndarray, delta: float) -> np.ndarray:
    """Iteratively reweighted least squares, with a step of Newton's method where it lowers the loss."""

    def loss(at: np.ndarray) -> float:
        size = np.abs(y - z @ at)
        near = np.minimum(size, delta)
        return float((near * (size - near / 2)).sum())

    for _ in range(5000):
        weights = np.minimum(1.0, delta / np.maximum(np.abs(y - z @ start), delta))
        found = np.linalg.solve((z * weights[:, None]).T @ z, (z * weights[:, None]).T @ y)
        inside = np.abs(y - z @ found) <= delta
        gradient = z.T @ np.clip(y - z @ found, -delta, delta)
        step = np.linalg.lstsq(z[inside].T @ z[inside], gradient, rcond=None)[0]
        found = found + step if loss(found + step) < loss(found) else found
        if np.abs(found - start).max() <= 1e-12 * np.abs(found).max():
            return found
        start = found
    return start
