"""Rows that lie in memory.

Legend: `n` rows, `d` features, `k` rows asked for.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from tapedist.data import frames
from tapedist.data.ranges import holds_tiny, ranges_of_rows
from tapedist.data.source import BLOCK_ROWS, Ranges, Source
from tapedist.data.tables.columns import listed
from tapedist.errors import InputError
from tapedist.text import display

_MOST_SLICES = 64  # A slice of many rows copies nothing, but each is an operation of the graph.


class ArraySource(Source):
    """Rows in memory. Float arrays are not copied: leave them as they are.

    Args:
        x: `[n, d]`, numbers; integers become float64. A NumPy array or nested lists, or a table whose columns have
            names: a DataFrame of pandas or polars, an Arrow table, a dict of arrays, a structured array.
        y: `[n]`, an array, a list or a column of a table, whose name is kept.
        w: weights `[n]`, or None.
        feature_names: `d` names; of a table the columns to take, in this order. By default the table's, or `x0`, `x1`
            and so on.
        test_rows: the last so many rows are the test split.

    Attributes:
        feature_names: `d` names, as text.
        target_name: the name of `y`, by default "y".

    Raises:
        InputError: if the shapes, names or row labels do not fit each other, or something is no finite number or a
            negative weight.
    """

    read_by_numpy = held_by_tensorflow = True

    def __init__(
        self,
        x: Any,
        y: Any,
        w: Any = None,
        *,
        feature_names: Sequence[str] = (),
        test_rows: int = 0,
    ):
        frames.check_row_labels(x=x, y=y, w=w)
        wanted = _wanted_names(feature_names)
        features, names = frames.matrix(x, "x", names=wanted)
        rest = ((name, column) for name, column in (("y", y), ("w", w)) if column is not None)
        self._columns = (features, *(_column(column, name) for name, column in rest))
        _check_shapes(self._columns, len(wanted))
        self._train = len(self._columns[1]) - _test_rows(test_rows, len(self._columns[1]))
        self.num_features = features.shape[1]
        self.feature_names = names or wanted or tuple(f"x{j}" for j in range(self.num_features))
        _check_nameless(self.feature_names)
        self.target_name = _target_name(y, self.feature_names)
        _check_numbers(self._columns, self.feature_names, self._train)
        # Training divides weights, which count in proportion only, by 2 to the power of it.
        self.weight_exponent = 0 if w is None else int(np.frexp(self._columns[2].max())[1])
        self.weighted = w is not None
        self.dtype = np.result_type(*self._columns)
        self._fingerprint = ""
        self._ranges: dict[str, Ranges] = {}

    def num_rows(self, split: str) -> int:
        """Rows in `split`, which is "train" or "test"."""
        return self._train if split == "train" else len(self._columns[1]) - self._train

    def fingerprint(self) -> str:
        """Names the rows and their split, whatever their type.

        Raises:
            InputError: if the arrays were changed since this was first asked for; what was read before is kept.
        """
        digest = hashlib.sha256(self._train.to_bytes(8, "little"))
        for column in self._columns:
            digest.update(np.ascontiguousarray(column, "<f8").data)
        fingerprint = digest.hexdigest()
        if self._fingerprint not in ("", fingerprint):
            raise InputError("source: its arrays have changed since it was first used; make a new ArraySource of them")
        self._fingerprint = fingerprint
        return fingerprint

    def ranges(self, split: str) -> Ranges:
        """Least and greatest values of the rows of a split; a pass when first asked for."""
        if split not in self._ranges:
            self._ranges[split] = ranges_of_rows(self, split)
        return self._ranges[split]

    @functools.cached_property
    def holds_tiny(self) -> bool:
        """Whether training meets numbers other than 0 below 2**-126."""
        x, y, *w = self._columns
        blocks = (slice(first, first + BLOCK_ROWS) for first in range(0, len(y), BLOCK_ROWS))
        return any(
            holds_tiny(column)
            for block in blocks
            for column in (x[block], y[block], *(np.ldexp(c[block], -self.weight_exponent) for c in w))
        )

    def rows(self, split: str, indices: Any) -> tuple[np.ndarray, ...]:
        """Rows by number, `(x [k, d], y [k])` or `(x, y, w [k])`."""
        first = self._first(split)
        if isinstance(indices, range):
            indices = slice(indices.start, indices.stop)
        return tuple(column[first:][indices] for column in self._columns)

    def as_they_lie(self, dtype: np.dtype[Any]) -> bool:
        """Whether training in a type takes `rows` as they are."""
        x, y, *w = self._columns
        return not w and x.dtype == y.dtype == dtype and x.flags.c_contiguous and not self.holds_tiny

    def _first(self, split: str) -> int:
        return 0 if split == "train" else self._train

    def take(self, split: str, indices: Any) -> tuple[Any, ...]:
        """`rows` as TensorFlow operations; `indices` is an int64 tensor `[k]`."""
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
        import tensorflow as tf

        with tf.init_scope(), tf.device("CPU:0"):
            return tuple(tf.constant(column) for column in self._columns)


def _wanted_names(names: Any) -> tuple[str, ...]:
    """`feature_names` as text; one name needs no list."""
    if isinstance(names, (set, frozenset)):
        raise InputError("feature_names: is a set, which has no order; give a list")
    wanted = (names,) if isinstance(names, str) else frames.text_names(names)
    if repeated := sorted({name for name in wanted if wanted.count(name) > 1}):
        raise InputError(f"feature_names: names {listed(repeated)} more than once; name each column once")
    return wanted


def _check_nameless(names: Sequence[str]) -> None:
    if "" in names:
        raise InputError(f"x: column {names.index('') + 1} has no name, by which it could be found again; name it")


def _column(column: Any, where: str) -> np.ndarray:
    """`y` or `w` as a float array."""
    if frame := frames.Frame.of(column):
        first = frame.names[0] if frame.names else "name"
        raise InputError(f"{where}: is a table of {len(frame.names)} columns; give one of them, as {where}[{first!r}]")
    return frames.numbers(column, where)


def _target_name(y: Any, feature_names: Sequence[str]) -> str:
    """The name of `y`, or one that no feature has.

    Raises:
        InputError: if the target is among the features, so that it would predict itself.
    """
    name = frames.series_name(y)
    if name in feature_names:
        raise InputError(
            f"x: holds the target {display(name)} too, which would predict itself; take its column out of x, or "
            "rename y"
        )
    free = itertools.chain(("y", "target"), (f"y{j}" for j in itertools.count(2)))
    return name or next(other for other in free if other not in feature_names)


def _test_rows(test_rows: Any, n: int) -> int:
    try:
        count = operator.index(test_rows)
    except TypeError:
        raise InputError(f"test_rows={display(test_rows)}: must be a whole number of rows") from None
    if not 0 <= count < n:
        raise InputError(f"test_rows={count}: must be from 0 to {n - 1}, so that rows to train on are left")
    return count


def _check_shapes(columns: tuple[np.ndarray, ...], num_names: int) -> None:
    x, *rest = columns
    n = len(x) if x.ndim == 2 else 0
    if not x.size or x.ndim != 2 or any(column.shape != (n,) for column in rest):
        shapes = ", ".join(str(list(column.shape)) for column in columns)
        fixes = ["np.asarray(x).reshape(-1, 1)"] if x.ndim == 1 else []
        fixes += [f"np.ravel({name})" for name, column in zip("yw", rest, strict=False) if column.shape == (n, 1)]
        hint = f"; give {' and '.join(fixes)}" if fixes and x.size else ""
        raise InputError(
            f"arrays of shapes {shapes}: must be [n, d], [n] and, for weights, [n], n and d at least 1{hint}"
        )
    if num_names not in (0, x.shape[1]):
        raise InputError(f"feature_names: {num_names} names for {x.shape[1]} columns; give one for each")


def _check_numbers(columns: tuple[np.ndarray, ...], feature_names: Sequence[str], num_train: int) -> None:
    for name, column in zip("xyw", columns, strict=False):
        if not (np.isfinite(column.min()) and np.isfinite(column.max())):
            row, *place = np.argwhere(~np.isfinite(column))[0].tolist()
            where = f", column {display(feature_names[place[0]])}" if place else ""
            raise InputError(
                f"{name}: holds numbers that are not finite, first in row {row}{where}; correct them or leave their "
                "rows out"
            )
    if len(columns) == 3 and columns[2].min() < 0:
        raise InputError("w: holds a negative weight; weights must be at least 0")
    if len(columns) == 3 and 0 < columns[2].max() < (least := np.finfo(columns[2].dtype).tiny):
        raise InputError(
            f"w: its largest weight is {columns[2].max():g}; must be at least {least:.3g}, below which numbers lose "
            "their digits; multiply all of it by a large number, which changes no result"
        )
    if len(columns) == 3:
        for split, weights in (("training", columns[2][:num_train]), ("test", columns[2][num_train:])):
            if len(weights) and not weights.any():
                raise InputError(f"w: all {split} rows weigh 0, so they have no loss; give some a weight")
