"""Workers that read a table, each for itself, hear the stop that one of them was asked for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tapedist.cluster import team as module
from tapedist.cluster.network import PortReservation
from tapedist.cluster.team import run_with_stop_agreement
from tapedist.errors import InputError, Interrupted

pytestmark = pytest.mark.usefixtures("all_cores")

WORKERS = 3
TIMEOUT = 400


class _Threads:
    """A team whose workers are threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(WORKERS)
        self._rows: list[np.ndarray | None] = [None] * WORKERS
        self.rank = threading.local()

    def gather(self, mine: np.ndarray) -> np.ndarray:
        self._rows[self.rank.value] = mine
        self._barrier.wait(30)
        found = np.stack([row for row in self._rows if row is not None])
        self._barrier.wait(30)
        return found


def _all(monkeypatch: pytest.MonkeyPatch, work: Callable[[int, SimpleNamespace, Callable[[], None]], Any]) -> list[Any]:
    """What `run_with_stop_agreement` returns or raises on each worker; `work` gets rank, request and `check_stop`."""
    monkeypatch.setattr(module, "_ASK_EVERY_SECS", 0.01)
    team = _Threads()

    def worker(rank: int) -> Any:
        team.rank.value = rank
        request = SimpleNamespace(signum=None)
        try:
            return run_with_stop_agreement(team, request, lambda check_stop: work(rank, request, check_stop))
        except Exception as error:
            return error

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(worker, range(WORKERS)))


def test_each_gets_its_own_result_when_all_are_done(monkeypatch: pytest.MonkeyPatch):
    ended, last = [], threading.Event()

    def work(rank: int, request: SimpleNamespace, check_stop: Callable[[], None]) -> int:
        if rank == 2:
            last.set()
        assert last.wait(30)
        check_stop()
        ended.append(rank)
        return 10 * rank

    assert _all(monkeypatch, work) == [0, 10, 20]
    assert sorted(ended) == [0, 1, 2]


def test_all_leave_by_the_stop_of_one(monkeypatch: pytest.MonkeyPatch):
    heard: list[int] = []

    def work(rank: int, request: SimpleNamespace, check_stop: Callable[[], None]) -> None:
        if rank == 1:
            request.signum = signal.SIGTERM
        try:
            while True:
                check_stop()
                threading.Event().wait(0.001)
        finally:
            heard.append(rank)

    found = _all(monkeypatch, work)
    assert [(type(error), error.exit_code) for error in found] == [(Interrupted, 143)] * WORKERS
    for thread in threading.enumerate():
        if thread.name.startswith("tapedist-work"):
            thread.join(30)
    assert sorted(heard) == [0, 1, 2]


def test_an_error_of_one_is_told_at_once_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    told = threading.Event()

    def work(rank: int, request: SimpleNamespace, check_stop: Callable[[], None]) -> int:
        if rank == 0:
            told.set()
            raise InputError("row 3")
        assert told.wait(30)
        check_stop()
        return rank

    first, *others = _all(monkeypatch, work)
    assert isinstance(first, InputError)
    assert others == [1, 2]


_SLOW = """
import sys, time
from tapedist.cli import main
from tapedist.data.tables.parquet import ParquetReader

original = ParquetReader.batches

def slow(self, names):
    for number, batch in enumerate(original(self, names)):
        if number == 2:
            print("scanning", flush=True)
        time.sleep(0.2)
        yield batch

ParquetReader.batches = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def addresses() -> Iterator[tuple[str, ...]]:
    reservation = PortReservation(2)
    yield tuple(f"127.0.0.1:{port}" for port in reservation.ports)
    reservation.close()


def test_sigterm_to_one_of_two_processes_that_scan(
    child_env: dict[str, str], addresses: tuple[str, ...], tmp_path: Path
):
    """The scan would take ten minutes; both leave it."""
    table = pa.table({"a": np.arange(6_000_000) % 2.0, "y": np.zeros(6_000_000)})
    for part in range(32):  # Three thousand batches, small on disk.
        pq.write_table(table, tmp_path / f"{part:02}.parquet")
    words = ["train", f"--workers={','.join(addresses)}", f"--data={tmp_path}", "--target=y"]

    def start(rank: int, *flags: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", _SLOW, *words, f"--worker_index={rank}", *flags],
            env=child_env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    workers = [start(0, "--run_dir=run"), start(1)]
    try:
        for worker in workers:
            assert worker.stdout
            assert any(line == "scanning\n" for line in worker.stdout)
        workers[1].send_signal(signal.SIGTERM)
        said = [worker.communicate(timeout=60)[1] for worker in workers]
        assert [worker.returncode for worker in workers] == [143, 143], said
        for lines in said:
            assert "tapedist: error: stopped by SIGTERM" in lines
    finally:
        for worker in workers:
            worker.kill()
    assert not (tmp_path / "run" / "done.json").exists()
