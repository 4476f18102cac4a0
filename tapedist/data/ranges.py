"""stub"""
from __future__ import annotations
import dataclasses
import numpy as np
from tapedist.data.row_arrays import row_blocks

@dataclasses.dataclass(frozen=True, eq=False)
class Ranges:
    low: np.ndarray
    high: np.ndarray
    weight: float

def ranges(source, split, heed=lambda: None, say=lambda _: None):
    if hasattr(source, "ranges"):
        return source.ranges(split)
    e = getattr(source, "weight_exponent", 0)
    d = source.num_features
    low, high, weight = np.full(d + 1, np.inf), np.full(d + 1, -np.inf), 0.0
    for x, y, w in row_blocks(source, split, heed=heed):
        if w is not None:
            x, y, w = x[w > 0], y[w > 0], np.ldexp(w[w > 0], -e)
            weight = max(weight, w.max(initial=0.0))
        if len(y):
            low = np.minimum(low, np.append(x.min(0), y.min())); high = np.maximum(high, np.append(x.max(0), y.max()))
    low, high = np.where(np.isfinite(low), low, 0), np.where(np.isfinite(high), high, 0)
    return Ranges(low, high, weight if source.weighted else 1.0)
