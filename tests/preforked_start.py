"""Stands for a Python process that `preforked_server.py` forks.

    python -I -S tests/preforked_start.py SOCKET (-c CODE | -m MODULE | FILE) ...

It has that one's output, exit code and death by signal, and hands it the signals that stop a run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def _main(address: str, words: list[str]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    order = {"words": words, "cwd": os.getcwd(), "environ": dict(os.environ), "cores": cores}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
        signals = {number for number in signals if signal.getsignal(number) != signal.SIG_IGN}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        data = json.dumps(order).encode() + b"\n"
        sent = socket.send_fds(connection, [data], [0, 1, 2])
        connection.sendall(data[sent:])
        answers = connection.makefile("r")
        child = int(answers.readline())
        for number in signals:
            signal.signal(number, lambda number, _: os.kill(child, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        for descriptor in range(3):  # Whoever reads the output is not to wait for this process.
            os.close(descriptor)
        status = int(answers.readline())
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
