"""A run folder has one live process, and a dead one holds nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tapedist.errors import InputError
from tapedist.storage.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
_HOLDER = """
import sys
from tapedist.errors import TapedistError
from tapedist.storage.run_folder import RunFolder
print("ready", flush=True)
sys.stdin.readline()
try:
    with RunFolder.open(sys.argv[1]):
        print("won", flush=True)
        sys.stdin.readline()
except TapedistError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def start(folder: Path, code: str = _HOLDER) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.Popen(command, text=True, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def log(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def test_of_twenty_simultaneous_starts_one_wins(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    processes = [start(folder) for _ in range(20)]
    try:
        for process in processes:
            assert line(process) == "ready"
        for process in processes:
            log(process)
        answers = {process.pid: line(process) for process in processes}
        winners = [pid for pid, answer in answers.items() if answer == "won"]
        assert len(winners) == 1
        host = socket.gethostname()
        holder = f"--run_dir={str(folder)!r}: is in use by the process with pid {winners[0]} on host {host!r}; "
        assert all(answer.startswith(holder) for pid, answer in answers.items() if pid != winners[0])
        for process in processes:
            process.communicate("\n" if process.pid in winners else None)
        assert sorted(process.returncode for process in processes) == [0] + [2] * 19
        with RunFolder.open(folder):
            pass
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_the_lock_dies_with_its_process_and_the_next_holder_is_named(tmp_path: Path) -> None:
    with start(tmp_path / "run") as process:
        assert line(process) == "ready"
        log(process)
        assert line(process) == "won"
        with pytest.raises(InputError, match=f"pid {process.pid} on host"):
            RunFolder.open(tmp_path / "run")
        process.kill()
        process.wait()
        with RunFolder.open(tmp_path / "run"):
            # In one process, too, a folder has one holder; and the dead one's name is not repeated.
            with pytest.raises(InputError, match=f"pid {os.getpid()} on host"):
                RunFolder.open(tmp_path / "run")
            with pytest.raises(InputError):  # The refused attempt has not let go of the holder's lock.
                RunFolder.open(tmp_path / "run")
        with RunFolder.open(tmp_path / "run"):
            pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = _HOLDER.replace('print("won", flush=True)', "import os; os.write(1, b'%d\\n' % os.fork())")
    with start(tmp_path / "run", code) as process:
        assert line(process) == "ready"
        log(process)
        child = max(int(line(process)), int(line(process)))  # The parent prints its child's number, the child 0.
        process.kill()
        process.wait()
        os.kill(child, 0)  # It lives, waiting for a line.
        with RunFolder.open(tmp_path / "run"):
            pass


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    with RunFolder.open(tmp_path) as folder:
        folder.model.write_text("{}")
    dead, alive = tmp_path / f".tapedist-{process.pid}-env.json", tmp_path / f".tapedist-{os.getpid()}-env.json"
    for path in (dead, alive):
        path.touch()
    with RunFolder.open(tmp_path):
        assert (dead.exists(), alive.exists()) == (False, True)
