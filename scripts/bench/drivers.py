"""What a contestant runs in: a peer that answers requests, the C program, or a whole process timed from outside."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

HERE = pathlib.Path(__file__).resolve().parent


class Missing(Exception):
    """A contestant that cannot run here; the message says why."""


class Driver(Protocol):
    """One contestant of one row.

    Attributes:
        facts: what is known of it after `prepare`.
    """

    facts: dict[str, Any]

    def prepare(self) -> None:
        """Makes the data and warms up.

        Raises:
            Missing: if it cannot.
        """

    def measure(self, calls: int) -> dict[str, Any]:
        """Does the work `calls` times: `{"seconds": [...], "outcome": {...}}`."""

    def drop(self) -> None:
        """Frees the data."""


class PeerProcess:
    """A process that serves `peer.py`; it stays for all rows.

    Args:
        python: the interpreter.
        words: the module and its arguments.
        package: a folder whose packages come first, if there is one.
    """

    def __init__(self, python: str, words: Sequence[str], *, package: pathlib.Path | None = None):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `close`)
        self._process = subprocess.Popen(
            [python, str(HERE / "peer.py"), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"KMP_BLOCKTIME": "0"} | ({"PYTHONPATH": str(package)} if package else {}),
        )
        hello = self._answer()
        if "missing" in hello:
            self.close()
            raise Missing(hello["missing"])
        self.version: str = hello["version"]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["no message"])[-1]
            raise Missing(f"its process ended with status {self._process.wait()}: {last[:200]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


class PeerDriver:
    """A task of a peer process."""

    def __init__(self, process: PeerProcess, name: str, task: Mapping[str, Any]):
        self._process, self._name, self._task = process, name, task
        self.facts: dict[str, Any] = {}

    def prepare(self) -> None:
        answer = self._process.ask(prepare=dict(self._task), **{"as": self._name})
        if "failed" in answer:
            raise Missing(answer["failed"])
        self.facts = answer

    def measure(self, calls: int) -> dict[str, Any]:
        return self._process.ask(measure=calls, **{"as": self._name})

    def drop(self) -> None:
        self._process.ask(drop=self._name)


class LimitDriver:
    """The C program; each measurement is a process that warms up by itself."""

    def __init__(self, binary: pathlib.Path, words: Sequence[Any], *, threads: int):
        self._command = [str(binary), *map(str, words)]
        self._threads = threads
        self.facts: dict[str, Any] = {"note": f"OMP_NUM_THREADS={threads}"}

    def prepare(self) -> None:
        begin = time.perf_counter()
        self.facts["outcome"] = self.measure(1)["outcome"]
        self.facts["second_call_seconds"] = (time.perf_counter() - begin) / 2

    def measure(self, calls: int) -> dict[str, Any]:
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads), "OMP_PROC_BIND": "true"}
        done = subprocess.run([*self._command, str(calls)], env=environment, capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
        return {"seconds": answer.pop("seconds"), "outcome": answer}

    def drop(self) -> None:
        pass


def compile_limit(folder: pathlib.Path) -> pathlib.Path:
    """Compiles `limit.c`.

    Raises:
        Missing: if there is no compiler, or it cannot.
    """
    binary = folder / "limit"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O3", "-march=native", "-ffast-math", "-fopenmp", "-o", str(binary), str(HERE / "limit.c")]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise Missing(f"no C compiler ({compiler}); set CC") from None
    except subprocess.CalledProcessError as error:
        raise Missing(f"{compiler} failed: {(error.stderr.strip().splitlines() or ['no message'])[-1]}") from None
    return binary


def unpacked(commit: str, folder: pathlib.Path) -> pathlib.Path:
    """The package as it was at a commit, in a folder of its own.

    Raises:
        Missing: if this is no clone with its history.
    """
    folder.mkdir(exist_ok=True)
    command = (
        f"git -C {shlex.quote(str(HERE.parents[1]))} archive {commit} tapedist | tar -x -C {shlex.quote(str(folder))}"
    )
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"commit {commit} is not here: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
    return folder


class ProcessDriver:
    """A whole process: wall time from start to end, and its largest resident memory.

    Args:
        command: its words.
        warm: whether it runs once before it is measured.
        package: a folder whose packages come first, if there is one.
    """

    def __init__(self, command: Sequence[str], *, warm: bool, package: pathlib.Path | None = None):
        self._command, self._warm = list(command), warm
        self._environment = os.environ | ({"PYTHONPATH": str(package)} if package else {})
        self.facts: dict[str, Any] = {"note": "whole process"}

    def prepare(self) -> None:
        if self._warm:  # Brings the files into the page cache.
            self.facts["outcome"] = self.measure(1)["outcome"]

    def measure(self, calls: int) -> dict[str, Any]:
        seconds, outcome = [], {}
        for _ in range(calls):
            with tempfile.TemporaryFile() as output:
                begin = time.perf_counter()
                process = subprocess.Popen(
                    self._command, stdout=output, stderr=subprocess.STDOUT, env=self._environment
                )
                _, status, usage = os.wait4(process.pid, 0)
                seconds.append(time.perf_counter() - begin)
                process.returncode = os.waitstatus_to_exitcode(status)
                output.seek(0)
                text = output.read().decode(errors="replace")
            if process.returncode:
                last = (text.strip().splitlines() or ["no message"])[-1]
                raise Missing(f"ended with status {process.returncode}: {last[:200]}")
            outcome = {"peak_mib": usage.ru_maxrss / 1024} | _learned(text)
        return {"seconds": seconds, "outcome": outcome}

    def drop(self) -> None:
        pass


def _learned(text: str) -> dict[str, Any]:
    """What a run printed of its parameters, or the last line if it is an object."""
    found = re.search(r"Learned W: (\S+), learned B: (\S+)", text)
    if found:
        return {"weight": float(found[1]), "bias": float(found[2])}
    last = (text.strip().splitlines() or [""])[-1]
    return json.loads(last) if last.startswith("{") else {}
