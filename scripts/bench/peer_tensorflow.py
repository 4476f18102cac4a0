"""Plain TensorFlow: the tutorial's hand-written eager loop, and Keras `fit` in the best setting found."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf
from peer import RATE, Work, make_rows, starts

VERSION = f"tensorflow {tf.__version__}, keras {keras.__version__}"


def make(task: dict[str, Any]) -> Work:
    return _eager(task) if task["kind"] == "eager" else _keras(task)


def _eager(task: dict[str, Any]) -> Work:
    n, batch, steps = task["n"], task.get("batch", task["n"]), min(task["steps"], task["at_most"])
    x, y = (tf.constant(column) for column in make_rows(n, 1))
    firsts = starts(n, batch, steps).tolist()

    def run() -> dict[str, Any]:
        w, b = tf.Variable(0.0), tf.Variable(0.0)
        for first in firsts:
            xs, ys = (x, y) if batch == n else (x[first : first + batch], y[first : first + batch])
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(w * xs + b - ys))
            gw, gb = tape.gradient(loss, [w, b])
            w.assign_sub(RATE * gw)
            b.assign_sub(RATE * gb)
        return {"weight": float(w)}

    return Work(run, scale=task["steps"] / steps, note=f"{steps} steps")


def _keras(task: dict[str, Any]) -> Work:
    """Tries every setting on a few steps and keeps the fastest."""
    n, d, batch, steps = task["n"], task["d"], task.get("batch", task["n"]), min(task["steps"], task["at_most"])
    columns = make_rows(n, d)
    per_execution = min(64, max(1, steps // 2))
    found: list[tuple[float, str, Callable[[int], dict[str, Any]]]] = []
    for compiled in (True, False):
        # From arrays, `fit` ends an epoch after the last row: with one batch it would run one step at a time.
        for feed in ("cached dataset", "arrays") if batch < n else ("cached dataset",):
            fit = _fit(columns, batch, compiled, per_execution, feed)
            try:
                fit(per_execution)
                begin = time.perf_counter()
                fit(per_execution)
            except (tf.errors.OpError, ValueError):
                continue
            name = f"jit_compile={compiled}, steps_per_execution={per_execution}, {feed}"
            found.append((time.perf_counter() - begin, name, fit))
    _, name, fit = min(found, key=lambda one: one[0])
    return Work(
        lambda: fit(steps), scale=task["steps"] / steps, note=f"best of {len(found)} settings: {name}; {steps} steps"
    )


def _fit(
    columns: tuple[Any, Any], batch: int, compiled: bool, per_execution: int, feed: str
) -> Callable[[int], dict[str, Any]]:
    x, y = columns[0].reshape(len(columns[1]), -1), columns[1][:, None]
    model = keras.Sequential([keras.layers.Input([x.shape[1]]), keras.layers.Dense(1)])
    model.compile(
        optimizer=keras.optimizers.SGD(RATE), loss="mse", jit_compile=compiled, steps_per_execution=per_execution
    )
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch, drop_remainder=True).cache().repeat()
    dataset = dataset.prefetch(tf.data.AUTOTUNE)

    def fit(steps: int) -> dict[str, Any]:
        if feed == "arrays":
            rows = steps * batch
            model.fit(x[:rows], y[:rows], batch_size=batch, shuffle=False, verbose=0)
        else:
            model.fit(dataset, steps_per_epoch=steps, shuffle=False, verbose=0)
        return {"weight": float(model.get_weights()[0][0, 0])}

    return fit
