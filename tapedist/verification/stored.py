"""What a run folder says of its run, read and touched by nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tapedist.config import TrainConfig
from tapedist.data import catalog
from tapedist.data.orders import Source
from tapedist.errors import InputError, StateError
from tapedist.run import run_files
from tapedist.run.persistence import identity
from tapedist.run.resume import answer_differences
from tapedist.storage.checkpoints import Checkpoint, CheckpointStore
from tapedist.storage.model_file import FittedModel, find_start, read_content, read_model
from tapedist.storage.run_folder import RunFolder
from tapedist.verification.rows import SyntheticRows

_LINEAR = "LinearModel"  # As `training.model` names it.


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """What is stored of a run.

    Attributes:
        root: its folder.
        config: its settings.
        checkpoints: in the order of their steps.
        model: what `model.json` says; None if the run has not been finished.
    """

    root: Path
    config: TrainConfig
    checkpoints: tuple[Checkpoint, ...]
    model: FittedModel | None

    @classmethod
    def read(cls, run_dir: str) -> StoredRun:
        """Reads a folder.

        Raises:
            InputError: if there is no such run, or it is none that can be recomputed.
            StateError: if a file of it cannot be trusted.
        """
        folder = RunFolder.find(run_dir)
        checkpoints = CheckpointStore(directory=folder.checkpoints).load_all()
        is_finished = folder.model.exists()
        if not (checkpoints or is_finished):
            raise InputError(f"--run_dir={run_dir!r}: holds no checkpoint and no model; there is nothing to verify")
        config = run_files.read_config(folder)
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
        source: Any = catalog.open_source(config) if config.from_table else SyntheticRows(config)
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
    """Refuses what the reference does not know."""
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
    """`(epoch, parameters [P])` over time, as a checkpoint remembers them."""
    arrays = checkpoint.arrays
    return list(zip(arrays["path_epochs"].tolist(), arrays["path"], strict=True))
