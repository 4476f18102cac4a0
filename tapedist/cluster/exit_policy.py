"""The launcher's decisions about workers that have exited: a pure function of their exit codes.

Exit codes are `subprocess`'s: negative means death by that signal.
"""

from __future__ import annotations

import dataclasses
import enum
import signal
from collections.abc import Mapping

from tapedist import process
from tapedist.errors import MEANINGS, PeerLostError

_PEER_LOST = PeerLostError.exit_code
_STOPPED = tuple(128 + number for number in (*process.ALWAYS, *process.UNLESS_HANDLED))

# A worker that lost a peer exits by itself within a moment; one that does not is the one that hangs.
_SETTLE_SECS = 5.0
# After a real error the others have no reason to wait, but may be writing a checkpoint.
_ABANDON_SECS = 10.0


class Action(enum.Enum):
    """The next action on the attempt."""

    CONTINUE = "continue"
    RESTART = "restart"
    FINISH = "finish"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The treatment of the workers that still run, and the end of the attempt.

    Attributes:
        action: the next action on the attempt.
        code: the launcher's exit code if it finishes.
        rank: the worker that caused it; None if all exited alike.
        terminate: whether the others get SIGTERM.
        grace_secs: how long they may take before they are killed.
    """

    action: Action
    code: int = 0
    rank: int | None = None
    terminate: bool = False
    grace_secs: float = 0.0


def judge(
    exits: Mapping[int, int],
    num_workers: int,
    *,
    restarts_left: int,
    stop_signal: int | None = None,
    stop_timeout_secs: float = 0.0,
) -> Verdict:
    """Decides on the exits so far.

    A real error has priority over everything, because a restart would repeat it; a stop that the user requested has
    priority over a lost peer, because a worker that stops first is a lost peer to the others.

    Args:
        exits: exit code by rank of the workers that exited by themselves, in order of time.
        num_workers: the number of workers started.
        restarts_left: how often the cluster may still be restarted.
        stop_signal: the signal that the launcher received and forwarded, if any.
        stop_timeout_secs: how long the workers may take to save after `stop_signal`.
    """
    for rank, code in exits.items():
        if code > 0 and code != _PEER_LOST and code not in _STOPPED:
            return Verdict(Action.FINISH, code, rank, terminate=True, grace_secs=_ABANDON_SECS)
    if len(exits) == num_workers and not any(exits.values()):
        return Verdict(Action.FINISH)
    if stop_signal is not None:
        return Verdict(Action.FINISH, 128 + stop_signal, grace_secs=stop_timeout_secs)
    for rank, code in exits.items():
        if code in _STOPPED:  # A signal to one worker stops the whole cluster.
            return Verdict(Action.FINISH, code, rank, terminate=True, grace_secs=_ABANDON_SECS)
    for rank, code in exits.items():
        if code == _PEER_LOST or code < 0:
            action = Action.RESTART if restarts_left > 0 else Action.FINISH
            return Verdict(action, _PEER_LOST, rank, grace_secs=_SETTLE_SECS)
    return Verdict(Action.CONTINUE)


def describe(code: int) -> str:
    """Describes an exit code, as the end of a sentence about a worker."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    meaning = MEANINGS.get(code, "")
    return f"exited with {code}" + (f" ({meaning})" if meaning else "")
