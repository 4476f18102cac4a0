"""Rows that lie in memory.

Legend: `n` rows, `d` features, `k` rows asked for.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tapedist.errors import InputError

_MOST_SLICES = 64  # A slice of many rows copies nothing, but each is an operation of the graph.


class ArraySource:
    """Rows in NumPy arrays; implements `tapedist.data.blocks.Source`.

    Args:
        x: `[n, d]`, numbers; integers become float64.
        y: `[n]`.
        w: weights `[n]`, or None.
        feature_names: `d` names; by default `x0`, `x1` and so on.
        test_rows: the last so many rows are the test split.

    Raises:
        InputError: if the shapes do not fit each other, or a number is not finite or a negative weight.
    """

    target_name = "y"

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        w: np.ndarray | None = None,
        *,
        feature_names: Sequence[str] = (),
        test_rows: int = 0,
    ):
        self._columns = tuple(_floats(column) for column in (x, y, w) if column is not None)
        _check(self._columns, len(feature_names), test_rows)
        # Training divides weights, which count in proportion only, by 2 to the power of it.
        self.weight_exponent = 0 if w is None else int(np.frexp(self._columns[2].max())[1])
        self._train = len(self._columns[1]) - test_rows
        self.num_features = self._columns[0].shape[1]
        self.feature_names = tuple(feature_names) or tuple(f"x{j}" for j in range(self.num_features))
        self.weighted = w is not None
        self.dtype = np.result_type(*self._columns)

    def num_rows(self, split: str) -> int:
        """Rows in `split`, which is "train" or "test"."""
        return self._train if split == "train" else len(self._columns[1]) - self._train

    def fingerprint(self) -> str:
        """Names the rows and their split, whatever their type."""
        digest = hashlib.sha256(self._train.to_bytes(8, "little"))
        for column in self._columns:
            digest.update(np.ascontiguousarray(column, "<f8").data)
        return digest.hexdigest()

    def rows(self, split: str, indices: Any) -> tuple[np.ndarray, ...]:
        """Rows by number, `(x [k, d], y [k])` or `(x, y, w [k])`."""
        first = self._first(split)
        if isinstance(indices, range):
            indices = slice(indices.start, indices.stop)
        return tuple(column[first:][indices] for column in self._columns)

    def _first(self, split: str) -> int:
        return 0 if split == "train" else self._train

    def take(self, split: str, indices: Any) -> tuple[Any, ...]:
        """`rows` as TensorFlow operations; `indices` is an int64 tensor `[k]`."""
        import tapedist.numerics  # noqa: F401  (before TensorFlow)
        import tensorflow as tf

        return tuple(tf.gather(column, indices + self._first(split)) for column in self._tensors)

    def take_runs(self, split: str, first: Any, *, length: int) -> tuple[Any, ...]:
        """Rows in runs; a single run is not copied.

        Args:
            split: "train" or "test".
            first: int64 tensor `[r]`, the first row of each run; runs may go on behind the split.
            length: rows of a run.

        Returns:
            `(x [r * length, d], y [r * length][, w])`.
        """
        import tapedist.numerics  # noqa: F401  (before TensorFlow)
        import tensorflow as tf

        n, runs = self.num_rows(split), first.shape[0]

        def gathered() -> tuple[Any, ...]:
            rows = first[:, tf.newaxis] + tf.range(length, dtype=tf.int64)
            return self.take(split, tf.minimum(tf.reshape(rows, [-1]), n - 1))

        def sliced() -> tuple[Any, ...]:
            return tuple(tf.concat([_run(column, begin) for begin in begins], 0) for column in self._tensors)

        def _run(column: Any, begin: Any) -> Any:
            run = column[begin : begin + length]
            run.set_shape([length, *column.shape[1:]])
            return run

        if runs > _MOST_SLICES:
            return gathered()
        begins = tf.unstack(first + self._first(split))
        return tf.cond(tf.reduce_all(first + length <= n), sliced, gathered)

    @functools.cached_property
    def _tensors(self) -> tuple[Any, ...]:
        """The columns, once: an array in a graph would be written into it."""
        import tapedist.numerics  # noqa: F401  (before TensorFlow)
        import tensorflow as tf

        with tf.init_scope(), tf.device("CPU:0"):
            return tuple(tf.constant(column) for column in self._columns)


def _floats(column: Any) -> np.ndarray:
    array = np.asarray(column)
    return array.astype(np.float64) if array.dtype.kind in "iub" else array


def _check(columns: tuple[np.ndarray, ...], num_names: int, test_rows: int) -> None:
    x, *rest = columns
    n = len(x) if x.ndim == 2 else 0
    if not x.size or x.ndim != 2 or any(column.shape != (n,) for column in rest):
        shapes = ", ".join(str(list(column.shape)) for column in columns)
        raise InputError(f"arrays of shapes {shapes}: must be [n, d], [n] and, for weights, [n], n and d at least 1")
    if num_names not in (0, x.shape[1]):
        raise InputError(f"feature_names: {num_names} names for {x.shape[1]} columns; give one for each")
    if not 0 <= test_rows < n:
        raise InputError(f"test_rows={test_rows}: must be from 0 to {n - 1}, so that rows to train on are left")
    for name, column in zip("xyw", columns, strict=False):
        if column.dtype not in (np.float32, np.float64):
            raise InputError(f"{name}: holds {column.dtype}; must be float32, float64 or integers")
        if not (np.isfinite(column.min()) and np.isfinite(column.max())):
            raise InputError(f"{name}: holds numbers that are not finite; correct them or leave their rows out")
    if len(columns) == 3 and columns[2].min() < 0:
        raise InputError("w: holds a negative weight; weights must be at least 0")
    if len(columns) == 3 and 0 < columns[2].max() < (least := np.finfo(columns[2].dtype).tiny):
        raise InputError(
            f"w: its largest weight is {columns[2].max():g}; must be at least {least:.3g}, below which numbers lose "
            "their digits; multiply all of it by a large number, which changes no result"
        )
    if len(columns) == 3:
        for split, weights in (("training", columns[2][: n - test_rows]), ("test", columns[2][n - test_rows :])):
            if len(weights) and not weights.any():
                raise InputError(f"w: all {split} rows weigh 0, so they have no loss; give some a weight")
