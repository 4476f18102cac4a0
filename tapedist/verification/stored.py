"""The stored state of a run, for reading only, and its rows as training takes them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tapedist import reference
from tapedist.config import TrainConfig
from tapedist.data import catalog, synthetic_identity
from tapedist.data.layout import RowNumbers
from tapedist.data.source import Ranges, RowArrays, Source, row_arrays
from tapedist.data.standardize import RawUnits, StandardUnits
from tapedist.errors import InputError, StateError
from tapedist.run.saved_run import answer_differences, identity, read_config
from tapedist.storage.checkpoints import Checkpoint, CheckpointStore
from tapedist.storage.model_file import FittedModel, find_start, read_content, read_model
from tapedist.storage.run_folder import RunFolder

_LINEAR = "LinearModel"  # As `training.model` names it.
_CHUNK_ROWS, _CHUNK_NUMBERS = 2**17, 2**21
_HELD_NUMBERS = 2**25  # 256 MiB of float64; larger splits are read or made again in every epoch.


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """The stored state of a run.

    Attributes:
        root: its folder.
        config: its settings.
        checkpoints: in the order of their steps.
        model: the content of `model.json`; None if the run is not finished.
    """

    root: Path
    config: TrainConfig
    checkpoints: tuple[Checkpoint, ...]
    model: FittedModel | None

    @classmethod
    def read(cls, run_dir: str) -> StoredRun:
        """Reads a folder.

        Raises:
            InputError: if there is no such run, or it cannot be recomputed.
            StateError: if one of its files is damaged.
        """
        folder = RunFolder.find(run_dir)
        checkpoints = CheckpointStore(directory=folder.checkpoints).load_all()
        is_finished = folder.model.exists()
        if not (checkpoints or is_finished):
            raise InputError(f"--run_dir={run_dir!r}: holds no checkpoint and no model; there is nothing to verify")
        config = read_config(folder)
        content = read_content(folder.model, run_dir=folder.root) if is_finished else {}
        _check_kind(folder.root, config, content, [checkpoint.meta for checkpoint in checkpoints])
        model = read_model(folder.model, run_dir=folder.root) if is_finished else None
        ordered = tuple(sorted(checkpoints, key=lambda checkpoint: checkpoint.step))
        return cls(folder.root, config, ordered, model)

    def open_rows(self) -> Source:
        """The rows that the run was trained on.

        Raises:
            InputError: if they were not kept, or cannot be read.
            StateError: if they or other settings are not those of the run.
        """
        config = self.config
        source: Source = catalog.open_source(config) if config.from_table else SyntheticRows(config)
        rows, start = source.fingerprint(), find_start(config.init_from).digest if config.init_from else ""
        current = identity(config, rows=rows, model=start + _LINEAR)
        for checkpoint in self.checkpoints:
            stored = checkpoint.meta["identity"]
            _check_rows(config, stored["rows"], rows, where=checkpoint.path.name)
            if differences := answer_differences(stored, current):
                raise StateError(f"differs: settings of {checkpoint.path.name} from config.flags: {differences[0]}")
        if self.model:
            _check_rows(config, self.model.content.get("rows"), rows, where="model.json")
        return source


def _check_kind(root: Path, config: TrainConfig, content: Mapping[str, Any], metas: list[Mapping[str, Any]]) -> None:
    """Raises for runs that the reference does not cover."""
    where, model = f"--run_dir={str(root)!r}", metas[-1]["identity"]["model"] if metas else _LINEAR
    start, has_weights = model.removesuffix(_LINEAR), len(content.get("weights", [0.0])) > 0
    if config.arithmetic == "fast":
        raise InputError(f"{where}: was trained by --arithmetic=fast, whose bits are those of its machine")
    if not (model.endswith(_LINEAR) and has_weights):
        raise InputError(f"{where}: its model is not the linear one, of which alone there is a reference")
    if content.get("loss", config.loss) != config.loss or (start and not (config.init_from and len(start) == 64)):
        raise InputError(f"{where}: was trained with a loss of the caller's, of which there is no reference")
    if content.get("own_source"):
        raise InputError(f"{where}: was trained from Python on rows that were not kept; train on a table to verify it")


def _check_rows(config: TrainConfig, stored: str | None, current: str, *, where: str) -> None:
    if stored == current:
        return
    if not config.from_table:
        raise InputError(
            f"{where} is of other rows than the synthetic ones, such as arrays in Python; they were not kept, so that "
            "nothing can be recomputed"
        )
    raise StateError(
        f"differs: the rows: {config.data} is not the table that {where} is of: its fingerprint was "
        f"{str(stored)[:12]}..., and is {current[:12]}..."
    )


def path_of(checkpoint: Checkpoint) -> list[tuple[int, np.ndarray]]:
    """`(epoch, parameters [P])` over time, from a checkpoint."""
    arrays = checkpoint.arrays
    return list(zip(arrays["path_epochs"].tolist(), arrays["path"], strict=True))


class SyntheticRows(Source):
    """The synthetic rows of a config by the reference's generator, for NumPy."""

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
    """The rows of a split in the units of training, rounded as in training.

    Args:
        source: the raw rows, which have a NumPy method `rows`.
        split: "train" or "test".
        units: of training.
        dtype: "float32" or "float64".
        report: takes the progress of a pass, after each chunk.
    """

    def __init__(
        self, source: Source, split: str, *, units: RawUnits | StandardUnits, dtype: str, report: Callable[[str], None]
    ):
        self._source, self._split, self._units, self._report = source, split, units, report
        self._kind = reference.KINDS[dtype]
        self._exponent = source.weight_exponent
        self.num_rows = source.num_rows(split)

    def take(self, rows: RowNumbers) -> reference.Chunk:
        """Rows by number; fast if the split is held in memory."""
        if self._held is None:
            return self._taken(rows)
        part = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        x, y, w = self._held
        return x[part], y[part], None if w is None else w[part]

    def chunks(self, part: range | None = None) -> Iterator[reference.Chunk]:
        """The rows of `part`, by default all, in their order."""
        for rows in self._pieces(part):
            yield self.take(rows)
            self._report(f"row {rows.stop} of {self.num_rows}")

    @functools.cached_property
    def ranges(self) -> reference.Ranges:
        """The ranges, by a pass over the rows, or of synthetic rows from their settings."""
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
        """Returns whether any row has a positive weight."""
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
