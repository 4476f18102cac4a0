"""oneDAL's `LinearRegression` (scikit-learn-intelex) on float64 rows."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import peer_sklearn
from peer import Work
from sklearnex.linear_model import LinearRegression

VERSION = f"scikit-learn-intelex {importlib.metadata.version('scikit-learn-intelex')}"


def make(task: dict[str, Any]) -> Work:
    return peer_sklearn.make(task, LinearRegression)
