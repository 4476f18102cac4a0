"""What libraries print while they start is kept back, unless the start fails or the user wants to see it."""

from __future__ import annotations

import os
import resource

import pytest

from tapedist import process
from tapedist.errors import InputError


def _noise() -> None:
    os.write(2, b"noise\n")


def test_noise_is_kept_back(capfd: pytest.CaptureFixture[str]) -> None:
    with process.quiet_start():
        _noise()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_a_failed_start_says_what_it_heard(capfd: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        with process.quiet_start():
            _noise()
            raise ImportError("no such library")

    with pytest.raises(ImportError):
        failing()
    assert capfd.readouterr().err == "noise\n"


@pytest.mark.parametrize("error", [InputError("no GPU"), MemoryError(), KeyboardInterrupt()])
def test_what_needs_no_explanation_stays_one_line(error: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
    def leaving() -> None:
        with process.quiet_start():
            _noise()
            raise error

    with pytest.raises(type(error)):
        leaving()
    assert capfd.readouterr().err == ""


def test_noise_is_shown_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    with process.noise_shown(True):
        with process.quiet_start():
            _noise()
        with process.noise_shown(False), process.quiet_start():
            _noise()
    with process.noise_shown(False), process.quiet_start():
        _noise()
    assert capfd.readouterr().err == "noise\n"


def test_descriptors_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        with process.quiet_start():
            _noise()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before
    assert capfd.readouterr().err == ""


def test_memory_limit_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    process.check_memory_limit()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2 * 1024**3, resource.RLIM_INFINITY))
    with pytest.raises(InputError, match="ulimit -v 2097152: the memory limit must leave TensorFlow 4194304 KiB"):
        process.check_memory_limit()
