"""Where rows come from: `Source`, and its rows as NumPy arrays, block by block, for what is computed beside training.

Legend: `d` features, `k` rows asked for, `r` runs, `T` rows of a tile.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tapedist.data.layout import RowNumbers, Units, as_array, convert

BLOCK_ROWS = 65_536

# x [k, d], y [k] and w [k] or None, float64.
RowArrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Ranges:
    """Bounds of the rows of positive weight, in the units of the source and before they are rounded for training.

    Attributes:
        low: the least value of each feature and, last, of the target, float64 `[d + 1]`.
        high: the greatest.
        weight: the largest weight over `2**weight_exponent`; 1 without weights.
    """

    low: np.ndarray
    high: np.ndarray
    weight: float = 1.0

    @classmethod
    def none(cls, num_features: int) -> Ranges:
        """Of no rows."""
        return cls(np.zeros(num_features + 1), np.zeros(num_features + 1))

    @classmethod
    def of_extremes(cls, low: np.ndarray, high: np.ndarray, weight: float = 1.0) -> Ranges:
        """Of extremes that start at plus and minus infinity, which stay where no row weighs anything."""
        if not (low <= high).all():
            return cls.none(len(low) - 1)
        return cls(low + 0.0, high + 0.0, weight)  # -0.0 and 0.0 are equal, and either may have been met first.


class Source:
    """Where rows come from: any row of a split by its number, in any order, any number of times.

    What users write needs the first four attributes, `num_rows`, `fingerprint` and `take`, and no base class:
    `as_source` makes a `Source` of it. A split is "train" or "test".

    Attributes:
        num_features: `d`.
        feature_names: `d` names.
        target_name: what is predicted.
        weighted: whether rows have weights of their own.
        weight_exponent: training divides weights, which count in proportion only, by 2 to the power of it.
        dtype: of the rows' own numbers; None where they have none but those that training takes from them.
        truth: `(weights, bias)` that made the rows, or None.
        notices: sentences that the user should see once.
        failure: what went wrong inside a `tf.data` map, which loses the type of an error; None if nothing did.
        read_by_numpy: whether `read_into` is faster than `take`.
        held_by_tensorflow: whether TensorFlow has the rows at hand, and takes them row by row as fast as NumPy.
        row_major: whether rows are made, or lie, row by row; tiles of features are then turned around.
    """

    num_features: int
    feature_names: tuple[str, ...]
    target_name: str
    weighted: bool
    weight_exponent: int = 0
    dtype: np.dtype[Any] | None = None
    truth: tuple[tuple[float, ...], float] | None = None
    notices: tuple[str, ...] = ()
    failure: Exception | None = None
    read_by_numpy: bool = False
    held_by_tensorflow: bool = False
    row_major: bool = True

    @property
    def holds_tiny(self) -> bool:
        """False if no number but 0 is below 2**-126, so that none has to be looked for."""
        return True

    def num_rows(self, split: str) -> int:
        """Rows in a split."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Names the rows: equal for two sources exactly when their rows are."""
        raise NotImplementedError

    def take(self, split: str, indices: Any) -> tuple[Any, ...]:
        """Rows of a split by number, as TensorFlow operations that can be traced into a `tf.data` map.

        Args:
            split: "train" or "test".
            indices: int64 tensor `[k]`, each in `[0, num_rows(split))`, `k` known statically.

        Returns:
            `(x, y)` of shapes `[k, d]` and `[k]` in a float type, or `(x, y, w)` if the source is `weighted`.
        """
        raise NotImplementedError

    def take_runs(self, split: str, first: Any, *, length: int) -> tuple[Any, ...]:
        """Rows in runs; sources that need no list of row numbers for that have a way of their own.

        Args:
            split: "train" or "test".
            first: int64 tensor `[r]`, the first row of each run; what runs hold behind the split is no matter.
            length: rows of a run.

        Returns:
            As `take`, with `k = r * length`.
        """
        import tensorflow as tf

        rows = tf.reshape(first[:, tf.newaxis] + tf.range(length, dtype=tf.int64), [-1])
        return self.take(split, tf.minimum(rows, max(0, self.num_rows(split) - 1)))

    def take_tiles(self, split: str, first: Any, *, length: int, tile_rows: int) -> tuple[Any, ...]:
        """`take_runs`, whose features may come in tiles of `T` rows, `[r * length / T, d, T]`."""
        return self.take_runs(split, first, length=length)

    def rows(self, split: str, indices: RowNumbers) -> tuple[np.ndarray, ...]:
        """Rows of a split by number, `(x [k, d], y [k][, w [k]])`, which are not to be written to.

        Raises:
            StateError: if a file changed since it was opened.
        """
        import tensorflow as tf

        return tuple(column.numpy() for column in self.take(split, tf.constant(as_array(indices), tf.int64)))

    def read_into(self, out: Sequence[np.ndarray], split: str, rows: RowNumbers, *, units: Units | None = None) -> None:
        """Writes rows of a split as training takes them; may be called from several threads.

        Args:
            out: `(x [k, d], y [k][, w [k]])`, whose types are rounded to at the very end; weights are divided by
                `2**weight_exponent`. `x` may be feature-major tiles `[tiles, d, T]` with room for `k` rows or more.
            split: "train" or "test".
            rows: a range, which is the fastest, or int64 `[k]`.
            units: of the result; raw ones if None.

        Raises:
            StateError: if a file changed since it was opened.
        """
        read = functools.partial(self.rows, split)
        convert(out, read, rows, units=units, weight_exponent=self.weight_exponent)

    def read_ahead(self, split: str, rows: range) -> None:
        """Hints that a range will be asked for soon, out of its order."""

    def as_they_lie(self, dtype: np.dtype[Any]) -> bool:
        """Whether training in a type takes `rows` as they are."""
        return False

    def reader(self) -> Source:
        """The same rows as training reads them."""
        return self

    @property
    def raw(self) -> Source:
        """The same rows in their own units."""
        return self

    def ranges(self, split: str) -> Ranges | None:
        """Least and greatest values of the rows of a split; None where a pass has to find them."""
        return None

    def in_units(self, raw: Ranges) -> Ranges:
        """The ranges of these rows, of those of the `raw` ones."""
        return raw


