"""Regression datasets of TFDS that lie on disk; nothing is ever downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tapedist.data.tables.columns import Column
from tapedist.data.tables.files import TableFile, display
from tapedist.data.tables.npy import to_floats
from tapedist.data.tables.reader import INEXACT, Cell, RowBatch, TableReader
from tapedist.errors import InputError, StateError

_BATCH_ROWS = 65_536
_FIRST_SPLITS = ("train", "validation", "test")
_REAL = ("float", "int", "uint")


class TfdsReader(TableReader):
    """Reads all splits of a prepared dataset, `train`, `validation`, `test` first, in the order they were written.

    A feature that is a real scalar is a column of its name; a vector `[k]` is `name0`, `name1`, ... The target is the
    supervised one and the features are the supervised input, if they are real, unless the user names others. The data
    folder is `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`. The header is read from the dataset's JSON files, so that
    a wrong name is found without TensorFlow; the rows need it.

    Args:
        data: `tfds:NAME[/CONFIG][:VERSION]`; without a version the highest that lies there.

    Raises:
        InputError: if the dataset is not there or is no table.
    """

    def __init__(self, data: str):
        self._data = display(data)
        self._folder = _version_folder(data)
        self.files = [TableFile.of(path) for path in sorted(_listing(self._folder))]
        tree, info = self._json("features.json"), self._json("dataset_info.json")
        features = tree.get("featuresDict", {}).get("features", {})
        self._widths = {name: _width(feature) for name, feature in features.items()}
        self.columns = tuple(
            Column(column, width is not None, "numbers" if width is not None else "no real scalar or vector")
            for name, width in self._widths.items()
            for column in _column_names(name, width)
        )
        keys = info.get("supervisedKeys", {}).get("tuple", {}).get("items", [])
        inputs, target = [key.get("featureKey", "") for key in keys[:2]] if len(keys) > 1 else ("", "")
        self.default_target = target if self._widths.get(target) in (0, 1) else ""
        width = self._widths.get(inputs)
        self.default_features = () if width is None else tuple(_column_names(inputs, width))

    def batches(self, names: Sequence[str]) -> Iterator[RowBatch]:
        """All rows in order."""
        import tensorflow as tf
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self._folder)
        wanted = {n: True for n, width in self._widths.items() if set(_column_names(n, width)) & set(names)}
        config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        for split in sorted(builder.info.splits, key=_split_order):
            rows = builder.as_dataset(
                split=split, shuffle_files=False, read_config=config,
                decoders=tfds.decode.PartialDecoding(wanted),
            )  # fmt: skip
            first = 0
            try:
                for batch in rows.batch(_BATCH_ROWS).as_numpy_iterator():
                    raw = self._pick(batch, names)
                    yield _batch(f"{self._data}:{split}", first, names, raw)
                    first += len(raw[0])
            except tf.errors.OpError as error:
                raise InputError(f"{self._data}: cannot be read ({display(error.message)}); prepare it again") from None
        self.check_unchanged()

    def _pick(self, batch: dict[str, Any], names: Sequence[str]) -> list[np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name, values in batch.items():
            width = self._widths[name]
            columns = [values] if not width else list(values.T)
            found.update(zip(_column_names(name, width), columns, strict=True))
        return [found[name] for name in names]

    def _json(self, name: str) -> dict[str, Any]:
        try:
            with open(os.path.join(self._folder, name), encoding="utf-8") as stream:
                return json.load(stream)
        except (OSError, ValueError) as error:
            raise InputError(f"--data={self._data}: {name} is not readable ({error}); prepare it again") from None


def _version_folder(data: str) -> str:
    root = os.environ.get("TFDS_DATA_DIR") or os.path.join(os.path.expanduser("~"), "tensorflow_datasets")
    name, _, version = data.partition(":")[2].partition(":")
    parts = name.split("/")
    if not 1 <= len(parts) <= 2 or not all(part and part.strip(".") and part.isprintable() for part in parts):
        raise InputError(f"--data={display(data)}: must be tfds:NAME or tfds:NAME/CONFIG, with :VERSION if need be")
    base = os.path.join(root, *parts)
    versions = [entry for entry in _names(base) if _version(entry)]
    configs = [entry for entry in _names(base) if any(map(_version, _names(os.path.join(base, entry))))]
    if not versions and configs and len(parts) == 1:
        raise InputError(f"--data={display(data)}: needs a config; present: {', '.join(map(display, configs))}")
    if not versions or (version and version not in versions):
        present = ", ".join(map(display, versions or _names(root))) or "nothing"
        raise InputError(
            f"--data={display(data)}: is not in {display(root)} (present: {present}); prepare it by `tfds build`, or "
            "set TFDS_DATA_DIR; nothing is downloaded"
        )
    return os.path.join(base, version or max(versions, key=_version))


def _names(folder: str) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []


def _listing(folder: str) -> list[str]:
    try:
        return [entry.path for entry in os.scandir(folder) if entry.is_file() and entry.stat().st_size]
    except OSError as error:
        raise StateError(f"{display(folder)}: {error.strerror} while in use; restore it and resume") from None


def _version(name: str) -> tuple[int, ...]:
    parts = name.split(".")
    return tuple(map(int, parts)) if len(parts) == 3 and all(part.isdecimal() for part in parts) else ()


def _split_order(name: str) -> tuple[int, str]:
    return (_FIRST_SPLITS.index(name) if name in _FIRST_SPLITS else len(_FIRST_SPLITS)), name


def _width(feature: dict[str, Any]) -> int | None:
    """0 for a real scalar, `k` for a real vector `[k]`, None for anything else."""
    tensor = feature.get("tensor") or feature.get("scalar")
    kind = feature.get("pythonClassName", "").rpartition(".")[2]
    if tensor is None or kind not in ("Tensor", "Scalar") or not tensor.get("dtype", "").startswith(_REAL):
        return None
    sizes = tensor.get("shape", {}).get("dimensions", [])
    if not sizes:
        return 0
    return int(sizes[0]) if len(sizes) == 1 and int(sizes[0]) > 0 else None


def _column_names(name: str, width: int | None) -> list[str]:
    return [name] if not width or width == 1 else [f"{name}{j}" for j in range(width)]


def _batch(where: str, first: int, names: Sequence[str], raw: list[np.ndarray]) -> RowBatch:
    def explain(row: int, column: int) -> Cell:
        value = raw[column][row].item()
        rule = INEXACT if isinstance(value, int) and abs(value) > 2**53 else ""
        return Cell(f"{where}:row {first + row + 1}:{display(names[column])}", str(value), rule)

    return RowBatch([to_floats(column) for column in raw], explain)
