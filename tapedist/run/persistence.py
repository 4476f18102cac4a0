"""A run's state in its checkpoints: what is stored, and whether a stored state may be continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tapedist.config import TrainConfig
from tapedist.errors import StateError
from tapedist.run.resume import answer_differences
from tapedist.storage.checkpoints import Checkpoint, CheckpointStore, OlderCheckpoint
from tapedist.training.state import TrainingState

_PROGRESS = "progress."


class RunStore:
    """Saves and loads the `TrainingState` of one run.

    Args:
        directory: the run's checkpoints.
        identity: what the answer depends on, by name: config fields, the rows' fingerprint, the model.
        environment: versions and devices; another one is warned about, because bits may differ.
        warn: takes one line.
    """

    def __init__(
        self,
        directory: Path,
        *,
        identity: Mapping[str, Any],
        environment: Mapping[str, Any],
        warn: Callable[[str], None],
    ):
        self._directory = directory
        self._store = CheckpointStore(directory=directory, warn=warn)
        self._identity = dict(identity)
        self._environment = dict(environment)
        self._warn = warn

    def save(self, state: TrainingState, *, progress: Mapping[str, np.ndarray], position: int) -> None:
        """Commits a state.

        Args:
            state: of whole steps.
            progress: the engine's sums of the step under way.
            position: bytes of `metrics.jsonl` that belong to the state.

        Raises:
            StorageError: if it cannot be written; the previous one stays valid.
        """
        arrays = {**to_arrays(state, progress), "metrics_position": np.array(position, np.int64)}
        meta = {"identity": self._identity, "environment": self._environment}
        self._store.save(arrays, step=state.step, meta=meta)

    def load(self) -> tuple[TrainingState, dict[str, np.ndarray], int] | None:
        """`(state, progress, position)` of the newest good checkpoint; None if none was ever saved.

        Raises:
            StateError: if none is good any more, or it belongs to a run with another answer or of version 0.1.
        """
        try:
            checkpoint = self._store.load()
        except OlderCheckpoint as error:
            raise StateError(f"{error}; {self._way_on()}") from None
        if checkpoint is None:
            return None
        self._check(checkpoint)
        arrays = checkpoint.arrays
        return *from_arrays(arrays), int(arrays["metrics_position"])

    def _way_on(self) -> str:
        """What to do with a run of version 0.1, whose parameters are at hand if it has finished once."""
        run_dir = self._directory.parent
        if (run_dir / "model.json").exists():
            start = f"go on from its parameters by --init_from={run_dir} and a new --run_dir"
            return f"{start}, or begin anew by --resume=never"
        return "the run never finished, so that no other can start from it; begin anew by --resume=never"

    def _check(self, checkpoint: Checkpoint) -> None:
        differences = answer_differences(checkpoint.meta["identity"], self._identity)
        if differences:
            raise StateError(
                f"{checkpoint.path.parent.parent}: holds a run with another answer ({'; '.join(differences)}); "
                "repeat its settings to continue it, give another --run_dir, or begin anew by --resume=never"
            )
        changed = answer_differences(checkpoint.meta["environment"], self._environment)
        if changed:
            self._warn(f"the run was begun in another environment ({'; '.join(changed)}): bits may differ")


def to_arrays(state: TrainingState, progress: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state and the engine's sums of the step under way as one set of arrays."""
    return {**state.to_arrays(), **{_PROGRESS + name: value for name, value in progress.items()}}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[TrainingState, dict[str, np.ndarray]]:
    """The inverse of `to_arrays`; other arrays are left alone."""
    progress = {name.removeprefix(_PROGRESS): v for name, v in arrays.items() if name.startswith(_PROGRESS)}
    return TrainingState.from_arrays(arrays), progress


def identity(config: TrainConfig, *, rows: str, model: str) -> dict[str, Any]:
    """What a run's answer depends on.

    Args:
        config: the run's settings.
        rows: the source's fingerprint.
        model: names the model and its shape.
    """
    return {**config.answer_fields(), "rows": rows, "model": model}
