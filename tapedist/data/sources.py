"""From a config to its source of rows."""

from __future__ import annotations

from tapedist.config import TrainConfig
from tapedist.data.blocks import Source
from tapedist.data.synthetic import SyntheticSource


def open_source(config: TrainConfig) -> Source:
    """The source that `--data` names.

    Raises:
        InputError: if it cannot be read.
    """
    return SyntheticSource(
        n_samples=config.n_samples,
        test_fraction=config.test_fraction,
        seed=config.seed,
        m=config.m,
        c=config.c,
        mean=config.mean,
        std=config.std,
        noise_std=config.noise_std,
    )
