"""The synthetic linear dataset, made on the fly: any row from `(seed, row number)` alone.

Legend: `k` rows of a call, `d` features, `P` pairs of columns, where a row's columns are its features and its noise.

    x_j = mean + std * z_j          y = c + m_0 * x_0 + ... + m_(d-1) * x_(d-1) + noise_std * z_d

in float32, every product rounded and then added, from left to right, with standard normals `z` from
`tapedist.data.generator`. Nothing is stored and no row needs another, so a billion rows take no memory and a run
resumes anywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.data import generator, synthetic_identity
from tapedist.data.layout import RowNumbers
from tapedist.data.orders import split_sizes
from tapedist.data.ranges import LEAST
from tapedist.data.source import Ranges, Source
from tapedist.errors import InputError

_SLACK = 1 + 2.0**-20  # More than roundings add.
_ROW_QUANTUM = 64  # Rows a compiled loop handles at once, at most; whole groups leave no remainder loop.
_LEAST_PAIRS = 16_384  # Of normals in a call: few rows take no time, and one compilation serves all calls for few.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSource(Source):
    """`n_samples` rows of `y = m . x + c + noise`; the test split is the last rows.

    Attributes:
        n_samples: rows of both splits together, up to 2**62 - 1.
        test_fraction: share of the rows in the test split, in `[0, 1)`.
        seed: from 0 to 2**63 - 1; chooses the normals.
        m: true weights, one per feature.
        c: true bias.
        mean: mean of every feature.
        std: standard deviation of every feature.
        noise_std: standard deviation of the noise.

    Raises:
        InputError: if a number leaves the range of float32, the type of the rows.
    """

    n_samples: int
    test_fraction: float
    seed: int
    m: tuple[float, ...]
    c: float
    mean: float
    std: float
    noise_std: float

    weighted = False
    target_name = "y"
    row_major = False

    def __post_init__(self) -> None:
        largest = float(np.finfo(np.float32).max)
        problems = [
            f"--{name}={value}: must be within float32's range of +-{largest:.3g}, because synthetic rows are float32"
            for name in ("m", "c", "mean", "std", "noise_std")
            for value in np.atleast_1d(getattr(self, name)).tolist()
            if not abs(value) <= largest
        ]
        if problems:
            raise InputError(*problems)
        names = synthetic_identity.feature_names(len(self.m))  # `x`, or `x0`, `x1`, ... where there are several.
        for name, value in (("num_features", len(self.m)), ("feature_names", names), ("truth", (self.m, self.c))):
            object.__setattr__(self, name, value)  # Known to the class above, not settings.

    def num_rows(self, split: str) -> int:
        """Rows in `split`, which is "train" or "test"."""
        return split_sizes(self.n_samples, self.test_fraction)[("train", "test").index(split)]

    @functools.cached_property
    def holds_tiny(self) -> bool:
        """Whether a row may hold a number other than 0 below 2**-126."""
        m, c, mean, std, noise = self._rounded_settings
        # A float32 sum is a multiple of its terms' last places, and no normal but 0 is below 2**-45.
        x = [abs(mean) * 2.0**-24, abs(std) * 2.0**-69]
        y = [abs(c) * 2.0**-24, abs(noise) * 2.0**-69, *(abs(weight) * place * 2.0**-24 for weight in m for place in x)]
        return any(0 < place < LEAST["float32"] for place in (*x, *y))

    @property
    def _rounded_settings(self) -> tuple[list[float], float, float, float, float]:
        """`m, c, mean, std, noise_std` as rows are made from them."""
        settings = np.array([self.c, self.mean, self.std, self.noise_std, *self.m], np.float32)
        c, mean, std, noise, *m = settings.astype(np.float64).tolist()
        return m, c, mean, std, noise

    def ranges(self, split: str) -> Ranges:
        """What no row of either split exceeds, in closed form: no row is made for it."""
        m, c, mean, std, noise = self._rounded_settings
        radius = abs(std) * generator.BOUND * _SLACK + abs(mean) * 2.0**-20
        middle, spread, sizes = c, 0.0, abs(c)
        for weight in m:
            middle += weight * mean
            spread += abs(weight) * radius
            sizes += abs(weight) * (abs(mean) + radius)
        spread += abs(noise) * generator.BOUND * _SLACK
        sizes += abs(noise) * generator.BOUND
        spread += sizes * ((len(m) + 2) * 2.0**-20)
        low, high = ([mean + sign * radius] * len(m) + [middle + sign * spread] for sign in (-1, 1))
        return Ranges(np.array(low), np.array(high))

    def fingerprint(self) -> str:
        """SHA-256 of the settings and the generator's version, in hexadecimal."""
        return synthetic_identity.fingerprint(generator.VERSION, dataclasses.asdict(self))

    def take(self, split: str, indices: Any) -> tuple[Any, Any]:
        """Rows of `split` by number; a row's bits do not depend on the others of the call.

        Args:
            split: "train" or "test".
            indices: int64 tensor `[k]`, each in `[0, num_rows(split))`, `k` known statically.

        Returns:
            `(x, y)`, float32 of shapes `[k, d]` and `[k]`.
        """
        if self._few:
            return self._taken(split, tf.convert_to_tensor(indices, tf.int64))
        with tf.device("CPU:0"):  # On another device the last bits would differ.
            x, y = self._rows(self._columns_at(split, tf.convert_to_tensor(indices, tf.int64)))
        return x[: indices.shape[0]], y[: indices.shape[0]]

    def take_runs(self, split: str, first: Any, *, length: int) -> tuple[Any, Any]:
        """Rows of `split` in runs; same bits as `take`, without a list of their numbers, which takes as long to write
        as a fifth of the rows.

        Args:
            split: "train" or "test".
            first: int64 tensor `[r]`, the first row of each run; runs may go on behind the split.
            length: rows of a run.

        Returns:
            `(x, y)`, float32 of shapes `[r * length, d]` and `[r * length]`.
        """
        if self._few:
            rows = tf.convert_to_tensor(first, tf.int64)[:, tf.newaxis] + tf.range(length, dtype=tf.int64)
            return self._taken(split, tf.reshape(rows, [-1]))
        with tf.device("CPU:0"):
            x, y = self._rows(self._columns_of_runs(split, first, length))
        return x[: first.shape[0] * length], y[: first.shape[0] * length]

    def take_tiles(self, split: str, first: Any, *, length: int, tile_rows: int) -> tuple[Any, Any]:
        """`take_runs` with features in tiles of `T` rows, `[r * length / T, d, T]`, as they are made."""
        if self._few:
            x, y = self.take_runs(split, first, length=length)
            return tf.transpose(tf.reshape(x, [-1, tile_rows, self.num_features]), [0, 2, 1]), y
        with tf.device("CPU:0"):
            columns = self._columns_of_runs(split, first, length)[:, : first.shape[0] * length]
            return self._rows(columns, tile_rows=tile_rows)

    def reader(self) -> Source:
        """The rows for NumPy, where there are so few that all were made at once."""
        return _FewRows(self, *self._all_rows) if self._few else self

    @property
    def _few(self) -> bool:
        """Whether one call makes all rows, so that a second way to make them would only have to be compiled."""
        return self.n_samples * len(_keys(self.seed, self.num_features)) <= _LEAST_PAIRS

    @functools.cached_property
    def _all_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Few rows of both splits, `(x [n, d], y [n])`."""
        with tf.init_scope(), tf.device("CPU:0"):
            x, y = self._rows(self._columns_at("train", tf.range(self.n_samples, dtype=tf.int64)))
            return x.numpy()[: self.n_samples], y.numpy()[: self.n_samples]

    def _taken(self, split: str, rows: Any) -> tuple[Any, Any]:
        """Of few rows those by number; runs may go on behind the last one."""
        rows = tf.minimum(rows + self._first_row(split), self.n_samples - 1)
        with tf.device("CPU:0"):
            x, y = (tf.gather(tf.constant(column), rows) for column in self._all_rows)
        return x, y

    def _columns_of_runs(self, split: str, first: Any, length: int) -> Any:
        """Columns of the rows of runs, complex64 `[P, r * length]`, or some more."""
        first = tf.convert_to_tensor(first, tf.int64)
        runs = first.shape[0]
        if length % _ROW_QUANTUM or runs * length * len(_keys(self.seed, self.num_features)) <= _LEAST_PAIRS:
            rows = first[:, tf.newaxis] + tf.range(length, dtype=tf.int64)
            return self._columns_at(split, tf.reshape(rows, [-1]))
        words = tf.bitcast(first + self._first_row(split), tf.uint32)
        return _columns_of_runs(words, *self._column_tensors(), length=length)

    def _columns_at(self, split: str, rows: Any) -> Any:
        """Columns of rows by number, complex64 `[P, k]`, or some more."""
        rows += self._first_row(split)
        count = rows.shape[0]
        if padding := self._padded(count) - count:
            rows = tf.pad(rows, [[0, padding]])
        return _columns(tf.bitcast(rows, tf.uint32), *self._column_tensors())

    def _rows(self, columns: Any, *, tile_rows: int = 0) -> tuple[Any, Any]:
        return _assemble(columns, *self._target_tensors(), num_features=self.num_features, tile_rows=tile_rows)

    def _first_row(self, split: str) -> int:
        return self.num_rows("train") if split == "test" else 0

    def _padded(self, count: int) -> int:
        """Rows that are made where `count` are wanted."""
        least = _LEAST_PAIRS // len(_keys(self.seed, self.num_features))
        return -(-max(count, least) // _ROW_QUANTUM) * _ROW_QUANTUM

    def _column_tensors(self) -> tuple[Any, Any, Any, Any]:
        """Keys, scales and shifts of the columns, each `[P, 2]`, and the 0 that pins products."""
        d = self.num_features
        keys = _keys(self.seed, d)
        scales = np.ones(2 * len(keys), np.float32)
        shifts = np.zeros(2 * len(keys), np.float32)
        scales[:d], shifts[:d] = self.std, self.mean
        by_pair = (tf.constant(array.reshape(-1, 2)) for array in (scales, shifts))
        return tf.constant(keys), *by_pair, tf.constant(0)

    def _target_tensors(self) -> tuple[Any, Any, Any]:
        """What each column weighs in `y`, `[P, 2]`, the bias, `[]`, and the 0 that pins products."""
        d = self.num_features
        weights = np.zeros(2 * len(_keys(self.seed, d)), np.float32)
        weights[:d], weights[d] = self.m, self.noise_std
        return tf.constant(weights.reshape(-1, 2)), tf.constant(self.c, tf.float32), tf.constant(0)


class _FewRows(Source):
    """Rows that lie in memory.

    Args:
        source: made them.
        x: float32 `[n, d]`, of both splits.
        y: float32 `[n]`.
    """

    weighted = False
    read_by_numpy = True

    def __init__(self, source: SyntheticSource, x: np.ndarray, y: np.ndarray):
        self._source = source
        self.num_features, self.feature_names = source.num_features, source.feature_names
        self.target_name = source.target_name
        self._columns, self._first = (x, y), {"train": 0, "test": source.num_rows("train")}

    @property
    def holds_tiny(self) -> bool:
        return self._source.holds_tiny

    def num_rows(self, split: str) -> int:
        return self._source.num_rows(split)

    def rows(self, split: str, indices: RowNumbers) -> tuple[np.ndarray, ...]:
        first = self._first[split]
        chosen = slice(first + indices.start, first + indices.stop) if isinstance(indices, range) else first + indices
        return tuple(column[chosen] for column in self._columns)


@functools.lru_cache(maxsize=8)
def _keys(seed: int, num_features: int) -> np.ndarray:
    return generator.pair_keys(seed, num_features + 1)


@tf.function(jit_compile=True, autograph=False)
def _columns(words: Any, keys: Any, scales: Any, shifts: Any, zero: Any) -> Any:
    """Features and noise of rows, two columns to a complex number: complex64 `[P, k]`.

    The settings are tensors, not constants: one compilation serves every source.
    """
    return _scaled_pairs(words[:, 0], words[:, 1], keys, scales, shifts, zero)


@tf.function(jit_compile=True, autograph=False)
def _columns_of_runs(first: Any, keys: Any, scales: Any, shifts: Any, zero: Any, *, length: int) -> Any:
    """`_columns` of runs of rows, by the first row of each: uint32 `[r, 2]`."""
    low = first[:, 0:1] + tf.cast(tf.range(length), tf.uint32)
    carry = tf.cast(low < first[:, 0:1], tf.uint32)
    # Two axes of rows to the end: as one, each row's run would have to be found by a division.
    keys, scales, shifts = (t[:, :, tf.newaxis] for t in (keys, scales, shifts))
    by_run = _scaled_pairs(low, first[:, 1:2] + carry, keys, scales, shifts, zero)
    return tf.reshape(by_run, [keys.shape[0], first.shape[0] * length])


def _scaled_pairs(low: Any, high: Any, keys: Any, scales: Any, shifts: Any, zero: Any) -> Any:
    even, odd = generator.normal_pairs(low, high, keys, zero)
    even, odd = (generator.pinned(z * scales[:, p : p + 1], zero) for p, z in enumerate((even, odd)))
    return tf.complex(even + shifts[:, 0:1], odd + shifts[:, 1:2])


@tf.function(jit_compile=True, autograph=False)
def _assemble(
    columns: Any, weights: Any, bias: Any, zero: Any, *, num_features: int, tile_rows: int = 0
) -> tuple[Any, Any]:
    """`(x, y)`, `[k, d]` or tiles `[k / T, d, T]`, and `[k]`, from the columns.

    A function of its own: within `_columns`, XLA would compute the normals once for each output.
    """
    pairs, count = columns.shape

    def add_pair(p: Any, y: Any) -> tuple[Any, Any]:
        y += generator.pinned(weights[p, 0] * tf.math.real(columns[p]), zero)
        return p + 1, y + generator.pinned(weights[p, 1] * tf.math.imag(columns[p]), zero)

    _, y = tf.while_loop(lambda p, _: p < pairs, add_pair, [0, tf.fill([count], bias)])
    if tile_rows:
        # The numbers of pairs change places, not those of columns: half as many loops over `T` rows each.
        by_tile = tf.transpose(tf.reshape(columns, [pairs, count // tile_rows, tile_rows]), [1, 0, 2])
        x = tf.stack([tf.math.real(by_tile), tf.math.imag(by_tile)], axis=2)
        return tf.reshape(x, [count // tile_rows, 2 * pairs, tile_rows])[:, :num_features], y
    by_row = tf.transpose(columns)
    x = tf.reshape(tf.stack([tf.math.real(by_row), tf.math.imag(by_row)], axis=-1), [count, 2 * pairs])
    return x[:, :num_features], y
