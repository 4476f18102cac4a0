"""Rows of a table by their numbers in the file, in the units and the type that training wants.

Memory that is touched for the first time costs more than the arithmetic on it. So a few thousand rows at a time are
collected column by column in a small buffer that stays in the cache, converted there, and written once into the result.

Legend: `k` rows asked for, `d` features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tapedist.data.table_scan import CellRule
from tapedist.data.table_spans import spans, take_into

_BUFFER_BYTES = 2**19
_ALIGNMENT = 64  # TensorFlow takes over arrays that begin there and copies others.


class Units(NamedTuple):
    """`(x - center) * factor` and `y - target_center`, in float64.

    Attributes:
        center: float64 `[d]`.
        factor: float64 `[d]`.
        target_center: a float.
    """

    center: np.ndarray
    factor: np.ndarray
    target_center: float


class RowGather:
    """Collects rows from the segments of a store; may be called from several threads.

    Args:
        get: `(segment, ascending) -> its columns`: the features, the target if there is one, the weight if there is
            one; `ascending` says that rows are read in their order.
        starts: int64 `[segments + 1]`, the first row of each segment.
        num_features: `d`.
        has_target: without one, `y` is NaN.
        weighted: whether there is a weight.
        rule: finds the cells that need the mean of their column.

    Attributes:
        means: float64 `[d]`, put in place of bad cells, or None if there are none.
    """

    def __init__(
        self,
        get: Callable[..., Sequence[np.ndarray]],
        starts: np.ndarray,
        *,
        num_features: int,
        has_target: bool,
        weighted: bool,
        rule: CellRule,
    ):
        self.means: np.ndarray | None = None
        self._get, self._starts, self._rule = get, starts, rule
        self._d, self._has_target, self._width = num_features, has_target, num_features + 1 + weighted
        self._step = max(64, _BUFFER_BYTES // (8 * self._width))
        self._local = threading.local()

    def __call__(self, file_rows: np.ndarray, *, dtype: Any, units: Units | None = None) -> tuple[np.ndarray, ...]:
        """`(x [k, d], y [k][, w [k]])` of type `dtype`.

        Args:
            file_rows: int64 `[k]`, numbers in the file.
            dtype: a NumPy float type; rounded to at the very end.
            units: of the result; raw ones if None.
        """
        k, d = len(file_rows), self._d
        x, *rest = _empty((k, d), dtype), *(_empty((k,), dtype) for _ in range(self._width - d))
        with np.errstate(over="ignore"):  # A loss that is not finite is told by name.
            for first in range(0, k, self._step):
                part = slice(first, min(k, first + self._step))
                found = self._columns(file_rows[part])
                if units:
                    found[:d] -= units.center[:, np.newaxis]
                    found[:d] *= units.factor[:, np.newaxis]
                    found[d] -= units.target_center
                x[part] = found[:d].T
                for column, values in zip(rest, found[d:], strict=True):
                    column[part] = values
        return x, *rest

    def _columns(self, file_rows: np.ndarray) -> np.ndarray:
        """Float64 `[columns, rows]`, in this thread's buffer."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.empty(self._width * self._step)
        found = self._local.buffer[: self._width * len(file_rows)].reshape(self._width, -1)
        columns = [*found]
        if not self._has_target:
            columns.pop(self._d).fill(np.nan)
        for segment, into in spans(file_rows, self._starts):
            places = file_rows[into] - self._starts[segment]
            held = self._get(segment, ascending=isinstance(into, slice))
            for column, values in zip(columns, held, strict=True):
                take_into(column, into, values, places)
        if self.means is not None:
            for position, mean in enumerate(self.means):
                bad = self._rule.bad(position, found[position])
                if bad is not None:
                    found[position, bad] = mean
        return found


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """`np.empty`, aligned for TensorFlow."""
    count, item = int(np.prod(shape)), np.dtype(dtype).itemsize
    flat = np.empty(count * item + _ALIGNMENT, np.uint8)
    first = -flat.ctypes.data % _ALIGNMENT
    return flat[first : first + count * item].view(dtype).reshape(shape)
