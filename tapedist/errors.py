"""One exception class per exit code of the command line.

As a library, tapedist raises these and never exits. `cli.py` turns each into one line on stderr and the
exit code of its class.
"""

from __future__ import annotations

import signal


class FitWarning(UserWarning):
    """A warning about a fit: training ended far from its optimum, or features were left out."""


class TapedistError(Exception):
    """Base of every error that tapedist raises on purpose.

    Attributes:
        exit_code: the exit code of the command line after this error.
        meaning: the meaning of that code, in words.
    """

    exit_code = 1
    meaning = "a bug"


class InputError(TapedistError, ValueError):
    """Bad flags, config, table or environment; nothing was touched.

    Attributes:
        problems: one sentence per problem: the argument, the value received, the rule and the fix.
    """

    exit_code = 2
    meaning = "bad input"

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class WrongAnswerError(InputError):
    """A computation with a known answer came out different."""


class StateError(TapedistError):
    """Stored state cannot be trusted, or resuming from it is refused."""

    exit_code = 3
    meaning = "stored state not trustworthy"


class DivergedError(TapedistError):
    """The loss, a gradient or a parameter is not finite, or the loss grew a million times."""

    exit_code = 4
    meaning = "diverged"


class MissingRowsError(TapedistError):
    """A pass over rows did not sum each of them once; nothing of it was applied."""


class StorageError(TapedistError, OSError):
    """The run directory cannot be written: disk full, quota, permission."""

    exit_code = 6
    meaning = "cannot write"

    def __init__(self, message: str):
        super().__init__(message)


class PeerLostError(TapedistError):
    """A peer died, hung or never connected; trying again may help."""

    exit_code = 75
    meaning = "lost a peer"


class Interrupted(TapedistError):
    """A signal stopped the run after its state was saved.

    Args:
        signum: the signal's number; 0 where another process received it and its number is not known yet.
        when: the text after the signal's name in the message.

    Attributes:
        signum: the signal's number; the exit code is `128 + signum`.
    """

    def __init__(self, signum: int, when: str = "; what the run has saved stays"):
        name = signal.Signals(signum).name if signum else "a signal"
        super().__init__(f"stopped by {name}{when}")
        self.signum = signum
        self.exit_code = 128 + signum
        self._when = when

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, str]]:
        # `BaseException` would pass the message as `signum`, which fails in the parent of a pool, and that waits
        # forever.
        return type(self), (self.signum, self._when)


# Meanings of exit codes; those of signals are 128 and the signal's number.
MEANINGS = {
    kind.exit_code: kind.meaning
    for kind in (TapedistError, InputError, StateError, DivergedError, StorageError, PeerLostError)
}
