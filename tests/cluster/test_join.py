"""How a cluster forms and how a silent one is given up, without TensorFlow where it is not what is tested."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished

from tapedist.cluster.join import await_peers
from tapedist.cluster.network import PortReservation, listening, listening_notice, without_proxy
from tapedist.cluster.resolve import ClusterSpec
from tapedist.errors import InputError, PeerLostError, TapedistError


@pytest.fixture
def addresses() -> Iterator[tuple[str, ...]]:
    reservation = PortReservation(3)
    yield tuple(f"127.0.0.1:{port}" for port in reservation.ports)
    reservation.close()


def test_all_workers_leave_once_all_have_come(addresses: tuple[str, ...]):
    finished = threading.Event()

    def worker(rank: int) -> None:
        await_peers(ClusterSpec(addresses, rank, "test"), 60.0)
        left.append(rank)
        # As TensorFlow's server does next, on the port that must be free again.
        with socket.create_server(("", int(addresses[rank].rpartition(":")[2]))):
            finished.wait(60)

    left: list[int] = []
    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(3)]
    for thread in threads[:2]:
        thread.start()
    threads[0].join(0.5)
    assert not left  # The third is missing.
    threads[2].start()
    end = time.monotonic() + 60
    while len(left) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    finished.set()
    for thread in threads:
        thread.join(60)
    assert sorted(left) == [0, 1, 2]


def test_the_missing_are_named_in_time(addresses: tuple[str, ...]):
    with socket.create_server(("127.0.0.1", int(addresses[1].rpartition(":")[2]))):
        begun = time.monotonic()
        with pytest.raises(PeerLostError) as caught:
            await_peers(ClusterSpec(addresses, 0, "test"), 0.5)
        assert time.monotonic() - begun < 10
    silent = f"{addresses[1]} (rank 1, where something listens that says nothing)"
    assert f"no answer from {silent}, {addresses[2]} (rank 2) within --cluster_timeout_secs=0.5;" in str(caught.value)


def _formed(specs: list[ClusterSpec], facts: list[dict[str, Any]], *, timeout_secs: float = 60.0) -> list[str]:
    """What each process that has its own view of the cluster ends with: the error's words, or nothing."""
    said = ["still waits"] * len(specs)

    def worker(i: int) -> None:
        try:
            await_peers(specs[i], timeout_secs, facts=facts[i])
            said[i] = ""
        except TapedistError as error:
            said[i] = f"{error.exit_code} {error}"

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return said


def test_other_devices_are_named_by_all(addresses: tuple[str, ...]):
    facts = [
        {"device_kind": "GPU", "devices": 4},
        {"device_kind": "GPU", "devices": 4},
        {"device_kind": "CPU", "devices": 1},
    ]
    said = _formed([ClusterSpec(addresses, rank, "test") for rank in range(3)], facts)
    assert len(set(said)) == 1
    kind, number = said[0].removeprefix("2 ").split("\n")
    assert kind.startswith(
        f'rank 2 ({addresses[2]}): device_kind is "CPU", but "GPU" on rank 0 ({addresses[0]}); give all'
    )
    assert number.startswith(f"rank 2 ({addresses[2]}): devices is 1, but 4 on rank 0 ({addresses[0]}); give all")
    assert _formed([ClusterSpec(addresses, rank, "test") for rank in range(3)], facts[:1] * 3) == [""] * 3


def test_one_process_under_two_names(addresses: tuple[str, ...]):
    port = addresses[0].rpartition(":")[2]
    twice = (f"127.0.0.1:{port}", f"localhost:{port}")
    said = _formed([ClusterSpec(twice, 0, "test")], [{}])
    assert said[0].startswith(
        f"2 addresses '{twice[0]}' (rank 0) and '{twice[1]}' (rank 1) lead to this process itself;"
    )
    others = (addresses[1], *twice)
    said = _formed([ClusterSpec(others, 0, "test"), ClusterSpec(others, 1, "test")], [{}, {}])
    assert f"'{twice[0]}' (rank 1) and '{twice[1]}' (rank 2) lead to this process itself" in said[1]
    # The other process has met it at either address first.
    assert "lead to one process" in said[0] or f"'{twice[1]}' takes itself for rank 1, but is rank 2 here" in said[0]


