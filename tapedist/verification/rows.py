"""The rows of a run as the reference takes them, read or made in chunks; without TensorFlow.

Legend: `k` rows of a chunk, `d` features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from tapedist import reference
from tapedist.config import TrainConfig
from tapedist.data import synthetic_identity
from tapedist.data.orders import Source
from tapedist.data.ranges import Ranges
from tapedist.data.source import RowArrays, row_arrays
from tapedist.data.standardize import RawUnits, StandardUnits
from tapedist.data.tables.spans import RowNumbers

_CHUNK_ROWS, _CHUNK_NUMBERS = 2**17, 2**21
_HELD_NUMBERS = 2**25  # 256 MiB; what is more is read or made anew in every epoch.


class SyntheticRows:
    """The synthetic rows of a config by the reference's generator; what NumPy functions need of a `Source`."""

    weighted = False
    target_name = "y"
    dtype = np.dtype(np.float32)

    def __init__(self, config: TrainConfig):
        self._config = config
        self._settings = {name: getattr(config, name) for name in ("m", "c", "mean", "std", "noise_std")}
        self.num_features = len(config.m)
        self.feature_names = synthetic_identity.feature_names(self.num_features)

    def num_rows(self, split: str) -> int:
        sizes = reference.split_sizes(self._config.n_samples, self._config.test_fraction)
        return sizes[("train", "test").index(split)]

    def fingerprint(self) -> str:
        sizes = {name: getattr(self._config, name) for name in ("n_samples", "test_fraction", "seed")}
        return synthetic_identity.fingerprint(synthetic_identity.VERSION, sizes | self._settings)

    def ranges(self, split: str) -> Ranges:
        found = reference.synthetic_ranges(**self._settings)
        return Ranges(found.low, found.high)

    def rows(self, split: str, indices: RowNumbers) -> tuple[np.ndarray, np.ndarray]:
        """`(x [k, d], y [k])`, float32, of rows of a split by number."""
        numbers = np.asarray(indices, np.int64) + (self.num_rows("train") if split == "test" else 0)
        return reference.synthetic_rows(self._config.seed, numbers, **self._settings)


class TrainedRows:
    """The rows of a split in the units of training, as they are computed with.

    Args:
        source: the raw rows, which have a NumPy method `rows`.
        split: "train" or "test".
        units: of training.
        dtype: "float32" or "float64".
        tell: takes how far a pass is, after each chunk.
    """

    def __init__(
        self, source: Source, split: str, *, units: RawUnits | StandardUnits, dtype: str, tell: Callable[[str], None]
    ):
        self._source, self._split, self._units, self._tell = source, split, units, tell
        self._kind = reference.KINDS[dtype]
        self._exponent = getattr(source, "weight_exponent", 0)
        self.num_rows = source.num_rows(split)

    def take(self, rows: RowNumbers) -> reference.Chunk:
        """Rows as trained; quick where all of them are held."""
        if self._held is None:
            return self._taken(rows)
        part = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        x, y, w = self._held
        return x[part], y[part], None if w is None else w[part]

    def chunks(self, part: range | None = None) -> Iterator[reference.Chunk]:
        """The rows of `part`, by default all, in their order."""
        for rows in self._pieces(part):
            yield self.take(rows)
            self._tell(f"row {rows.stop} of {self.num_rows}")

    @functools.cached_property
    def ranges(self) -> reference.Ranges:
        """By a pass over the rows, or of synthetic ones by their settings."""
        if not isinstance(self._source, SyntheticRows):
            return reference.ranges(map(self._in_units, self._pieces()), self._exponent)
        known = self._source.ranges(self._split)
        ends = (self._standard(v[np.newaxis, :-1], v[-1:]) for v in (known.low, known.high))
        low, high = (np.append(x[0], y) for x, y in ends)
        return reference.Ranges(low, high, None)

    @property
    def bounds(self) -> reference.Bounds:
        return reference.bounds(self.ranges, self._kind)

    @functools.cached_property
    def have_weight(self) -> bool:
        """Whether any row counts."""
        return self.num_rows > 0 and any(w is None or bool((w > 0).any()) for _, _, w in self.chunks())

    @functools.cached_property
    def _held(self) -> reference.Chunk | None:
        if self.num_rows * (self._source.num_features + 2) > _HELD_NUMBERS:
            return None
        x, y, w = zip(*map(self._taken, self._pieces()), strict=True)
        return np.concatenate(x), np.concatenate(y), None if w[0] is None else np.concatenate(w)

    def _pieces(self, part: range | None = None) -> Iterator[range]:
        part = range(self.num_rows) if part is None else part
        size = max(1, min(_CHUNK_ROWS, _CHUNK_NUMBERS // self._source.num_features))
        for first in range(part.start, part.stop, size):
            yield range(first, min(first + size, part.stop))

    def _taken(self, rows: RowNumbers) -> reference.Chunk:
        return reference.as_trained(*self._in_units(rows), self._kind, self._exponent)

    def _in_units(self, rows: RowNumbers) -> RowArrays:
        x, y, w = row_arrays(self._source, self._split, rows)
        return *self._standard(x, y), w

    def _standard(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        units = self._units
        if isinstance(units, RawUnits):
            return x, y
        return reference.standardized(x, y, center=units.center, factor=units.factor, target_center=units.target_center)
