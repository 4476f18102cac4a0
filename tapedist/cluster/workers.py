"""One worker process of the local launcher: started tied to us, its output logged and echoed, leaving no trace."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TextIO

_TETHER = str(Path(__file__).with_name("tether.py"))
_CHUNK = 65_536
_TAIL_LINES = 20


@dataclasses.dataclass(frozen=True)
class Command:
    """What a worker runs.

    Attributes:
        argv: program and arguments.
        environ: its whole environment.
        log: the file that its output is appended to.
    """

    argv: Sequence[str]
    environ: Mapping[str, str]
    log: Path


class Console:
    """The launcher's own stdout and stderr; a reader that goes away does not disturb the workers."""

    def __init__(self, out: TextIO, err: TextIO):
        self.out = out
        self.err = err

    def say(self, message: str) -> None:
        """One line from the launcher itself, on stderr."""
        self.write(self.err, f"tapedist: {message}\n")

    def write(self, stream: TextIO, text: str) -> None:
        """Writes and flushes `text`; characters that the stream cannot encode are escaped."""
        encoding = stream.encoding or "utf-8"
        try:
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except (OSError, ValueError):  # The reader of a pipe left, or a file's disk is full.
            # Without this, Python would fail once more when it flushes at exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Worker:
    """A started worker.

    Attributes:
        rank: its number, from 0.
        tail: its last lines.
        log: the file that its output is appended to.
    """

    def __init__(self, rank: int, command: Command, console: Console, *, prefix: str):
        self.rank = rank
        self.log = command.log
        self.tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._console = console
        self._prefix = prefix
        self._partial = {"out": b"", "err": b""}
        self._log: IO[bytes] | None = open(command.log, "ab", buffering=0)  # noqa: SIM115 (closed by poll)
        # Its own process group: Ctrl-C in the terminal reaches the launcher only, which forwards it once.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _TETHER, str(os.getpid()), *command.argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(command.environ),
            process_group=0,
        )
        for pipe in self.pipes().values():
            os.set_blocking(pipe.fileno(), False)

    def pipes(self) -> dict[str, IO[bytes]]:
        """Its output pipes, by "out" and "err"."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        return {"out": self._process.stdout, "err": self._process.stderr}

    def pump(self, name: str) -> bool:
        """Passes on what has arrived in pipe `name`; False once it is at its end."""
        try:
            data = os.read(self.pipes()[name].fileno(), _CHUNK)
        except BlockingIOError:
            return True
        *lines, rest = (self._partial[name] + data).split(b"\n")
        if rest and (not data or len(rest) >= _CHUNK):
            lines, rest = [*lines, rest], b""
        self._partial[name] = rest
        if lines:
            self._deliver(name, lines)
        return bool(data)

    def _deliver(self, name: str, lines: list[bytes]) -> None:
        if self._log is not None:
            try:
                self._log.write(b"".join(line + b"\n" for line in lines))
            except OSError as error:
                self._console.say(f"warning: cannot write {self.log}: {error.strerror}; its log ends here")
                self._log.close()
                self._log = None
        texts = [line.decode("utf-8", "replace") for line in lines]
        self.tail.extend(texts)
        stream = self._console.out if name == "out" else self._console.err
        self._console.write(stream, "".join(f"{self._prefix}{text}\n" for text in texts))

    def signal(self, signum: int) -> None:
        """Sends `signum` to the worker; SIGKILL goes to all that it has started, too."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if signum == signal.SIGKILL:
                os.killpg(self._process.pid, signum)
            else:
                os.kill(self._process.pid, signum)

    def poll(self) -> int | None:
        """Its exit code once it has left, with nothing of it left behind; else None."""
        # Left unreaped for a moment, so that the number of its process group cannot become another's.
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for name, pipe in self.pipes().items():
            self._drain(name)
            pipe.close()
        if self._log is not None:
            self._log.close()
        return self._process.wait()

    def kill(self) -> None:
        """Kills it and all that it has started, and waits until it is gone."""
        self.signal(signal.SIGKILL)
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self.poll()

    def _drain(self, name: str) -> None:
        """Passes on what is left in pipe `name`, without waiting for strangers that still hold its other end."""
        for _ in range(16):  # A pipe holds 64 KiB by default, at most 1 MiB.
            if not self.pump(name):
                return
        if self._partial[name]:
            self._deliver(name, [self._partial[name]])
            self._partial[name] = b""
