"""From a name to a strategy: what `auto` means, and what is refused before anything runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tapedist.cluster import strategies
from tapedist.cluster.strategies import choose
from tapedist.config import TrainConfig
from tapedist.errors import InputError


@pytest.mark.parametrize(
    ("config", "workers", "gpus", "environ", "name"),
    [
        ({}, 1, 0, {}, "default"),
        ({}, 1, 1, {}, "default"),
        ({}, 1, 2, {}, "mirrored"),
        ({}, 2, 2, {}, "multiworker"),
        ({"num_virtual_devices": 4}, 1, 0, {}, "mirrored"),
        ({"num_virtual_devices": 4}, 1, 8, {"TPU_NAME": "t"}, "mirrored"),
        ({"num_virtual_devices": 1}, 1, 0, {}, "default"),
        ({}, 1, 8, {"TPU_NAME": "t"}, "tpu"),
        ({"strategy": "default"}, 1, 8, {}, "default"),
        ({"strategy": "mirrored"}, 1, 0, {}, "mirrored"),
        ({"strategy": "tpu"}, 1, 0, {}, "tpu"),
        ({"strategy": "multiworker"}, 1, 0, {}, "multiworker"),
    ],
)
def test_choices(
    config: dict[str, Any],
    workers: int,
    gpus: int,
    environ: dict[str, str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(strategies.glob, "glob", lambda _: [])
    choice = choose(TrainConfig(**config), num_workers=workers, num_gpus=gpus, environ=environ)
    assert choice.name == name
    assert choice.reason


def test_an_attached_tpu_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strategies.glob, "glob", lambda _: ["/dev/accel0"])
    assert choose(TrainConfig(), num_workers=1, num_gpus=0, environ={}).name == "tpu"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_virtual_devices": 257}, "must be from 0 to 256"),
        ({"num_virtual_devices": 4, "strategy": "default"}, "use --strategy=mirrored"),
        ({"num_virtual_devices": 4, "strategy": "tpu"}, "use --strategy=mirrored"),
        ({"num_virtual_devices": -1}, "must be from 0"),
    ],
)
def test_conflicts_are_refused_by_the_config(config: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        TrainConfig(**config)


def test_mirrored_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strategies.tf.config, "list_physical_devices", lambda kind=None: [])
    with pytest.raises(InputError, match="use --num_virtual_devices=N"):
        strategies.create(TrainConfig(strategy="mirrored"))


@pytest.mark.parametrize("address", ["local", "no-such-tpu"])
def test_a_missing_tpu_is_told_fast(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strategies.glob, "glob", lambda _: [])
    monkeypatch.delenv("TPU_NAME", raising=False)
    started = time.monotonic()
    with pytest.raises(InputError, match=f"--(strategy=tpu|tpu={address})"):
        strategies.create(TrainConfig(strategy="tpu", tpu=address))
    assert time.monotonic() - started < 60  # 10 on a machine that does nothing else.


def test_the_default_strategy_is_one_replica():
    strategy, choice = strategies.create(TrainConfig(strategy="default"))
    assert strategy.num_replicas_in_sync == 1
    assert choice.reason == "asked for"


_STARTED = """
import tapedist.runtime_flags
import tensorflow as tf
tf.constant(1) + 1
from tapedist.cluster import strategies
from tapedist.config import TrainConfig
from tapedist.errors import InputError
try:
    strategies.create(TrainConfig(num_virtual_devices=3))
except InputError as error:
    print(error)
"""


def test_devices_cannot_be_split_once_tensorflow_runs(run_python: Callable[..., Any]):
    done = run_python("-c", _STARTED, warm=True)
    assert "already started in this process with 1" in done.out, done.err


def test_runs_of_one_process_share_a_mirrored_strategy():
    """Two would number their collectives alike, and TensorFlow would mix them up."""
    assert strategies._mirrored_on(("CPU:0",)) is strategies._mirrored_on(("CPU:0",))
