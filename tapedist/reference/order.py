"""The order in which mini-batches visit the rows: pseudo-random permutations without a list.

Legend: `n` rows, `B` rows of a batch. A window is a range of consecutive rows.
"""

from __future__ import annotations

import numpy as np

WINDOW_ROWS = 2**18
GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = 6


def permuted(indices: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Images, int64, of `indices` under a pseudo-random permutation of `range(size)` that `key` chooses.

    A balanced Feistel network on the smallest even number of bits that holds `size`, walked until the value falls
    inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    chosen = np.zeros(1, np.uint64)
    for word in key:
        chosen = _mixed((chosen ^ np.uint64(word)) + np.uint64(GOLDEN))
    half = max(1, -(-(size - 1).bit_length() // 2))
    values = np.array(indices, np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        values[outside] = _network(values[outside], chosen, half)
        outside = values >= size
    return values.astype(np.int64)


def _network(values: np.ndarray, chosen: np.ndarray, half: int) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = values >> bits, values & mask
    for number in range(1, ROUNDS + 1):
        left, right = right, left ^ (_mixed(right + chosen + np.uint64(GOLDEN * number % 2**64)) & mask)
    return (left << bits) | right


def _mixed(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def batch_rows(
    step: int, *, num_rows: int, batch_size: int, shuffle: str, seed: int, window: int = WINDOW_ROWS
) -> np.ndarray:
    """Numbers, int64, of the rows that are summed after `step` updates; `shuffle` is "none", "batches" or "rows"."""
    size = min(batch_size, num_rows)
    per_epoch = -(-num_rows // size)
    epoch, batch = divmod(step, per_epoch)
    if shuffle == "batches":
        batch = int(permuted(np.array([batch]), per_epoch, seed, epoch, 2)[0])
    positions = np.arange(batch * size, min(num_rows, (batch + 1) * size))
    if shuffle != "rows":
        return positions
    return _shuffled(positions, num_rows=num_rows, seed=seed, epoch=epoch, window=window)


def _shuffled(positions: np.ndarray, *, num_rows: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """Rows at positions of an epoch: windows in a random order, and the rows of each in a random order."""
    count = -(-num_rows // window)
    rows, end = np.empty_like(positions), 0
    for number in permuted(np.arange(count), count, seed, epoch, 0).tolist():
        size = min(window, num_rows - number * window)
        begin, end = end, end + size
        here = (begin <= positions) & (positions < end)
        rows[here] = number * window + permuted(positions[here] - begin, size, seed, epoch, 1, number)
    return rows
