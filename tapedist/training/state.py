"""The state of a run between two calls of its engine, and its arrays in a checkpoint.

Legend: `P` parameters, `s` optimizer slots.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping

import numpy as np

from tapedist.training.stopping import StopMemory

_MAX_PATH_POINTS = 2048


def digest(parameters: np.ndarray) -> str:
    """SHA-256 of the float64 parameter bytes, little-endian, weights then bias."""
    # "<f8": the same bytes on big-endian machines.
    return hashlib.sha256(np.ascontiguousarray(parameters, "<f8").tobytes()).hexdigest()


@dataclasses.dataclass
class TrainingState:
    """A run between two calls.

    Attributes:
        vector: float64 `[P + s * P]`: parameters, then slots.
        step: updates done.
        first_loss: the first epoch's loss, NaN before it is known; divergence is measured against it.
        epoch_sums: float64 `[3]`: `(sum w*loss, sum w, penalty at the first batch)` of the epoch under way.
        path: `(epoch, parameters)` at logged epochs, thinned to at most a few thousand; empty if `P` is large.
        path_stride: only epochs that it divides stay in `path`.
        tested_step: updates done at the last test row before the end; -1 before the first.
        memory: the stopping rules' own state.
        stopped: why one of them stopped the run; empty if none did. Not stored: the rules give it again after a resume.
    """

    vector: np.ndarray
    step: int = 0
    first_loss: float = math.nan
    epoch_sums: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    path: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)
    path_stride: int = 1
    tested_step: int = -1
    memory: StopMemory = dataclasses.field(default_factory=StopMemory)
    stopped: str = ""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays, readable with NumPy alone."""
        epochs = np.array([epoch for epoch, _ in self.path], np.int64)
        values = np.stack([theta for _, theta in self.path]) if self.path else np.zeros([0, 0])
        return {
            "vector": self.vector,
            "step": np.array(self.step, np.int64),
            "first_loss": np.array(self.first_loss, np.float64),
            "epoch_sums": self.epoch_sums,
            "path_epochs": epochs,
            "path": values,
            "path_stride": np.array(self.path_stride, np.int64),
            "tested_step": np.array(self.tested_step, np.int64),
            "stop_memory": self.memory.to_array(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TrainingState:
        return cls(
            vector=arrays["vector"],
            step=int(arrays["step"]),
            first_loss=float(arrays["first_loss"]),
            epoch_sums=arrays["epoch_sums"],
            path=list(zip(arrays["path_epochs"].tolist(), arrays["path"], strict=True)),
            path_stride=int(arrays["path_stride"]),
            tested_step=int(arrays["tested_step"]),
            memory=StopMemory.from_array(arrays["stop_memory"]),
        )

    def add_to_path(self, epoch: int, parameters: np.ndarray) -> None:
        """Appends a point to `path`, and drops every second one when it is full."""
        if parameters.size and epoch % self.path_stride == 0:
            self.path.append((epoch, parameters))
        # By a stride of epochs, not by the length of the list: so the path does not depend on where a run was resumed.
        while len(self.path) > _MAX_PATH_POINTS:
            self.path_stride *= 2
            self.path = [(e, p) for e, p in self.path if e % self.path_stride == 0]
