"""tapedist 0.1, whose package must come first on the path; kinds "engine" and "pass" of `peer_tapedist.py`."""

from __future__ import annotations

import functools
import math
from typing import Any

import tapedist.numerics
import tensorflow as tf
from engine_work import DEFAULTS, columns_of, engine_work
from peer import Work
from tapedist.data.sources import open_source

import tapedist
from tapedist.cluster import strategies
from tapedist.config import TrainConfig
from tapedist.data.array_source import ArraySource
from tapedist.training import engines, losses, optimizers
from tapedist.training.model import LinearModel

VERSION = f"tapedist {tapedist.__version__}, tensorflow {tf.__version__}"


def make(task: dict[str, Any]) -> Work:
    run_steps = lambda engine, state, step, num_steps: engine.run(  # noqa: E731
        state, step=step, num_steps=num_steps, limit=math.inf, interrupted=lambda: False
    )
    return engine_work(task, lambda: _open(task), run_steps)


def _open(task: dict[str, Any]) -> engines.Engine:
    config = TrainConfig(**DEFAULTS | task["config"])
    source = ArraySource(*columns_of(task)) if task["in_memory"] else open_source(config)
    setup = engines.Setup(
        source=source,
        programs={
            "strategy": _strategy(),
            "model": LinearModel(source.num_features),
            "loss": losses.by_name(config.loss, huber_delta=config.huber_delta),
            "optimizer": optimizers.from_config(config),
            "num_shards": config.virtual_shards,
            "l2": 0.0,
            "dtype": tf.as_dtype(config.dtype),
        },
        num_shards=config.virtual_shards,
        cache=config.cache,
    )
    if config.mode == "mini_batch":
        return engines.mini_batch(setup, batch_size=config.batch_size, shuffle="batches", seed=config.seed)
    if config.full_batch_engine == "moments":
        return engines.moments(setup)
    return engines.full_batch(setup, split="train", passes=config.num_epochs)


@functools.cache
def _strategy() -> tf.distribute.Strategy:
    return strategies.create(TrainConfig())[0]
