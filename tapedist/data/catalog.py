"""From a config to its source of rows."""

from __future__ import annotations

import numpy as np

from tapedist.config import TrainConfig
from tapedist.data.source import Source
from tapedist.data.standardize import ColumnMoments
from tapedist.data.tables.table import check_table, open_table
from tapedist.errors import InputError
from tapedist.text import display

# Squares, their sums over rows, and the first step away from the start must fit. In float64 numbers beyond 2**250, and
# below its reciprocal, are none that training computes with (docs/arithmetic.md).
_LARGEST_SQUARED = {"float32": 1e18, "float64": 1e70}
_LARGEST = {"float32": 1e37, "float64": 1e75}
# Squares of residuals, which are smaller than the target's deviation, must not vanish.
_LEAST_SQUARED = {"float32": 1e-16, "float64": 1e-70}


def check_source(config: TrainConfig) -> None:
    """Judges what can be judged of `--data` without reading rows: paths, headers, columns. Imports no TensorFlow.

    Raises:
        InputError: with every problem of the columns, or the first of the files.
    """
    if config.from_table:
        check_table(config.data, target=config.target, features=config.features, weight=config.weight)


def check_sizes(config: TrainConfig, source: Source, largest: np.ndarray, *, squared: bool) -> None:
    """Whether numbers, and squares of raw ones under squared error, leave room for sums and for steps.

    Args:
        config: the run's settings.
        source: the rows as training sees them.
        largest: the greatest magnitude of each column, float64 `[d + 1]`.
        squared: whether the loss is squared error.

    Raises:
        InputError: if not, with the column.
    """
    squares = squared and not config.standardizes
    limit = (_LARGEST_SQUARED if squares else _LARGEST)[config.dtype]
    if not (largest >= limit).any():
        return
    position = int(largest.argmax())
    name = [*source.feature_names, source.target_name][position]
    standardize = "" if config.standardizes else "--standardize or "
    raise InputError(
        f"column {display(name)} holds numbers up to {largest[position]:.3g}, "
        f"{'whose squares' if squares else 'which'} overflow {config.dtype}; use {standardize}smaller units "
        f"(below {limit:g})"
    )


def check_target(config: TrainConfig, source: Source, columns: ColumnMoments) -> None:
    """Whether squares of a standardized target, which keeps its units, fit the compute type.

    Args:
        config: the run's settings.
        source: the rows.
        columns: of the training rows.

    Raises:
        InputError: if not.
    """
    spread = float((columns.deviations if config.fit_intercept else columns.sizes)[-1])
    least, most = _LEAST_SQUARED[config.dtype], _LARGEST_SQUARED[config.dtype]
    if spread == 0 or least <= spread < most:
        return
    what, units = ("vanish in", "larger") if spread < least else ("overflow", "smaller")
    fits = config.dtype == "float32" and _LEAST_SQUARED["float64"] <= spread < _LARGEST_SQUARED["float64"]
    raise InputError(
        f"target {display(source.target_name or 'y')}: varies by {spread:.3g}, whose squares {what} {config.dtype}; "
        f"use {'--dtype=float64, or ' if fits else ''}{units} units for it, so that it varies by {least:g} to {most:g}"
    )


def open_source(config: TrainConfig, *, in_order: bool = False) -> Source:
    """The source that `--data` names.

    Args:
        config: the run's settings.
        in_order: whether rows are asked for in their order only, whatever the settings say.

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
            scratch_dir=config.scratch_dir,
            in_order=in_order or config.mode == "full_batch" or config.shuffle == "none",
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
