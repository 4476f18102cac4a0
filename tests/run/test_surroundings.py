"""What a program around a training may have done: one digest, or one line that says how to undo it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tapedist import runtime_flags
from tapedist.config import TrainConfig
from tapedist.errors import InputError
from tapedist.run import train

SETTINGS: dict[str, Any] = {"n_samples": 200, "num_epochs": 5, "learning_rate": 0.1, "full_batch_engine": "stream"}


def _digest() -> str:
    return train.train(TrainConfig(**SETTINGS)).digest


@pytest.fixture(scope="module")
def plain() -> str:
    return _digest()


def test_functions_that_run_eagerly_are_refused(plain: str):
    tf.config.run_functions_eagerly(True)
    try:
        with pytest.raises(InputError, match=r"call tf.config.run_functions_eagerly\(False\) before"):
            _digest()
    finally:
        tf.config.run_functions_eagerly(False)
    assert _digest() == plain


def test_checked_numerics_are_refused(plain: str):
    tf.debugging.enable_check_numerics()
    try:
        with pytest.raises(InputError, match=r"call tf.debugging.disable_check_numerics\(\) before"):
            _digest()
    finally:
        tf.debugging.disable_check_numerics()
    assert _digest() == plain


def test_a_strategy_of_the_callers_is_refused(plain: str):
    with (
        tf.distribute.OneDeviceStrategy("CPU:0").scope(),
        pytest.raises(InputError, match=r"^OneDeviceStrategy.scope\(\): .* call it outside the scope"),
    ):
        _digest()
    assert _digest() == plain


def test_a_graph_is_no_place_to_train(plain: str):
    with tf.Graph().as_default(), pytest.raises(InputError, match="train: was called where TensorFlow makes a graph"):
        _digest()

    def traced() -> tf.Tensor:
        with pytest.raises(InputError, match="call it outside"):
            _digest()
        return tf.constant(0)

    tf.function(traced, autograph=False)()
    assert _digest() == plain


@pytest.mark.parametrize("name", ["device", "tape", "errors of NumPy"])
def test_what_has_no_effect(name: str, plain: str):
    around: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "device": lambda: tf.device("/CPU:0"),
        "tape": lambda: tf.GradientTape(persistent=True),
        "errors of NumPy": lambda: np.errstate(all="raise"),
    }
    with around[name]():
        assert _digest() == plain


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ("", runtime_flags.XLA_FLAGS),
        ("--xla_dump_to=d", f"--xla_dump_to=d {runtime_flags.XLA_FLAGS}"),
        (runtime_flags.XLA_FLAGS, runtime_flags.XLA_FLAGS),
        (
            "--xla_disable_hlo_passes=none",
            " ".join(["--xla_disable_hlo_passes=none", *runtime_flags.XLA_FLAGS.split()[1:]]),
        ),
        ("flags.txt", "flags.txt"),
    ],
)
def test_xla_gets_the_flags_that_the_user_has_not_set(own: str, wanted: str):
    assert runtime_flags._completed(own) == wanted


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "bits"),
    [
        ("AuthenticAMD", 25, "sse2 avx2 avx512f", 512), ("AuthenticAMD", 25, "sse2 avx2", 0),
        ("GenuineIntel", 6, "sse2 avx2 avx512f", 0),
    ],
)  # fmt: skip
def test_vectors_are_as_wide_as_the_processor_was_measured_with(
    vendor: str, family: int, flags: str, bits: int, tmp_path: Path
):
    facts = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\n\n"
    (tmp_path / "cpuinfo").write_text(facts + facts.replace(vendor, "another"))
    assert runtime_flags._vector_bits(str(tmp_path / "cpuinfo")) == bits
    assert runtime_flags._vector_bits(str(tmp_path / "missing")) == 0


_FLAGS = """
import os
import tapedist.runtime_flags
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
from tapedist import TrainConfig, train
print(train(TrainConfig(n_samples=200, num_epochs=5, learning_rate=0.1, full_batch_engine="stream")).digest)
"""


def test_flags_of_another_library_change_no_digest(run_python: Callable[..., Any], plain: str):
    done = run_python("-c", _FLAGS, warm=True)
    assert done.out.strip() == plain, done.err


_FORK = """
import multiprocessing
from tapedist import ArraySource, TrainConfig, train
from tapedist.run.train import find_devices

CONFIG = TrainConfig(n_samples=200, num_epochs=5, learning_rate=0.1)

def refused(call, *words):
    try:
        call(*words)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"

def child(queue, result):
    queue.put([refused(train, CONFIG), refused(find_devices), result.predict([[1.0]]).tolist()])

def digest(queue):
    queue.put(train(CONFIG).digest)

def ask(context, target, *words):
    queue = context.SimpleQueue()
    process = context.Process(target=target, args=(queue, *words))
    process.start()
    found = queue.get()
    process.join()
    assert process.exitcode == 0
    return found

if __name__ == "__main__":
    early = ask(multiprocessing.get_context("fork"), digest)
    result = train(CONFIG)
    print(early == result.digest)
    for line in ask(multiprocessing.get_context("fork"), child, result):
        print(line)
    print(result.predict([[1.0]]).tolist())
    print(ask(multiprocessing.get_context("spawn"), digest) == result.digest)
"""


def test_a_fork_of_a_used_tensorflow_is_refused(run_python: Callable[..., Any], tmp_path: Any):
    (tmp_path / "fork.py").write_text(_FORK)
    done = run_python("fork.py")
    assert done.code == 0, done.err
    early, trained, devices, predicted, wanted, spawned = done.out.splitlines()
    assert early == spawned == "True"
    assert trained == devices
    assert trained.startswith("InputError: multiprocessing: this process was forked from one in which TensorFlow had")
    assert 'multiprocessing.get_context("spawn")' in trained
    assert predicted == wanted
