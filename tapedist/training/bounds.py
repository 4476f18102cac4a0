"""Bounds on the numbers of a split as training sees them: what fixes the grids of every sum before a row is read.

Legend: `d` features.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tapedist.data.ranges import Ranges

_LEAST = {"float32": 2.0**-126, "float64": 2.0**-250}


@dataclasses.dataclass(frozen=True, eq=False)
class Bounds:
    """Bounds of a split, in the units of training and in its type.

    Attributes:
        low: float64 `[d + 1]`, the least value of each feature and, last, of the target.
        high: float64 `[d + 1]`, the largest.
        weight: the largest weight.
        least: smaller numbers count as 0.
    """

    low: np.ndarray
    high: np.ndarray
    weight: float
    least: float

    @classmethod
    def of(cls, ranges: Ranges, *, dtype: str) -> Bounds:
        """Bounds of rows that are rounded to `dtype`, "float32" or "float64"."""
        least = _LEAST[dtype]

        def as_trained(values: np.ndarray) -> np.ndarray:
            with np.errstate(over="ignore"):  # What overflows is refused where it is read.
                rounded = np.asarray(values).astype(dtype).astype(np.float64)
            return np.where(np.abs(rounded) < least, 0.0, rounded)

        weight = max(float(as_trained(np.array(ranges.weight))), least)
        return cls(as_trained(ranges.low), as_trained(ranges.high), weight, least)

    def largest(self) -> np.ndarray:
        """Of each feature, of the target, of the weights: float64 `[d + 2]`."""
        columns = np.maximum(np.maximum(np.abs(self.low), np.abs(self.high)), self.least)
        return np.append(columns, self.weight)

    def shifts(self) -> np.ndarray:
        """What is subtracted from the columns before products of them are summed, float64 `[d + 1]`.

        Near the middle of a column's range, and of so few bits that the differences have few.
        """
        spread = self.high - self.low
        quantum = pow2(np.where(spread > 0, spread, 1.0)) / 32
        middle = self.low / 2 + self.high / 2
        quotient = middle / quantum
        rounded = np.where(np.abs(quotient) < 2.0**52, np.rint(quotient) * quantum, middle)
        return np.where(spread > 0, rounded, self.low)

    def tops(self) -> np.ndarray:
        """Powers of two that no shifted column exceeds, float64 `[d + 1]`."""
        shifts = self.shifts()
        largest = np.maximum(np.abs(self.low - shifts), np.abs(self.high - shifts))
        return pow2(np.maximum(largest, self.least))


def pow2(values: np.ndarray) -> np.ndarray:
    """The least powers of two that are not below `values`, positive and normal."""
    bits = np.ascontiguousarray(values, np.float64).view(np.int64) + (2**52 - 1)
    return (bits & ~np.int64(2**52 - 1)).view(np.float64)
