"""Small programs for `tapedist doctor`, each in a process of its own: `python -m tapedist.cluster.probe NAME`.

A TensorFlow that crashes or hangs must not end the doctor. Each program prints JSON objects, one a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def devices() -> None:
    """Prints TensorFlow's version, its devices, and whether it was built for CUDA; then the machine's speed."""
    import tensorflow as tf

    build = tf.sysconfig.get_build_info()
    found = [device.device_type for device in tf.config.list_physical_devices()]
    _log(version=tf.__version__, devices=found, cuda=str(build.get("cuda_version", "")))
    _log(rows_per_sec=speed_estimate(2.0))


def speed_estimate(seconds: float, *, rows: int = 2**20) -> float:
    """Rows per second of a compiled tape step of the tutorial's model on this process's default device.

    Args:
        seconds: how long to measure, after compilation.
        rows: `n`; they stay in the device's memory.
    """
    import tensorflow as tf

    x = tf.random.stateless_normal([rows], seed=[0, 1], alg="philox")
    y = 9.0 * x - 2.0

    @tf.function(jit_compile=True)
    def steps(weight: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        for _ in tf.range(count):
            with tf.GradientTape() as tape:
                tape.watch(weight)
                loss = tf.reduce_mean(tf.square(weight * x - y))
            weight -= 0.001 * tape.gradient(loss, weight)
        return weight

    steps_per_call = 10
    weight = steps(tf.constant(0.0), tf.constant(steps_per_call))
    weight.numpy()
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        weight = steps(weight, tf.constant(steps_per_call))
        weight.numpy()  # Waits for the device.
        calls += 1
    return rows * steps_per_call * calls / elapsed


def exchange() -> None:
    """Prints a sum over the cluster of TF_CONFIG, in which each worker's number is at its own place."""
    import tensorflow as tf

    from tapedist.cluster.network import without_proxy
    from tapedist.cluster.resolve import resolve

    spec = resolve(os.environ)
    with without_proxy(spec.workers):
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        total = tf.function(lambda value: strategy.reduce("SUM", value, axis=None))
        numbers = strategy.experimental_distribute_values_from_function(
            lambda _: tf.one_hot(spec.index, spec.num_workers, on_value=tf.constant(spec.index + 1, tf.int64))
        )
        _log(exchanged=total(numbers).numpy().tolist())


PROGRAMS: dict[str, Callable[[], None]] = {"devices": devices, "exchange": exchange}


def _log(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    PROGRAMS[sys.argv[1]]()
