"""Which rows of a table train and which test, without a list of row numbers.

A billion int64 row numbers would take 8 GB. Instead each chunk of `CHUNK_ROWS` rows keeps two counts; the rows of a
chunk are found again from the hash when they are asked for.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tapedist.data.orders import split_sizes
from tapedist.data.source import RowNumbers, places_in, spans, take_into

CHUNK_ROWS = 65_536
_CHUNKS_HELD = 64
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def row_hash(rows: np.ndarray, seed: int) -> np.ndarray:
    """A 64-bit hash of `(seed, row number)` that is the same on every machine and in every release.

    The seed-th splitmix64 stream (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), read
    at each row number.

    Args:
        rows: int64 array of row numbers in the file.
        seed: from 0 to 2**63 - 1.

    Returns:
        A uint64 array of the shape of `rows`.
    """
    start = np.array([(seed + 1) * _GOLDEN & _MASK], np.uint64)
    _finalise(start)
    hashes = rows.astype(np.uint64)
    hashes += np.uint64(1)
    hashes *= np.uint64(_GOLDEN)
    hashes += start
    _finalise(hashes)
    return hashes


def _finalise(z: np.ndarray) -> None:
    """Mixes in place: at this size, fresh temporaries cost more than the arithmetic."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)


class HashSplit(NamedTuple):
    """Which rows test, by the hash of their numbers.

    Attributes:
        test_fraction: in [0, 1).
        seed: of the hash.
    """

    test_fraction: float
    seed: int

    def tests(self, chunk: int, count: int) -> np.ndarray:
        """Whether each of a chunk's first `count` rows tests, boolean `[count]`."""
        rows = np.arange(chunk * CHUNK_ROWS, chunk * CHUNK_ROWS + count)
        return row_hash(rows, self.seed) < np.uint64(int(self.test_fraction * 2.0**64))


class RowSplit:
    """Rank and select over the kept rows of a table.

    Args:
        num_rows: rows in the file, dropped ones included: they keep their numbers.
        dropped: chunk number -> `np.packbits` of its dropped rows; chunks without any are absent.
        kind: "hash" or "index"; the latter's test split is the last `floor(kept rows * test_fraction)` kept rows.
        test_fraction: in [0, 1).
        seed: of the hash.
    """

    def __init__(self, num_rows: int, dropped: Mapping[int, np.ndarray], kind: str, test_fraction: float, seed: int):
        self._num_rows, self._dropped = num_rows, dropped
        self._hashed = kind == "hash" and test_fraction > 0
        self._hash = HashSplit(test_fraction, seed)
        self._held: collections.OrderedDict[tuple[int, bool], np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()
        chunks = -(-num_rows // CHUNK_ROWS)
        counts = np.zeros((2, chunks + 1), np.int64)
        for chunk in range(chunks):
            kept, test = self._masks(chunk)
            counts[:, chunk + 1] = kept.sum() - test.sum(), test.sum()
        self._ends = counts.cumsum(axis=1)
        num_train, num_test = map(int, self._ends[:, -1])
        if not self._hashed:
            num_train, num_test = split_sizes(num_train, test_fraction)
        self._sizes = {"train": num_train, "test": num_test}

    @property
    def kept_ends(self) -> np.ndarray:
        """Kept rows up to the end of each chunk where none tests by its hash, int64 `[chunks + 1]`."""
        return self._ends[0]

    def count(self, split: str) -> int:
        """Rows of "train" or "test"."""
        return self._sizes[split]

    def file_rows(self, split: str, indices: RowNumbers) -> RowNumbers:
        """Numbers in the file of the rows of a split.

        Args:
            split: "train" or "test".
            indices: a range, or int64 `[k]`, each in `[0, count(split))`.

        Returns:
            A range where `indices` is one and no row is left out or goes by its hash; else int64 `[k]`; ascending where
            `indices` is.

        Raises:
            IndexError: if an index is outside the split.
        """
        if not len(indices):
            return np.zeros(0, np.int64)
        if isinstance(indices, range):
            least, most = indices[0], indices[-1]
        else:
            least, most = indices.min(), indices.max()
        if least < 0 or most >= self._sizes[split]:
            raise IndexError(f"row {least} to {most} of {self._sizes[split]} in split {split!r}")
        test = split == "test" and self._hashed
        shift = self._sizes["train"] if split == "test" and not self._hashed else 0
        if isinstance(indices, range):
            indices = range(indices.start + shift, indices.stop + shift)
        elif shift:
            indices = indices + shift
        return indices if not self._hashed and not self._dropped else self._found(indices, test)

    def _found(self, indices: RowNumbers, test: bool) -> np.ndarray:
        """`file_rows` of the kept rows, or of those that train or test by their hash."""
        ends = self._ends[int(test)]
        rows = np.empty(len(indices), np.int64)
        for chunk, chosen in spans(indices, ends):
            take_into(rows, chosen, self._select(chunk, test), places_in(indices, chosen, int(ends[chunk])))
            rows[chosen] += chunk * CHUNK_ROWS
        return rows

    def _masks(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of a chunk are kept, and which of those test by their hash."""
        count = min(CHUNK_ROWS, self._num_rows - chunk * CHUNK_ROWS)
        packed = self._dropped.get(chunk)
        kept = np.ones(count, bool) if packed is None else ~np.unpackbits(packed, count=count).view(bool)
        if not self._hashed:
            return kept, np.zeros(count, bool)
        return kept, kept & self._hash.tests(chunk, count)

    def _select(self, chunk: int, test: bool) -> np.ndarray:
        """Places inside a chunk of the rows of a split, uint16 ascending."""
        key = chunk, test
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        kept, tests = self._masks(chunk)
        places = np.flatnonzero(tests if test else kept & ~tests).astype(np.uint16)
        with self._lock:
            self._held[key] = places
            while len(self._held) > _CHUNKS_HELD:
                self._held.popitem(last=False)
        return places
