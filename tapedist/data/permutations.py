"""In which order an epoch visits rows and batches: pseudo-random permutations as pure functions, without a list.

Nothing here knows TensorFlow or holds state, so that resume is arithmetic.

Legend: `n` rows of a split. A *window* is a fixed range of consecutive rows; under `--shuffle=rows` windows are visited
in a random order, and the rows of each in a random order, so that a table larger than memory can be shuffled while only
a few windows are held.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

WINDOW_ROWS = 2**18
_MOST_WINDOWS = 2**20
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6
_PIECE = 8192
_MOST_HALF = 12  # Bits of half an index up to which a round's images are looked up, not computed.


def permuted(indices: np.ndarray, size: int, *key: int | np.ndarray) -> np.ndarray:
    """Images of `indices` under a pseudo-random permutation of `range(size)`, without a table.

    A balanced Feistel network of 6 rounds on the smallest even number of bits that holds `size`, walked in cycles until
    the value falls inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        indices: int64 array, each in `[0, size)`.
        size: from 1 to 2**62.
        *key: non-negative ints that choose the permutation; arrays of the shape of `indices` choose one for each.

    Returns:
        An int64 array of the shape of `indices`.
    """
    shape = np.shape(indices)
    flat = np.ascontiguousarray(indices, np.int64).ravel()
    found = np.empty(flat.shape, np.int64)
    half = max(1, -(-max(1, (size - 1).bit_length()) // 2))
    keys: list[np.ndarray] = []
    network: Callable[..., np.ndarray] = functools.partial(_computed, half=half)
    if any(map(np.ndim, key)):
        keys = [_chosen([np.broadcast_to(np.asarray(word, np.uint64), shape).ravel() for word in key], len(flat))]
    elif half <= _MOST_HALF and len(flat) >= 2**half:
        network = functools.partial(_looked_up, tables=_round_images(half, key), half=half)
    else:
        network = functools.partial(network, chosen=_chosen([np.asarray([word], np.uint64) for word in key], 1))
    # Piece by piece, so that the temporaries stay in the cache.
    for first in range(0, len(flat), _PIECE):
        part = slice(first, first + _PIECE)
        found[part] = _walked(network, flat[part], size, *(words[part] for words in keys))
    return found.reshape(shape)


def _walked(network: Callable[..., np.ndarray], values: np.ndarray, size: int, *chosen: np.ndarray) -> np.ndarray:
    """Images under a permutation of more numbers, walked on until they are below `size`."""
    result = network(values, *chosen)
    while (outside := result >= size).any():
        result[outside] = network(result[outside], *(words[outside] for words in chosen))
    return result


def _computed(values: np.ndarray, chosen: np.ndarray, *, half: int) -> np.ndarray:
    """The network, a permutation of `2 * half` bits for each of `chosen`; all arrays `[k]`."""
    bits, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = values.view(np.uint64) >> bits, values.view(np.uint64) & mask
    with np.errstate(over="ignore"):
        for round_ in range(1, _ROUNDS + 1):
            left, right = right, left ^ (_mix(right + chosen + _GOLDEN * np.uint64(round_)) & mask)
    return ((left << bits) | right).view(np.int64)


def _round_images(half: int, key: tuple[int | np.ndarray, ...]) -> list[np.ndarray]:
    """What each round of the network makes of every right half, int64 `[2**half]` each."""
    chosen = _chosen([np.asarray([word], np.uint64) for word in key], 1)
    rights, mask = np.arange(2**half, dtype=np.uint64), np.uint64(2**half - 1)
    with np.errstate(over="ignore"):
        return [
            (_mix(rights + chosen + _GOLDEN * np.uint64(round_)) & mask).view(np.int64)
            for round_ in range(1, _ROUNDS + 1)
        ]


def _looked_up(values: np.ndarray, *, tables: list[np.ndarray], half: int) -> np.ndarray:
    """`_computed` of one key, from its rounds' images."""
    left, right = values >> half, values & (2**half - 1)
    for table in tables:
        left ^= table.take(right)
        left, right = right, left
    left <<= half
    left |= right
    return left


