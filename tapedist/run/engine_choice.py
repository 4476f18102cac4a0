"""Which engine computes the epochs of a run, and how its steps are called."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tapedist.config import TrainConfig
from tapedist.data.source import Source, row_blocks
from tapedist.data.synthetic import SyntheticSource
from tapedist.errors import InputError
from tapedist.training import engines
from tapedist.training.engine_setup import Setup
from tapedist.training.engines import Engine, evaluator
from tapedist.training.replicas import gather_seconds
from tapedist.training.schedule import CallLength, GatherCostMonitor


def choose_engine(
    config: TrainConfig, setup: Setup, *, source: Source, why_not_moments: str, log: Callable[[str], None]
) -> Engine:
    """The engine that the config asks for, or the one that fits; `log` tells which and why.

    Args:
        config: the run's settings.
        setup: what engines need.
        source: the rows, as the user has them.
        why_not_moments: why the `moments` engine cannot serve; empty if it can.
        log: takes a line for the log.

    Raises:
        InputError: if the engine asked for cannot serve.
    """
    if config.mode == "full_batch":
        engine = _full_batch(config, setup, why_not_moments=why_not_moments, log=log)
    else:
        # Only synthetic rows are known to be independent draws, so that any batch is as good as another.
        independent = isinstance(source, SyntheticSource)
        shuffle = {"auto": "batches" if independent else "rows"}.get(config.shuffle, config.shuffle)
        engine = engines.mini_batch(setup, batch_size=config.batch_size, shuffle=shuffle, seed=config.seed)
        if config.batch_size > source.num_rows("train"):
            log(
                f"Notice: --batch_size={config.batch_size} is above the {source.num_rows('train')} training rows: "
                "every epoch is one step"
            )
    log(f"Engine: {engine.name} ({engine.reason})")
    return engine


def _full_batch(config: TrainConfig, setup: Setup, *, why_not_moments: str, log: Callable[[str], None]) -> Engine:
    if config.full_batch_engine != "stream":
        if not why_not_moments:
            return engines.moments(setup)
        if config.full_batch_engine == "moments":
            raise InputError(f"--full_batch_engine=moments: cannot serve, because {why_not_moments}; use stream")
        log(f"Engine stream instead of moments: {why_not_moments}")
    return engines.full_batch(setup, split="train", passes=config.most_epochs + 1)


def choose_call_length(
    config: TrainConfig, setup: Setup, engine: Engine, *, num_parameters: int, log: Callable[[str], None]
) -> CallLength:
    """How many steps a compiled call takes; where steps gather, it also watches what that costs."""
    replicas = setup.strategy.num_replicas_in_sync
    if replicas == 1 or engine.on_moments:  # No step gathers.
        return CallLength(config.steps_per_call)
    return GatherCostMonitor(
        config.steps_per_call,
        gather_secs=gather_seconds(setup.strategy, width=num_parameters + 2 + setup.source.weighted),
        replicas=replicas,
        batch_size=config.batch_size if config.mode == "mini_batch" else 0,
        log=log,
    )


def test_evaluator(config: TrainConfig, setup: Setup) -> Callable[[np.ndarray], tuple[float, float]] | None:
    """The loss of a state on the test split; None without test rows that weigh anything.

    Args:
        config: the run's settings.
        setup: what engines need.
    """
    passes = 1
    if not _has_weight(setup.source, "test"):
        return None
    if config.eval_every_epochs:
        passes += config.most_epochs // config.eval_every_epochs
    if config.early_stop_patience:
        passes += config.most_epochs // config.early_stop_every_epochs
    return evaluator(engines.full_loss(setup, split="test", passes=passes))


def _has_weight(source: Source, split: str) -> bool:
    """Whether a split has a loss; seldom looks further than its first rows."""
    if not source.weighted:
        return source.num_rows(split) > 0
    return any(w is not None and (w > 0).any() for _, _, w in row_blocks(source, split))
