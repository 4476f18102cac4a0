"""Ties a process to its parent, then becomes the program: `python die_with_parent.py PARENT_PID PROGRAM [ARGUMENT...]`.

Run as a file, not as a module, so that it starts in a few milliseconds. On Linux the kernel kills the program as soon
as the parent is gone, whatever ended it. Elsewhere the program is only started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Ties and executes; returns only by an exception or by exiting."""
    parent, program = int(argv[1]), argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # It died before it could be watched.
        os._exit(75)  # As `PeerLostError` does, which an import would bring along with all of the package.
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"tapedist: error: cannot start {program[0]!r}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv)
