"""The smallest and largest number of each column, which tell how many bits exact sums need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from tapedist.data.blocks import Source
from tapedist.data.row_arrays import RowArrays, row_blocks


@dataclasses.dataclass(frozen=True, eq=False)
class Ranges:
    """Of rows of positive weight, in raw units. Without such rows, `low` is infinite and `weight` is 0.

    Attributes:
        low: float64 `[d + 1]`, of the features and, last, the target.
        high: float64 `[d + 1]`.
        weight: the largest weight, in units of `2**weight_exponent` of the source; 1 without weights.
    """

    low: np.ndarray
    high: np.ndarray
    weight: float


def ranges(source: Source, split: str, heed: Callable[[], object] = lambda: None) -> Ranges:
    """The ranges of a split.

    Args:
        source: the rows.
        split: "train" or "test".
        heed: called before every block; may raise to break the pass off.
    """
    exponent = getattr(source, "weight_exponent", 0)
    return of_blocks(row_blocks(source, split, heed=heed), source.num_features, exponent)


def of_blocks(blocks: Iterable[RowArrays], num_features: int, weight_exponent: int = 0) -> Ranges:
    """The ranges of rows that are given in blocks, `x [k, d]`, `y [k]` and `w [k]` or None."""
    low, high, weight = np.full(num_features + 1, np.inf), np.full(num_features + 1, -np.inf), 0.0
    for x, y, w in blocks:
        if w is not None:
            w = np.asarray(w, np.float64)
            used = ~(w <= 0)  # A weight that is no number is refused where weights are added.
            x, y, w = x[used], y[used], w[used]
        if not len(y):
            continue
        low = np.minimum(low, np.append(x.min(axis=0), y.min()))
        high = np.maximum(high, np.append(x.max(axis=0), y.max()))
        weight = max(weight, 1.0 if w is None else float(np.ldexp(w.max(), -weight_exponent)))
    return Ranges(low, high, weight)
