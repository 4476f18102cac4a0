"""tapedist, through the engines that `train` runs, and TensorFlow programs to hold them against.

A task's `config` holds fields of `TrainConfig`. Kinds: `engine` (steps of the engine that the config chooses), `pass`
(the same, with everything the engine has learned from the rows forgotten before), `plain` (mini-batches summed by XLA
as it likes), `rows` (nothing but making rows, in a parallel map).
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import tensorflow as tf
from engine_work import DEFAULTS, columns_of, engine_work
from peer import RATE, Work, make_rows, starts

import tapedist
from tapedist.cluster import strategies
from tapedist.config import TrainConfig
from tapedist.data.array_source import ArraySource
from tapedist.data.catalog import open_source
from tapedist.data.ranges import Bounds, ranges
from tapedist.data.synthetic import SyntheticSource
from tapedist.training import engines, losses, optimizers
from tapedist.training.engine_setup import Setup
from tapedist.training.model import LinearModel
from tapedist.training.steps import Problem

VERSION = f"tapedist {tapedist.__version__}, tensorflow {tf.__version__}"
_DEVICES = int(sys.argv[2]) if len(sys.argv) > 2 else 0


def make(task: dict[str, Any]) -> Work:
    kinds = {"engine": _engine, "pass": _engine, "plain": _plain, "rows": _rows}
    return kinds[task["kind"]](task)


def _engine(task: dict[str, Any]) -> Work:
    every = TrainConfig().log_every_epochs
    # As `train` has it: losses of the epochs that have a row.
    measured = lambda epochs: range(-(-epochs.start // every) * every, epochs.stop, every)  # noqa: E731
    run_steps = lambda engine, state, step, num_steps: engine.run(  # noqa: E731
        engines.Call(state=state, step=step, num_steps=num_steps, measured=measured)
    )
    return engine_work(task, lambda: _open(task), run_steps)


def _open(task: dict[str, Any]) -> engines.Engine:
    """The engine that `train` would run."""
    settings = {"num_virtual_devices": _DEVICES, **DEFAULTS, **task["config"]}
    config = TrainConfig(**settings).resolved().with_arithmetic("default")
    source: Any = ArraySource(*columns_of(task)) if task["in_memory"] else open_source(config)
    problem = Problem(
        model=LinearModel(source.num_features),
        loss=losses.by_name(config.loss, huber_delta=config.huber_delta),
        optimizer=optimizers.from_config(config),
        dtype=tf.as_dtype(config.dtype),
        arithmetic=config.arithmetic,
    )
    setup = Setup(
        source=source,
        strategy=_strategy(),
        problem=problem,
        bounds=functools.cache(lambda split: Bounds.of(ranges(source, split), dtype=config.dtype)),
        cache=config.cache,
    )
    if config.mode == "mini_batch":
        return engines.mini_batch(setup, batch_size=config.batch_size, shuffle="batches", seed=config.seed)
    if config.full_batch_engine == "moments":
        return engines.moments(setup)
    return engines.full_batch(setup, split="train", passes=config.num_epochs)


@functools.cache
def _strategy() -> tf.distribute.Strategy:
    return strategies.create(TrainConfig(num_virtual_devices=_DEVICES))[0]


def _plain(task: dict[str, Any]) -> Work:
    n, d, batch, steps = task["n"], task["d"], task["batch"], task["steps"]
    x, y = (tf.constant(column) for column in make_rows(n, d))
    firsts = tf.constant(starts(n, batch, steps))

    @tf.function(jit_compile=True, autograph=False)
    def loop(x: Any, y: Any, firsts: Any) -> Any:
        def body(step: Any, theta: Any, losses: Any) -> tuple[Any, Any, Any]:
            first = firsts[step]
            xs = tf.slice(x, [first], [batch]) if d == 1 else tf.slice(x, [first, 0], [batch, d])
            with tf.GradientTape() as tape:
                values = tf.cast(theta, tf.float32)
                w, b = (values[0] if d == 1 else values[:d]), values[d]
                tape.watch([w, b])
                r = (xs * w if d == 1 else tf.linalg.matvec(xs, w)) + b - tf.slice(y, [first], [batch])
                loss = tf.reduce_sum(r * r)
            gw, gb = tape.gradient(loss, [w, b])
            g = tf.cast(tf.concat([tf.reshape(gw, [-1]), [gb]], 0), tf.float64) / batch
            return step + 1, theta - RATE * g, tf.tensor_scatter_nd_update(losses, [[step]], [loss / batch])

        start = (tf.constant(0), tf.zeros([d + 1], tf.float64), tf.zeros([steps]))
        return tf.while_loop(lambda step, *_: step < steps, body, start)[1:]

    def run() -> dict[str, Any]:
        theta, losses = loop(x, y, firsts)
        return {"weight": float(theta[0]), "loss": float(losses[-1])}

    return Work(run, note="one XLA loop")


def _rows(task: dict[str, Any]) -> Work:
    source = SyntheticSource(
        n_samples=2**61, test_fraction=0.0, seed=0, m=(9.0,) * task["d"], c=-2.0, mean=0.0, std=1.0, noise_std=1.0
    )
    block_rows = 131_072
    blocks = -(-task["n"] // block_rows)

    def block(number: Any) -> list[Any]:
        rows = source.take_runs("train", tf.reshape(number * block_rows, [1]), length=block_rows)
        return [tf.reshape(array, [-1])[-1] for array in rows]

    dataset = tf.data.Dataset.range(blocks).map(block, num_parallel_calls=tf.data.AUTOTUNE).batch(blocks)

    def run() -> dict[str, Any]:
        last = next(iter(dataset))
        return {"last": float(last[-1][-1])}

    return Work(run, scale=task["n"] / (blocks * block_rows), note=f"blocks of {block_rows} rows")
