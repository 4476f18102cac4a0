"""A TPU that is given by its address: nothing there, or a server that never answers. No hardware is needed."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from preforked import preforked_python

from tapedist.cluster.network import CallTimeoutError, call_with_timeout, check_tpu
from tapedist.errors import InputError


@pytest.fixture
def mute_server() -> Iterator[tuple[str, threading.Event]]:
    """The address of a server that accepts and never answers, and whether somebody has come."""
    came, over = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as kept:
        server.settimeout(0.05)

        def accept() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):  # Nobody came in time, or went without a word.
                    connection = kept.enter_context(server.accept()[0])
                    connection.settimeout(0.5)
                    if connection.recv(1):  # A probe says nothing; gRPC does.
                        came.set()

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"grpc://127.0.0.1:{server.getsockname()[1]}", came
        over.set()
        thread.join()  # Before what it holds is closed.


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_nothing_listens(tapedist_command: Callable[..., Any], tmp_path: Path) -> None:
    address = f"grpc://127.0.0.1:{_closed_port()}"
    run_dir = tmp_path / "run"
    done = tapedist_command("train", "--strategy=tpu", f"--tpu={address}", f"--run_dir={run_dir}", warm=True)
    assert done.code == 2
    assert done.err.splitlines() == done.errors[:1]
    assert f"--tpu={address}: nothing accepts a connection" in done.err
    assert done.seconds < 10
    assert not run_dir.exists()


@pytest.mark.parametrize("address", ["grpc://", "grpc://host", "grpc://host:0", "grpc://host:99999", "grpc://a b:1"])
def test_a_malformed_address(address: str) -> None:
    with pytest.raises(InputError, match="--tpu="):
        check_tpu(address)


def test_other_names_are_the_resolvers(mute_server: tuple[str, threading.Event]) -> None:
    check_tpu("local")
    check_tpu("my-tpu")
    check_tpu(mute_server[0])


def test_a_server_that_never_answers(
    mute_server: tuple[str, threading.Event], tapedist_command: Callable[..., Any]
) -> None:
    done = tapedist_command("train", "--strategy=tpu", f"--tpu={mute_server[0]}", "--cluster_timeout_secs=3", warm=True)
    assert done.code == 75
    (error,) = done.errors
    assert mute_server[0] in error
    assert "--cluster_timeout_secs=3" in error
    assert done.seconds < 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_meanwhile(
    number: signal.Signals, mute_server: tuple[str, threading.Event], child_env: dict[str, str], tmp_path: Path
) -> None:
    address, came = mute_server
    process = subprocess.Popen(
        [
            *preforked_python(),
            *["-m", "tapedist", "train", "--strategy=tpu"],
            f"--tpu={address}",
            f"--run_dir={tmp_path}/run",
        ],
        env=child_env,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert came.wait(120)
    struck = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name}" in err
    assert time.monotonic() - struck < 20


def test_a_call_in_time_is_as_if_called_directly() -> None:
    def fails() -> None:
        raise ZeroDivisionError

    assert call_with_timeout(60, lambda: 7) == 7
    assert call_with_timeout(60, lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(60, fails)


def test_a_late_call_is_left_behind() -> None:
    release = threading.Event()
    with pytest.raises(CallTimeoutError):
        call_with_timeout(0.05, release.wait)
    release.set()
