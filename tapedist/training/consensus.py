"""How several processes decide the same: what one of them knows by a clock or a signal, all must act on together.

Every process runs the same outer loop and calls the same compiled programs, which wait for each other. So a decision
that rests on something local, such as how long a call took or that a signal came, is agreed on first.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from tapedist.errors import Interrupted


class Turn(NamedTuple):
    """What the outer loop does next.

    Attributes:
        stop: the signal that asked to stop; 0 for none.
        steps: updates that the next call should take.
        save: whether the clock says that a save is due.
    """

    stop: int
    steps: int
    save: bool


class Consensus(Protocol):
    """All processes of a run, as one that decides. Every method must be called by all of them, in the same order."""

    def turn(self, mine: Turn) -> Turn:
        """What all do next: anybody's stop, the chief's steps and save."""

    def interrupted(self, stop: int) -> bool:
        """Whether anybody wants a turn of the outer loop; asked often inside long steps.

        Args:
            stop: not 0 if this process does: the signal that it received, or 1 if a save is due.
        """

    def chiefs(self, words: str) -> str:
        """The chief's `words`."""


class StopRequest(Protocol):
    """Whether somebody asked the run to stop, and by which signal."""

    signum: int | None


def heed(consensus: Consensus, request: StopRequest) -> bool:
    """False, if nobody in the run was asked to stop; for passes over the rows that have no other way to end early.

    Raises:
        Interrupted: if somebody was; on all processes alike.
    """
    mine = request.signum or 0
    if not consensus.interrupted(mine):
        return False
    raise Interrupted(consensus.turn(Turn(mine, 0, False)).stop)


class Alone:
    """One process agrees with itself."""

    def turn(self, mine: Turn) -> Turn:
        return mine

    def interrupted(self, stop: int) -> bool:
        return bool(stop)

    def chiefs(self, words: str) -> str:
        return words
