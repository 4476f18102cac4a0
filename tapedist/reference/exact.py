"""Words of the specification, and sums that have no order.

Legend: `k` terms, `m` sums side by side, `l` grids of a sum.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

CAP = 14  # A float64 sum takes at most 2**CAP terms; longer sums are added up as integers.
SLACK = 1 + 2.0**-20  # Covers the roundings of a bound.


@dataclasses.dataclass(frozen=True)
class Kind:
    """What depends on the type of the rows.

    Attributes:
        dtype: their type.
        levels: grids of a gradient's sum.
        drop: last bits that residuals and multipliers (parameters, weighted slopes) lose, so that products are exact.
        least: smaller rows and parameters are 0.
        floor: the least bound of a residual; keeps every grid far above the denormals.
        most: a residual's bound from here on means divergence.
    """

    dtype: type
    levels: int
    drop: tuple[int, int]
    least: float
    floor: float
    most: float


KINDS = {
    "float32": Kind(np.float32, 1, (27, 24), 2.0**-126, 2.0**-80, 2.0**126),
    "float64": Kind(np.float64, 2, (0, 0), 2.0**-250, 2.0**-160, 2.0**250),
}


def pow2(values: Any) -> Any:
    """The least powers of two that are not below `values`, which are positive and normal."""
    bits = np.asarray(values, np.float64).view(np.int64)
    return ((bits + (2**52 - 1)) & -(2**52)).view(np.float64)


def trim(values: Any, bits: int) -> Any:
    """`values` without their last `bits` bits: to nearest, halves away from zero."""
    values = np.asarray(values, np.float64)
    return ((values.view(np.int64) + 2 ** (bits - 1)) & -(2**bits)).view(np.float64) if bits else values


def flush(values: Any, least: float) -> Any:
    """`values` with 0 in place of those nearer to it than `least`."""
    return np.where(np.abs(values) < least, 0.0, values)


def folded(terms: np.ndarray) -> Any:
    """The sum along the first axis by halves, padded with zeros to a power of two."""
    padded = np.zeros([1 << max(0, len(terms) - 1).bit_length(), *terms.shape[1:]])
    padded[: len(terms)] = terms
    while (half := len(padded) // 2) > 0:
        padded = padded[:half] + padded[half:]
    return padded[0]


def grids(bound: Any, levels: int) -> list[Any]:
    """Steps of the grids on which terms of at most `bound` are summed, coarse to fine."""
    first = pow2(bound) * 2.0 ** (CAP - 53)
    return [first * 2.0 ** (-40 * level) for level in range(levels)]


def rounded_to(terms: np.ndarray, step: Any) -> np.ndarray:
    """`terms`, at most `2**51` steps large, at the nearest multiples of `step`."""
    magic = 1.5 * 2.0**52 * step
    return (terms + magic) - magic


def integers(terms: np.ndarray, bound: Any, levels: int) -> np.ndarray:
    """Exact sums of `terms` `[k, m]`, `|terms| <= bound`, in steps of each grid: Python ints `[l, m]`.

    Sums of parts of the rows, in any order, add up to the same integers.
    """
    total = np.zeros([levels, terms.shape[1]], object)
    for first in range(0, len(terms), 2**CAP):
        rest = terms[first : first + 2**CAP]
        for level, step in enumerate(grids(bound, levels)):
            on_grid = rounded_to(rest, step)
            rest = rest - on_grid
            total[level] += (on_grid.sum(axis=0) / step).astype(np.int64).astype(object)
    return total


def value(sums: np.ndarray, bound: Any) -> np.ndarray:
    """The float64 numbers `[m]` of integers `[l, m]`: each grid's rounded once, then added."""
    parts = [number.astype(np.float64) * step for number, step in zip(sums, grids(bound, len(sums)), strict=True)]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def exact_sum(terms: np.ndarray, bound: float, levels: int) -> float:
    """The sum of `terms` `[k]`, `|terms| <= bound`, in any order."""
    return float(value(integers(terms[:, np.newaxis], bound, levels), bound)[0])
