"""scikit-learn's `LinearRegression` on float64 rows."""

from __future__ import annotations

from typing import Any

import sklearn
from peer import Work, make_rows
from sklearn.linear_model import LinearRegression

VERSION = f"scikit-learn {sklearn.__version__}"


def make(task: dict[str, Any], estimator: Any = LinearRegression) -> Work:
    x, y = make_rows(task["n"], task["d"], "float64")
    return Work(lambda: {"weight": float(estimator().fit(x, y).coef_[0])})