class CustomSource(Source):
    """What a user wrote, as a `Source`; the members that it lacks are the base class's.

    Args:
        own: has the seven members that a source must have.
    """

    def __init__(self, own: Any):
        self._own = own
        self.num_features, self.feature_names = own.num_features, tuple(own.feature_names)
        self.target_name, self.weighted = own.target_name, own.weighted
        self.weight_exponent = getattr(own, "weight_exponent", 0)
        self.truth = getattr(own, "truth", None)
        self.notices = tuple(getattr(own, "notices", ()))

    @property
    def holds_tiny(self) -> bool:
        return getattr(self._own, "holds_tiny", True)

    def num_rows(self, split: str) -> int:
        return self._own.num_rows(split)

    def fingerprint(self) -> str:
        return self._own.fingerprint()

    def take(self, split: str, indices: Any) -> tuple[Any, ...]:
        return self._own.take(split, indices)

    def take_runs(self, split: str, first: Any, *, length: int) -> tuple[Any, ...]:
        own = getattr(self._own, "take_runs", super().take_runs)
        return own(split, first, length=length)

    def ranges(self, split: str) -> Ranges | None:
        return getattr(self._own, "ranges", super().ranges)(split)


def as_source(source: Any) -> Source:
    """A `Source` of what a caller gave: itself, if it is one."""
    return source if isinstance(source, Source) else CustomSource(source)


def row_arrays(source: Source, split: str, indices: RowNumbers) -> RowArrays:
    """Rows of a split by number, float64.

    Args:
        source: any.
        split: "train" or "test".
        indices: a range, or int64 `[k]`.

    Raises:
        StateError: if a file changed since it was opened.
    """
    x, y, *rest = (np.asarray(column, np.float64) for column in source.rows(split, indices))
    return x, y, rest[0] if rest else None


def taken_as_float32(source: Source) -> bool:
    """Whether a source has no numbers of its own but what training takes from it, and those are float32."""
    if source.dtype is not None:
        return False
    import tensorflow as tf

    return source.take("train", tf.zeros([1], tf.int64))[0].dtype == tf.float32


_CHECK_STOP: contextvars.ContextVar[Callable[[], bool]] = contextvars.ContextVar("check_stop", default=lambda: False)


@contextlib.contextmanager
def interruptible(check: Callable[[], bool]) -> Iterator[None]:
    """Passes over rows inside the block call `check` before every block of rows; it raises to end them.

    A context variable, so that the functions between a run and its rows need not hand it on. Threads that are started
    inside do not have it.
    """
    token = _CHECK_STOP.set(check)
    try:
        yield
    finally:
        _CHECK_STOP.reset(token)


def check_stop() -> bool:
    """Calls the check of `interruptible`: returns False, or raises."""
    return _CHECK_STOP.get()()


def row_ranges(source: Source, split: str, *, block_rows: int = BLOCK_ROWS) -> Iterator[range]:
    """All row numbers of a split in order, in blocks of a fixed size: sums over them do not depend on the machine.

    Args:
        source: the rows.
        split: "train" or "test".
        block_rows: rows in a block, at most.
    """
    n = source.num_rows(split)
    # Wide rows come in smaller blocks; the size depends on the rows alone.
    rows = max(256, min(block_rows, 2**23 // max(1, source.num_features)))
    for first in range(0, n, rows):
        check_stop()
        yield range(first, min(first + rows, n))


def row_blocks(source: Source, split: str, *, block_rows: int = BLOCK_ROWS) -> Iterator[RowArrays]:
    """All rows of a split in the blocks of `row_ranges`, whose arguments see."""
    for rows in row_ranges(source, split, block_rows=block_rows):
        yield row_arrays(source, split, rows)
