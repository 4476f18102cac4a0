"""From a config to its source of rows."""

from __future__ import annotations

from tapedist.config import TrainConfig
from tapedist.data.blocks import Source
from tapedist.data.tables import check_table, open_table


def check_source(config: TrainConfig) -> None:
    """Judges what can be judged of `--data` without reading rows: paths, headers, columns. Imports no TensorFlow.

    Raises:
        InputError: with every problem of the columns, or the first of the files.
    """
    if config.from_table:
        check_table(config.data, target=config.target, features=config.features, weight=config.weight)


def open_source(config: TrainConfig) -> Source:
    """The source that `--data` names.

    Raises:
        InputError: if it cannot be read.
        StateError: if a file changes while it is read.
        StorageError: if a table needs a scratch file that cannot be written.
    """
    if config.from_table:
        return open_table(
            config.data,
            target=config.target,
            features=config.features,
            weight=config.weight,
            on_bad_rows=config.on_bad_rows,
            split=config.split_kind,
            test_fraction=config.test_fraction,
            seed=config.seed,
            dtype=config.dtype,
        )
    from tapedist.data.synthetic import SyntheticSource  # Imports TensorFlow.

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
