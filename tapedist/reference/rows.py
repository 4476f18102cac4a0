"""Rows as training sees them, and what is known of them before any is summed.

Legend: `k` rows of a chunk, `d` features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tapedist.reference.exact import Kind, flush

Chunk = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # x [k, d], y [k], and w [k] where rows have weights.


def as_dtype(values: Any, kind: Kind) -> np.ndarray:
    """Numbers as training sees them, in float64."""
    with np.errstate(over="ignore"):
        return flush(np.asarray(values).astype(kind.dtype).astype(np.float64), kind.least)


def standardized(
    x: np.ndarray, y: np.ndarray, *, center: np.ndarray, factor: np.ndarray, target_center: float
) -> tuple[np.ndarray, np.ndarray]:
    """Features `[k, d]` and targets `[k]` in standard units, float64."""
    return (x.astype(np.float64) - center) * factor, y.astype(np.float64) - target_center


def as_trained(x: np.ndarray, y: np.ndarray, w: np.ndarray | None, kind: Kind, weight_exponent: int = 0) -> Chunk:
    """Rows in the units of training, as they are computed with; those of weight 0 are zeros."""
    x, y = as_dtype(x, kind), as_dtype(y, kind)
    if w is None:
        return x, y, None
    w = as_dtype(np.ldexp(np.asarray(w, np.float64), -weight_exponent), kind)
    return np.where(w[:, np.newaxis] > 0, x, 0.0), np.where(w > 0, y, 0.0), w


class Ranges(NamedTuple):
    """The least and largest value of each column over the rows of positive weight, before they are rounded.

    Attributes:
        low: float64 `[d + 1]`, the target last.
        high: float64 `[d + 1]`.
        weight: the largest weight; None where rows have none.
    """

    low: np.ndarray
    high: np.ndarray
    weight: float | None


def ranges(chunks: Iterable[Chunk], weight_exponent: int = 0) -> Ranges:
    """The ranges of rows in the units of training; zeros where no row counts."""
    low: Any = math.inf
    high: Any = -math.inf
    weight: float | None = None
    width = 0
    for x, y, w in chunks:
        columns = np.column_stack([x, y]).astype(np.float64)
        width = columns.shape[1]
        if w is not None:
            columns = columns[w > 0]
            weight = max(weight or 0.0, float(np.ldexp(np.max(w, initial=0.0), -weight_exponent)))
        low = np.minimum(low, columns.min(axis=0, initial=math.inf))
        high = np.maximum(high, columns.max(axis=0, initial=-math.inf))
    some = np.broadcast_to(low <= high, [width])
    return Ranges(np.where(some, low, 0.0), np.where(some, high, 0.0), weight)


class Bounds(NamedTuple):
    """The largest absolute values of rows as trained: of features `[d]`, of the target, of weights where there are."""

    x: np.ndarray
    y: float
    w: float | None


def bounds(found: Ranges, kind: Kind) -> Bounds:
    """The bounds that follow from ranges."""
    largest = np.maximum(np.abs(as_dtype(found.low, kind)), np.abs(as_dtype(found.high, kind)))
    largest = np.maximum(largest, kind.least)
    weight = None if found.weight is None else max(float(as_dtype(found.weight, kind)), kind.least)
    return Bounds(largest[:-1], float(largest[-1]), weight)