def _chosen(words: list[np.ndarray], count: int) -> np.ndarray:
    """One number that stands for the words of each key, uint64 `[count]`."""
    chosen = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            chosen = _mix((chosen ^ word) + _GOLDEN)
    return chosen


def _mix(z: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser (splitmix64, Steele et al. 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class WindowOrder:
    """The order of rows in one epoch under `--shuffle=rows`.

    Attributes:
        num_rows: `n`.
        seed: the run's seed.
        epoch: the epoch's number.
        window: rows per window; fixed, because the order must not depend on the machine.

    Raises:
        ValueError: if there are more windows than their order can be listed for.
    """

    num_rows: int
    seed: int
    epoch: int
    window: int = WINDOW_ROWS

    def __post_init__(self) -> None:
        if self._count > _MOST_WINDOWS:
            raise ValueError(
                f"num_rows={self.num_rows}: more than {_MOST_WINDOWS} windows of {self.window} rows; "
                "use --shuffle=batches"
            )

    @property
    def _count(self) -> int:
        return -(-self.num_rows // self.window)

    @functools.cached_property
    def windows(self) -> np.ndarray:
        """Window numbers in the order of their visits, int64 `[windows]`."""
        return permuted(np.arange(self._count), self._count, self.seed, self.epoch, 0)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Position of each visit's first row, int64 `[windows + 1]`; the last is `n`."""
        sizes = np.where(self.windows == self._count - 1, self.num_rows - (self._count - 1) * self.window, self.window)
        return np.concatenate([[0], np.cumsum(sizes)])

    def visits(self, *positions: int) -> list[int]:
        """Which visits the rows at some positions belong to."""
        return (np.searchsorted(self.starts, positions, side="right") - 1).tolist()

    def window_rows(self, number: int) -> range:
        """Row numbers of a window."""
        return range(number * self.window, min(self.num_rows, (number + 1) * self.window))

    def places(self, visit: int, inside: np.ndarray) -> np.ndarray:
        """Places in its window of the rows at positions `inside` of a visit, int64."""
        number = int(self.windows[visit])
        return permuted(inside, len(self.window_rows(number)), self.seed, self.epoch, 1, number)


@functools.lru_cache(maxsize=4)
def window_order(num_rows: int, seed: int, epoch: int, window: int = WINDOW_ROWS) -> WindowOrder:
    """The order of an epoch, whose lists are made once."""
    return WindowOrder(num_rows, seed, epoch, window)


@functools.lru_cache(maxsize=16)
def _visit_rows(order: WindowOrder, visit: int) -> np.ndarray:
    """Row numbers of a visit in their order: at once, because neighbours are asked for next."""
    first = order.window_rows(int(order.windows[visit])).start
    return first + order.places(visit, np.arange(order.starts[visit + 1] - order.starts[visit]))


def epoch_rows(positions: np.ndarray, *, num_rows: int, seed: int, epoch: int, window: int = WINDOW_ROWS) -> np.ndarray:
    """Row numbers at `positions` of the epoch's order under `--shuffle=rows`.

    Args:
        positions: int64 array of positions in `[0, num_rows)`.
        num_rows: `n`.
        seed: the run's seed.
        epoch: the epoch's number.
        window: rows per window.
    """
    order = window_order(num_rows, seed, epoch, window)
    if not len(positions):
        return np.zeros(0, np.int64)
    first, last = order.visits(positions.min(), positions.max())
    if first == last:  # As nearly always: neighbours are asked for.
        return _visit_rows(order, first).take(positions - order.starts[first])
    visits = np.searchsorted(order.starts, positions, side="right") - 1
    rows = np.empty_like(positions)
    for visit in np.unique(visits).tolist():
        chosen = visits == visit
        rows[chosen] = _visit_rows(order, visit)[positions[chosen] - order.starts[visit]]
    return rows


def epoch_batches(batches: np.ndarray, *, num_batches: int, seed: int, epochs: int | np.ndarray) -> np.ndarray:
    """Batch numbers at places `batches` of the orders of `epochs`, one or one each, under `--shuffle=batches`."""
    if np.ndim(epochs) and np.min(epochs) == np.max(epochs):  # One key takes half the time of one each.
        epochs = int(np.min(epochs))
    return permuted(batches, num_batches, seed, epochs, 2)
