"""Row numbers grouped by the piece of the table that they fall into."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np


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
    pieces = np.searchsorted(starts, numbers, side="right") - 1
    order = np.argsort(pieces, kind="stable")
    ordered = pieces[order]
    cuts = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), len(numbers)]
    for begin, end in itertools.pairwise(cuts):
        yield int(ordered[begin]), order[begin:end]


def as_slice(places: np.ndarray) -> np.ndarray | slice:
    """Ascending consecutive places as a slice, which NumPy copies several times faster."""
    if len(places) > 1 and places[-1] - places[0] == len(places) - 1 and (places[1:] > places[:-1]).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places
