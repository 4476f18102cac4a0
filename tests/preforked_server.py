"""A process that has imported TensorFlow and done nothing with it, and forks another for each start it is asked for.

    python tests/preforked_server.py SOCKET

Importing TensorFlow takes a core five seconds, and many tests need no more than a process in which nothing has been
chosen yet: no devices, no threads, no flags of XLA. A fork of this one is such a process, since TensorFlow starts no
thread before it is used (those of OpenBLAS and jemalloc bear a fork). Tests of starting itself start Python.

Each connection (`preforked_start.py`) brings a JSON line and the descriptors of standard input, output and error.
Back go the process's number and, when it has ended, its wait status.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any


def _serve(listener: socket.socket) -> dict[str, Any]:
    """Returns in a forked process, with what that one is to run; never returns in this one."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for the keepers.
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:  # Whoever started this process is gone.
            sys.exit()
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        order, descriptors, _, _ = socket.recv_fds(connection, 2**20, 3)
        while not order.endswith(b"\n"):
            order += connection.recv(2**20)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if child:
            _keep(connection, child, descriptors)
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        return json.loads(order)


def _keep(connection: socket.socket, child: int, descriptors: list[int]) -> None:
    """Tells what becomes of the process, ends it with whoever asked, and holds nothing of it open."""
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(b"%d\n" % child)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:  # What stands for the process was killed.
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % status)
    os._exit(0)


def _become(order: dict[str, Any]) -> None:
    """Makes this process what Python would be after `import tensorflow`."""
    os.chdir(order["cwd"])
    os.sched_setaffinity(0, order["cores"])
    os.environ.clear()
    os.environ.update(order["environ"])
    import tapedist.runtime_flags

    importlib.reload(tapedist.runtime_flags)  # It sets what the environment lacks.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # New streams: the old ones remember whether the server's could be sought.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, "rw"[number > 0], encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115  (for good)
        for number, errors in enumerate(("strict", "strict", "backslashreplace"))
    )
    sys.stdout.reconfigure(line_buffering=bool(os.environ.get("PYTHONUNBUFFERED")))
    sys.stderr.reconfigure(line_buffering=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def _run(words: list[str]) -> None:
    option, rest = words[0], words[1:]
    sys.argv = [option, *rest[1:]] if option in ("-c", "-m") else words
    sys.path[0] = "" if option == "-c" else os.getcwd() if option == "-m" else str(Path(option).parent)
    if option == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen(64)

        asked = _serve(listening)
    _become(asked)
    try:
        _run(asked["words"])
    except Exception:
        traceback.print_exc()
        sys.exit(1)
