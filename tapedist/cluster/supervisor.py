"""Runs one attempt of a local cluster: output, exits and signals are events of one loop, without polling or threads.

A worker process ends with its launcher, its output is logged and echoed, and no process of it is left behind.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, TextIO

from tapedist import process
from tapedist.cluster.exit_policy import Action, Verdict, describe, judge

_DIE_WITH_PARENT = str(Path(__file__).with_name("die_with_parent.py"))
_CHUNK = 65_536
_TAIL_LINES = 20


@dataclasses.dataclass(frozen=True)
class Command:
    """The command of a worker.

    Attributes:
        argv: program and arguments.
        environ: its whole environment.
        log: the file that its output is appended to.
    """

    argv: Sequence[str]
    environ: Mapping[str, str]
    log: Path


class Console:
    """The launcher's own stdout and stderr; workers go on when their reader is closed."""

    def __init__(self, out: TextIO, err: TextIO):
        self.out = out
        self.err = err

    def log(self, message: str) -> None:
        """One line from the launcher itself, on stderr."""
        self.write(self.err, f"tapedist: {message}\n")

    def write(self, stream: TextIO, text: str) -> None:
        """Writes and flushes `text`; characters that the stream cannot encode are escaped."""
        encoding = stream.encoding or "utf-8"
        try:
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except (OSError, ValueError):  # The reader of a pipe was closed, or a file's disk is full.
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
        # Its own process group: Ctrl-C in the terminal reaches the launcher only, which forwards it once. `-I -S` skip
        # the site packages: the little program that ties the worker to the launcher starts in milliseconds.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _DIE_WITH_PARENT, str(os.getpid()), *command.argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(command.environ),
            process_group=0,
        )
        for pipe in self.pipes().values():
            # A partial line must not hold up the loop, and with it the output of all other workers.
            os.set_blocking(pipe.fileno(), False)

    def pipes(self) -> dict[str, IO[bytes]]:
        """Its output pipes, by "out" and "err"."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        return {"out": self._process.stdout, "err": self._process.stderr}

    def pump(self, name: str) -> bool:
        """Forwards the output in pipe `name`; returns False at its end."""
        try:
            data = os.read(self.pipes()[name].fileno(), _CHUNK)
        except BlockingIOError:
            return True
        *lines, rest = (self._partial[name] + data).split(b"\n")
        # Lines are forwarded whole, so that those of workers do not mix; a last or endless one is cut.
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
                self._console.log(f"warning: cannot write {self.log}: {error.strerror}; its log ends here")
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
        """Returns its exit code once it has exited, after killing whatever it has started; else None."""
        # WNOWAIT leaves it unreaped, so that the number of its process group cannot be another's when it is killed.
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
        """Kills it and all that it has started, and waits for its end."""
        self.signal(signal.SIGKILL)
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self.poll()

    def _drain(self, name: str) -> None:
        """Forwards the rest of pipe `name`, without waiting for other processes that still hold its other end."""
        for _ in range(16):  # A pipe holds 64 KiB by default, at most 1 MiB.
            if not self.pump(name):
                return
        if self._partial[name]:
            self._deliver(name, [self._partial[name]])
            self._partial[name] = b""


class SignalInbox:
    """Signals as numbers to read from a file descriptor; must be used in the main thread."""

    def __enter__(self) -> SignalInbox:
        # Python's handlers run only between bytecodes of the main thread: a signal just before `select` would be
        # noticed after it. The wake-up descriptor is written to at once, and makes `select` return.
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._old_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        watched = [signal.SIGCHLD, *process.ALWAYS, *process.unhandled()]
        self._old_handlers: dict[int, Any] = {number: signal.signal(number, _wake_only) for number in watched}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._old_descriptor)
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        return self._read

    def take(self) -> list[int]:
        """The signals that have arrived since the last call, in order."""
        try:
            return list(os.read(self._read, 4096))
        except BlockingIOError:
            return []


def _wake_only(signum: int, frame: FrameType | None) -> None:
    """Does nothing: the wake-up descriptor reports the signal, which needs a handler to be caught at all."""


class Supervisor:
    """Runs workers until all have exited, and returns the verdict.

    Attributes:
        stop_signal: the signal that asked the whole cluster to stop, once one has.
    """

    def __init__(self, inbox: SignalInbox, console: Console, *, stop_timeout_secs: float):
        self.stop_signal: int | None = None
        self._inbox = inbox
        self._console = console
        self._stop_timeout_secs = stop_timeout_secs

    def run(self, commands: Sequence[Command], *, restarts_left: int) -> tuple[Verdict, list[Worker]]:
        """Starts one worker per command and returns when none is left.

        Args:
            commands: the command of each rank.
            restarts_left: how often the caller may still restart.

        Returns:
            The verdict, and the workers, for their tails.
        """
        workers: list[Worker] = []
        attempt = _Attempt(workers, self._console)
        try:
            for rank, command in enumerate(commands):
                prefix = f"[{rank}] " if len(commands) > 1 else ""
                workers.append(Worker(rank, command, self._console, prefix=prefix))

            def verdict() -> Verdict:
                return judge(
                    attempt.exits,
                    len(commands),
                    restarts_left=restarts_left,
                    stop_signal=self.stop_signal,
                    stop_timeout_secs=self._stop_timeout_secs,
                )

            return self._attend(attempt, verdict), workers
        finally:
            attempt.kill()

    def _attend(self, attempt: _Attempt, verdict: Callable[[], Verdict]) -> Verdict:
        with selectors.DefaultSelector() as selector:
            selector.register(self._inbox, selectors.EVENT_READ)
            for worker in attempt.alive():
                for name, pipe in worker.pipes().items():
                    selector.register(pipe, selectors.EVENT_READ, (worker, name))
            # Verdict first: it may set a deadline, which bounds the wait that follows.
            while attempt.alive():
                attempt.enforce(verdict())
                for key, _ in selector.select(attempt.seconds_left()):
                    if key.data and not key.data[0].pump(key.data[1]):
                        selector.unregister(key.fileobj)
                for signum in self._inbox.take():
                    self._receive(signum, attempt)
                for worker in attempt.reap():
                    for pipe in worker.pipes().values():
                        _forget(selector, pipe)
        return verdict()

    def _receive(self, signum: int, attempt: _Attempt) -> None:
        if signum == signal.SIGCHLD:
            return
        name = signal.Signals(signum).name
        if self.stop_signal is None:
            self.stop_signal = signum
            self._console.log(f"{name}: asking the workers to save and leave")
            attempt.send(self.stop_signal)
        elif signum == signal.SIGINT:
            self._console.log(f"{name} again: killing the workers")
            attempt.kill_soon()


def _forget(selector: selectors.BaseSelector, pipe: Any) -> None:
    if pipe in {key.fileobj for key in selector.get_map().values()}:
        selector.unregister(pipe)


class _Attempt:
    """The workers of one attempt: exit codes, and the deadline of those that still run."""

    def __init__(self, workers: list[Worker], console: Console):
        self.exits: dict[int, int] = {}
        self._workers = workers
        self._console = console
        self._gone: set[int] = set()
        self._deadline: float | None = None
        self._grace_secs = 0.0
        self._asked = False
        self._killed = False

    def alive(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.rank not in self._gone]

    def send(self, signum: int) -> None:
        for worker in self.alive():
            worker.signal(signum)

    def enforce(self, verdict: Verdict) -> None:
        """Asks the other workers to exit, sets their deadline, and kills them after it."""
        if verdict.action is Action.CONTINUE or self._killed:
            return
        if verdict.terminate and not self._asked:
            self._asked = True
            self.send(signal.SIGTERM)
        # A new reason to exit, such as a signal after a lost peer, has a deadline of its own.
        if self._deadline is None or verdict.grace_secs != self._grace_secs:
            self._grace_secs = verdict.grace_secs
            self._deadline = time.monotonic() + verdict.grace_secs
        elif time.monotonic() >= self._deadline:
            stuck = ", ".join(str(worker.rank) for worker in self.alive())
            self._console.log(f"worker {stuck} did not leave within {verdict.grace_secs:g} s; killed")
            self.kill_soon()

    def kill_soon(self) -> None:
        self._killed = True
        self._deadline = None
        self.send(signal.SIGKILL)

    def seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def reap(self) -> list[Worker]:
        """Returns the workers that have exited since the last call."""
        left = []
        for worker in self.alive():
            code = worker.poll()
            if code is None:
                continue
            self._gone.add(worker.rank)
            left.append(worker)
            if not self._killed:  # The exit of a worker that the launcher killed is no reason for a verdict.
                self.exits[worker.rank] = code
                if code:
                    self._console.log(f"worker {worker.rank} {describe(code)}")
        return left

    def kill(self) -> None:
        """Kills and reaps the workers that still run."""
        for worker in self.alive():
            worker.kill()
            self._gone.add(worker.rank)