def test_processes_of_one_index_or_of_other_lists(addresses: tuple[str, ...]):
    a, b, c = addresses
    # Each at its own port, both as rank 0: lists in another order, as two hosts with the same command have them.
    said = _formed([ClusterSpec((a, b), 0, "test"), ClusterSpec((b, a), 0, "test")], [{}, {}])
    assert said[0].startswith("2 ")
    assert said[1].startswith("2 ")
    assert any(
        "takes itself for rank 0, but is rank 1 here" in words or "for rank 0, which this one is" in words
        for words in said
    )
    said = _formed([ClusterSpec((a, b), 0, "test"), ClusterSpec((a, b, c), 1, "test")], [{}, {}])
    assert any("knows of 3 workers, but here are 2" in words for words in said), said
    assert any("knows of 2 workers, but here are 3" in words for words in said), said
    said = _formed([ClusterSpec((a, b), 0, "test"), ClusterSpec((a, b), 0, "test")], [{}, {}], timeout_secs=3)
    assert sorted(words.split()[0] for words in said) == ["2", "75"]
    assert any("is in use or not permitted" in words and "same --worker_index" in words for words in said)


def test_another_server_is_no_worker(addresses: tuple[str, ...]):
    with socket.create_server(("127.0.0.1", int(addresses[1].rpartition(":")[2]))) as server:

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threading.Thread(target=greet, daemon=True).start()
        said = _formed([ClusterSpec(addresses[:2], 0, "test")], [{}], timeout_secs=1)
        server.shutdown(socket.SHUT_RDWR)
    assert said[0].startswith(f"75 no answer from {addresses[1]} (rank 1, where something else listens) within")


@pytest.mark.parametrize("host", ["nosuchhost.invalid", "a..b", "a" * 64])
def test_names_that_cannot_be_looked_up(host: str, addresses: tuple[str, ...]):
    unknown = f"{host}:2223"
    said = _formed([ClusterSpec((unknown, addresses[0]), 0, "test")], [{}], timeout_secs=1000)
    assert said[0].startswith(f"2 own address '{unknown}': this machine cannot look the host up (")
    said = _formed([ClusterSpec((addresses[0], unknown), 0, "test")], [{}], timeout_secs=1)
    assert f"no answer from {unknown} (rank 1, whose name cannot be looked up: " in said[0]
    assert "; correct the address, start the missing worker, or" in said[0]


def test_a_pods_name_may_come_late(monkeypatch: pytest.MonkeyPatch):
    from tapedist.cluster import network

    calls: list[str] = []

    def lookup(host: str, *_: object, **__: object) -> list[object]:
        calls.append(host)
        if len(calls) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return []

    monkeypatch.setattr(network, "_LOOKUP_EVERY_SECS", 0.01)
    monkeypatch.setattr(network.socket, "getaddrinfo", lookup)
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    network.check_own_name("job-worker-0.team.svc:2222", timeout_secs=60, environ=pod)
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(InputError, match="cannot look the host up"):
        network.check_own_name("job-worker-0.team.svc:2222", timeout_secs=60, environ={})


def test_waiting_ends_when_somebody_asks_to_stop(addresses: tuple[str, ...]):
    await_peers(ClusterSpec(addresses, 0, "test"), 1e6, stopped=lambda: True)


@pytest.mark.parametrize(
    ("before", "wanted"),
    [
        ({}, "a,10.0.0.2,::1"),
        ({"no_proxy": "local, b"}, "local, b,a,10.0.0.2,::1"),
        ({"no_proxy": "b", "no_grpc_proxy": "c,a"}, "c,a,10.0.0.2,::1"),
        ({"no_proxy": "", "http_proxy": "http://p:1"}, "a,10.0.0.2,::1"),
    ],
)
def test_workers_are_exempt_from_proxies_as_long_as_they_are_together(before: dict[str, str], wanted: str):
    environ = dict(before)
    with without_proxy(["a:1", "10.0.0.2:2", "[::1]:3", "a:2"], environ):
        assert environ == {**before, "no_grpc_proxy": wanted}
    assert environ == before


def test_where_this_process_listens():
    with socket.create_server(("127.0.0.1", 0)) as inside, socket.create_server(("", 0)) as outside:
        ports = [server.getsockname()[1] for server in (inside, outside)]
        assert [listening(port) for port in ports] == [[f"127.0.0.1:{ports[0]}"], [f"0.0.0.0:{ports[1]}"]]
        line = listening_notice(1, f"somewhere:{ports[1]}")
        assert line.startswith(f"worker 1 listens at 0.0.0.0:{ports[1]}: open on all interfaces and unauthenticated;")
        assert "open on all interfaces" not in listening_notice(0, f"localhost:{ports[0]}")
    assert listening(ports[0]) == []


