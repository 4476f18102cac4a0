"""Rows of any source as NumPy arrays, block by block, for what is computed beside the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tapedist.data.orders import Source
from tapedist.data.tables.spans import RowNumbers

BLOCK_ROWS = 65_536

# x [k, d], y [k] and w [k] or None, float64.
RowArrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def row_arrays(source: Source, split: str, indices: RowNumbers) -> RowArrays:
    """Rows of a split by number.

    Args:
        source: a table, whose rows are read without TensorFlow, or any other source.
        split: "train" or "test".
        indices: a range, or int64 `[k]`.

    Raises:
        StateError: if a file changed since it was opened.
    """
    if hasattr(source, "rows"):
        columns = source.rows(split, indices)
    else:
        import tensorflow as tf

        columns = tuple(column.numpy() for column in source.take(split, tf.constant(np.asarray(indices), tf.int64)))
    x, y, *rest = (np.asarray(column, np.float64) for column in columns)
    return x, y, rest[0] if rest else None


def taken_as_float32(source: Source) -> bool:
    """Whether a source has no numbers of its own but what training takes from it, and those are float32."""
    if hasattr(source, "rows"):
        return False
    import tensorflow as tf

    return source.take("train", tf.zeros([1], tf.int64))[0].dtype == tf.float32


def row_ranges(
    source: Source, split: str, *, block_rows: int = BLOCK_ROWS, heed: Callable[[], object] = lambda: None
) -> Iterator[range]:
    """All row numbers of a split in order, in blocks of a fixed size: sums over them do not depend on the machine.

    Args:
        source: the rows.
        split: "train" or "test".
        block_rows: rows in a block, at most.
        heed: called before every block; may raise to break the pass off.
    """
    n = source.num_rows(split)
    # Wide rows come in smaller blocks; the size depends on the rows alone.
    rows = max(256, min(block_rows, 2**23 // max(1, source.num_features)))
    for first in range(0, n, rows):
        heed()
        yield range(first, min(first + rows, n))


def row_blocks(
    source: Source, split: str, *, block_rows: int = BLOCK_ROWS, heed: Callable[[], object] = lambda: None
) -> Iterator[RowArrays]:
    """All rows of a split in the blocks of `row_ranges`, whose arguments see."""
    for rows in row_ranges(source, split, block_rows=block_rows, heed=heed):
        yield row_arrays(source, split, rows)
