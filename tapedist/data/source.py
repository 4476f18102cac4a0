"""Rows of any source as NumPy arrays, block by block, for what is computed beside the training loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from tapedist.data.orders import Source

# Numbers of rows: a range, which is the fastest to follow, or int64 `[k]`.
RowNumbers = range | np.ndarray

_FEW_PIECES = 16  # Up to here a look at all numbers for each piece is cheaper than sorting them.
BLOCK_ROWS = 65_536

# x [k, d], y [k] and w [k] or None, float64.
RowArrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def ascends(numbers: RowNumbers) -> bool:
    """Whether no number is smaller than the one before it."""
    return isinstance(numbers, range) or bool((numbers[1:] >= numbers[:-1]).all())


def ascending_spans(numbers: RowNumbers, starts: np.ndarray) -> Iterator[tuple[int, slice]]:
    """`spans` of numbers that ascend."""
    if not len(numbers):
        return
    first, last = np.searchsorted(starts, [numbers[0], numbers[-1]], side="right") - 1
    inner = starts[first + 1 : last + 1]
    middle = inner - numbers.start if isinstance(numbers, range) else np.searchsorted(numbers, inner)
    cuts = [0, *middle.tolist(), len(numbers)]
    for piece in range(first, last + 1):
        begin, end = cuts[piece - first], cuts[piece - first + 1]
        if begin < end:
            yield piece, slice(begin, end)


def spans(numbers: RowNumbers, starts: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray]]:
    """Groups row numbers by piece; cheap where they ascend, as they do unless they are shuffled.

    Args:
        numbers: each in `[starts[0], starts[-1])`.
        starts: int64 `[pieces + 1]`, ascending: the first row of each piece, and the end of the last.

    Yields:
        `(piece, places)`: the places in `numbers` of the rows of one piece.
    """
    if isinstance(numbers, range) or ascends(numbers):
        yield from ascending_spans(numbers, starts)
        return
    first, last = np.searchsorted(starts, [numbers.min(), numbers.max()], side="right") - 1
    if last - first < _FEW_PIECES:
        for piece in range(first, last + 1):
            places = np.flatnonzero((starts[piece] <= numbers) & (numbers < starts[piece + 1]))
            if len(places):
                yield piece, places if len(places) < len(numbers) else slice(0, len(numbers))
        return
    pieces = np.searchsorted(starts, numbers, side="right") - 1
    order = np.argsort(pieces, kind="stable")
    ordered = pieces[order]
    cuts = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), len(numbers)]
    for begin, end in itertools.pairwise(cuts):
        yield int(ordered[begin]), order[begin:end]


def places_in(numbers: RowNumbers, into: slice | np.ndarray, start: int) -> slice | np.ndarray:
    """`numbers[into] - start`, as a slice where they are consecutive.

    Args:
        numbers: row numbers.
        into: as `spans` yields it.
        start: the first row of a piece.
    """
    if isinstance(numbers, range):
        assert isinstance(into, slice)
        chosen = numbers[into]
        return slice(chosen.start - start, chosen.stop - start)
    places = numbers[into] - start
    if places[-1] - places[0] == len(places) - 1 and (places[1:] > places[:-1]).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


def cut(places: slice | np.ndarray, first: int, last: int) -> slice | np.ndarray:
    """`places[first:last]` of what `places_in` gives."""
    return slice(places.start + first, places.start + last) if isinstance(places, slice) else places[first:last]


def take_into(target: np.ndarray, into: slice | np.ndarray, values: np.ndarray, places: slice | np.ndarray) -> None:
    """`target[into] = values[places]`, in the fastest form.

    Args:
        target: contiguous, of the type of `values` or one that holds it; `[k]` or `[k, d]`.
        into: as `spans` yields it.
        values: where from, of as many dimensions.
        places: as `places_in` gives them, as many as there are in `into`.
    """
    if isinstance(places, slice):
        target[into] = values[places]
    elif isinstance(into, slice) and target.dtype == values.dtype:
        # With mode="raise" NumPy would go through a buffer.
        np.take(values, places, axis=0, out=target[into], mode="clip")
    else:
        target[into] = values.take(places, axis=0)


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
    source: Source, split: str, *, block_rows: int = BLOCK_ROWS, check_stop: Callable[[], object] = lambda: None
) -> Iterator[range]:
    """All row numbers of a split in order, in blocks of a fixed size: sums over them do not depend on the machine.

    Args:
        source: the rows.
        split: "train" or "test".
        block_rows: rows in a block, at most.
        check_stop: called before every block; may raise to break the pass off.
    """
    n = source.num_rows(split)
    # Wide rows come in smaller blocks; the size depends on the rows alone.
    rows = max(256, min(block_rows, 2**23 // max(1, source.num_features)))
    for first in range(0, n, rows):
        check_stop()
        yield range(first, min(first + rows, n))


def row_blocks(
    source: Source, split: str, *, block_rows: int = BLOCK_ROWS, check_stop: Callable[[], object] = lambda: None
) -> Iterator[RowArrays]:
    """All rows of a split in the blocks of `row_ranges`, whose arguments see."""
    for rows in row_ranges(source, split, block_rows=block_rows, check_stop=check_stop):
        yield row_arrays(source, split, rows)
