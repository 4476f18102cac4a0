"""Runs a program that ends with its parent: `python die_with_parent.py PARENT_PID PROGRAM [ARGUMENT...]`.

Run as a file, not as a module, so that it starts in a few milliseconds. On Linux the kernel kills the program as soon
as the parent has ended for any reason. Elsewhere the program is only started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Sets the signal and executes the program; does not return."""
    parent, program = int(argv[1]), argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # After `prctl`, not before: a parent that ended in between would send no signal any more.
    if os.getppid() != parent:
        os._exit(75)  # `PeerLostError.exit_code`, which is not imported because that would import the whole package.
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"tapedist: error: cannot start {program[0]!r}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv)
