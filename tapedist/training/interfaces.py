"""What the trainer tells the world while it runs: rows of metrics, and how far it is.

The trainer calls an `Observer` that `run` injects and knows nothing of files, terminals or TensorBoard.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of metrics.

    Attributes:
        step: updates done before the loss was measured.
        epoch: the epoch that the row reports on.
        split: "train" or "test".
        loss: weighted mean of the per-example loss, without the penalty; may be NaN or infinite.
        penalty: the L2 penalty at the same parameters.
        examples_per_sec: training rows visited per second, or None where nothing was timed.
        seconds: when the row was measured, in seconds since 1970 (Unix time).
    """

    step: int
    epoch: int
    split: str
    loss: float
    penalty: float
    examples_per_sec: float | None
    seconds: float


class Observer(Protocol):
    """Who watches a run. Calls come from one thread: `rewind` if at all, `begin`, the rest, `close`."""

    def begin(
        self, *, epochs: int, first_epoch: int, train_rows: int, test_rows: int, steps_per_epoch: int = 0
    ) -> None:
        """Training starts.

        Args:
            epochs: how many epochs the run has in all.
            first_epoch: how many are done already, which is above 0 after a resume.
            train_rows: rows of the training split.
            test_rows: rows of the test split.
            steps_per_epoch: updates per epoch, so that progress inside an epoch shows; 0 if unknown.
        """

    def record(self, row: Row) -> None:
        """Keeps one row; rows come in the order of their steps, by the thousand."""

    def advance(self, *, epoch: int, step: int, loss: float | None, examples_per_sec: float) -> None:
        """Shows how far the run is; keeps nothing.

        Args:
            epoch: epochs done.
            step: updates done.
            loss: the latest training loss, if one is known.
            examples_per_sec: training rows visited per second, lately.
        """

    def position(self) -> int:
        """Bytes of metrics that are safe on disk by now; a checkpoint stores the number for `rewind`."""

    def rewind(self, position: int) -> None:
        """Forgets rows beyond `position`, so that a resumed run's metrics equal an uninterrupted run's."""

    def close(self) -> None:
        """Writes what is buffered and releases files and terminal; a second call does nothing."""


class Unobserved:
    """An observer that keeps and shows nothing: for workers that are not the chief, and for library calls."""

    def begin(
        self, *, epochs: int, first_epoch: int, train_rows: int, test_rows: int, steps_per_epoch: int = 0
    ) -> None:
        pass

    def record(self, row: Row) -> None:
        pass

    def advance(self, *, epoch: int, step: int, loss: float | None, examples_per_sec: float) -> None:
        pass

    def position(self) -> int:
        return 0

    def rewind(self, position: int) -> None:
        pass

    def close(self) -> None:
        pass
