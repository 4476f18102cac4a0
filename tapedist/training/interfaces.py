"""Interfaces that the trainer depends on: an observer of the run, and the consensus of its processes.

The trainer calls an `Observer` that `run` injects, and imports nothing that writes files, terminals or TensorBoard.

Every process runs the same outer loop and calls the same compiled programs, which wait for each other. So a decision
that depends on something local, such as the time of a call or a signal, is agreed on first, by `Consensus`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

from tapedist.errors import Interrupted


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
    """An observer of a run. Calls come from one thread: `rewind` if at all, `begin`, the rest, `close`."""

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
        """Shows progress; keeps nothing.

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


class NullObserver:
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


class Decision(NamedTuple):
    """The next actions of the outer loop.

    Attributes:
        stop: the signal that asked to stop; 0 for none.
        steps: updates that the next call should take.
        save: whether a save is due by the clock.
    """

    stop: int
    steps: int
    save: bool


class Consensus(Protocol):
    """Decisions that all processes of a run share. All of them must call every method, in the same order."""

    def agree(self, mine: Decision) -> Decision:
        """Combines the decisions of all processes: any process's stop, the chief's steps and save."""

    def interrupted(self, stop: int) -> bool:
        """Returns whether any process needs its outer loop; called often inside long steps.

        Args:
            stop: not 0 if this process does: the signal that it received, or 1 if a save is due.
        """

    def broadcast_text(self, words: str) -> str:
        """Returns the chief's `words` on every process."""


class StopRequest(Protocol):
    """The signal that asked the run to stop, if one did."""

    signum: int | None


def check_stop(consensus: Consensus, request: StopRequest) -> bool:
    """Returns False, or raises if any process was asked to stop; for passes over rows outside of the trainer.

    Raises:
        Interrupted: on all processes alike, if one of them was asked to stop.
    """
    mine = request.signum or 0
    if not consensus.interrupted(mine):
        return False
    # All processes raise the same signal, also those that did not receive it.
    raise Interrupted(consensus.agree(Decision(mine, 0, False)).stop)


class SingleProcess:
    """The consensus of a single process."""

    def agree(self, mine: Decision) -> Decision:
        return mine

    def interrupted(self, stop: int) -> bool:
        return bool(stop)

    def broadcast_text(self, words: str) -> str:
        return words
