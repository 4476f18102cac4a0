"""Row numbers grouped by the piece of the table that they fall into."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

_FEW_PIECES = 16  # Up to here a look at all numbers for each piece is cheaper than sorting them.


def spans(numbers: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray]]:
    """Groups row numbers by piece; cheap where they ascend, as they do unless they are shuffled.

    Args:
        numbers: int64 `[k]`, each in `[starts[0], starts[-1])`.
        starts: int64 `[pieces + 1]`, ascending: the first row of each piece, and the end of the last.

    Yields:
        `(piece, places)`: the places in `numbers` of the rows of one piece.
    """
    if not len(numbers):
        return
    if (numbers[1:] >= numbers[:-1]).all():
        first, last = np.searchsorted(starts, numbers[[0, -1]], side="right") - 1
        cuts = [0, *np.searchsorted(numbers, starts[first + 1 : last + 1]).tolist(), len(numbers)]
        for piece in range(first, last + 1):
            begin, end = cuts[piece - first], cuts[piece - first + 1]
            if begin < end:
                yield piece, slice(begin, end)
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


def take_into(target: np.ndarray, into: slice | np.ndarray, values: np.ndarray, places: np.ndarray) -> None:
    """`target[into] = values[places]`, in the fastest form.

    Args:
        target: contiguous, of the type of `values` or one that holds it.
        into: as `spans` yields it.
        values: where from.
        places: int64, of the length of `into`, each in `[0, len(values))`.
    """
    if len(places) and places[-1] - places[0] == len(places) - 1 and (places[1:] > places[:-1]).all():
        target[into] = values[places[0] : places[-1] + 1]
    elif isinstance(into, slice) and target.dtype == values.dtype:
        # With mode="raise" NumPy would go through a buffer.
        np.take(values, places, out=target[into], mode="clip")
    else:
        target[into] = values.take(places)