def test_the_deadline_holds_while_python_cannot_run(run_python: Callable[..., Finished]):
    code = """
        import ctypes, time
        from tapedist.cluster.join import deadline
        with deadline(0.2, words="never said", code=3):
            pass
        time.sleep(0.5)
        print("alive", flush=True)
        with deadline(0.5, words="100% late", code=75):
            ctypes.PyDLL(None).sleep(60)  # Holds the interpreter's lock.
    """
    finished = run_python("-c", "\n".join(line[8:] for line in code.splitlines()))
    # TensorFlow, which the module imports, has its say before.
    said = finished.err.splitlines()[-1]
    assert (finished.code, finished.out, said) == (75, "alive\n", "tapedist: error: 100% late")
    assert finished.seconds < 30


WATCH = """
import sys, threading, time, types
from tapedist.cluster import watchdog
from tapedist.cluster.resolve import ClusterSpec
watchdog._LEAVE_SECS = 0.1
spec = ClusterSpec(("127.0.0.1:1", "127.0.0.1:2"), 0, "test")
with watchdog.Watchdog(spec, 2.0, ask=lambda spec: ["127.0.0.1:2"] if sys.argv[1] == "lost" else []) as dog:
    end = time.monotonic() + float(sys.argv[2])

    def wait():
        while time.monotonic() < end:
            if sys.argv[1] == "beats":
                dog.beat()
            time.sleep(0.05)

    if sys.argv[1] == "stuck":
        wait()
    elif sys.argv[1] == "computes":
        while time.monotonic() < end:
            pass
    else:  # As if it waited for others in TensorFlow.
        scope = {"__name__": "tensorflow.stand_in", "time": time, "sys": sys, "end": end, "dog": dog}
        types.FunctionType(wait.__code__, scope)()
print("left")
"""


@pytest.mark.parametrize(
    ("peers", "seconds", "code", "said"),
    [
        ("lost", 60, 75, "tapedist: error: no answer from 127.0.0.1:2 (rank 1) while waiting"),
        ("answer", 60, 75, "though 127.0.0.1:2 (rank 1) answer; one of them is stuck"),
        ("answer", 3, 0, "tapedist: warning: nothing was finished for"),
        ("beats", 3, 0, ""),
        (
            "stuck",
            60,
            75,
            "tapedist: error: this worker, 127.0.0.1:1 (rank 0), has done nothing for 2 s in wait (<string>:",
        ),
        ("computes", 6, 0, "tapedist: warning: nothing was finished for"),
    ],
)
def test_watchdog(peers: str, seconds: int, code: int, said: str, run_python: Callable[..., Finished]):
    finished = run_python("-c", WATCH, peers, str(seconds))
    assert finished.code == code, finished.err
    assert said in finished.err
    assert ("left" in finished.out) == (code == 0)


@pytest.mark.parametrize(
    ("gather_secs", "batch_size", "said"),
    [
        (0.001, 64, []),
        (0.009, 0, ["fewer devices or workers, would be faster"]),
        (0.009, 64, ["--batch_size=512 or more (another answer), would be faster"]),
    ],
)
def test_a_gather_that_costs_more_than_the_work_is_told_once(gather_secs: float, batch_size: int, said: list[str]):
    from tapedist.training.schedule import GatherCostMonitor

    lines: list[str] = []
    calls = GatherCostMonitor(0, gather_secs=gather_secs, replicas=2, batch_size=batch_size, log=lines.append)
    for _ in range(10):
        calls.observe(10, 0.1)
    assert len(lines) == len(said)
    for line, words in zip(lines, said, strict=True):
        assert line.startswith("Notice: a step takes 10 ms, about 9 ms of it")
        assert words in line


def test_a_standstill_is_idle_outside_tensorflow():
    from tapedist.cluster.watchdog import StallDetector

    now, cpu, moved = [0.0], [0.0], [0.0]
    still = StallDetector(10.0, clock=lambda: now[0], cpu_clock=lambda: cpu[0], moved=lambda: moved[0])

    def after(seconds: int, *, computing: float = 0.0, moving: float = 0.0) -> list[str]:
        found = []
        for _ in range(seconds):
            now[0], cpu[0], moved[0] = now[0] + 1, cpu[0] + computing, moved[0] + moving
            found.append(still.where())
        return found

    assert not any(after(10))
    assert "where (watchdog.py:" in after(1)[0]  # Asked by the thread itself; a watchdog is another.
    assert not any(after(30, computing=0.9)[2:])
    assert after(11)[-1]
    assert not any(after(30, moving=1e6)[2:])
    assert after(11)[-1]


def test_files_that_are_read_count_as_work(tmp_path: Path):
    from tapedist.cluster.watchdog import _bytes_moved

    if not Path("/proc/self/io").exists():
        pytest.skip("the system does not tell what a process reads")
    (tmp_path / "file").write_bytes(b"x" * 300_000)
    before = _bytes_moved()
    (tmp_path / "file").read_bytes()
    assert _bytes_moved() - before >= 300_000
