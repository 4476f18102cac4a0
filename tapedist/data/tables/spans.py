"""Row numbers grouped by the piece of the table that they fall into."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

# Numbers of rows: a range, which is the fastest to follow, or int64 `[k]`.
RowNumbers = range | np.ndarray

_FEW_PIECES = 16  # Up to here a look at all numbers for each piece is cheaper than sorting them.


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
