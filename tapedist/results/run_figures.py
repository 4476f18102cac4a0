"""From a run to its figures: which rows are drawn, and what is known beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from tapedist.data.orders import Source
from tapedist.results import figures
from tapedist.results.result import TrainResult

_MOST_ROWS = figures.MOST_DOTS


def draw(directory: Path, result: TrainResult, *, source: Source, path: Sequence[tuple[int, np.ndarray]]) -> list[Path]:
    """Draws a run's figures; see `plots.draw_all`.

    Args:
        directory: where the files go.
        result: what was found.
        source: where rows come from; a few thousand of each split are drawn.
        path: `(epoch, parameters)` over time.

    Raises:
        StorageError: if a file cannot be written.
    """
    linear = len(result.weights) > 0
    return figures.draw_all(
        directory,
        train=_sample(source, "train"),
        test=_sample(source, "test"),
        history=result.history,
        fitted=_fitted(result) if linear else None,
        truth=figures.Line(weights=np.array(result.truth[0]), bias=result.truth[1]) if result.truth else None,
        optimum=_optimum(result),
        path=_path(result, path) if linear and path else None,
        feature_names=source.feature_names,
        target_name=source.target_name,
    )


def _fitted(result: TrainResult) -> figures.Line:
    return figures.Line(
        weights=result.weights, bias=result.bias, center=result.center, bias_at_center=result.bias_at_center
    )


def _optimum(result: TrainResult) -> figures.Line | None:
    fit = result.statistics.fit if result.statistics else None
    if fit is None or fit.weights is None or fit.bias is None:
        return None
    return figures.Line(weights=fit.weights, bias=fit.bias)


def _path(result: TrainResult, path: Sequence[tuple[int, np.ndarray]]) -> figures.ParameterPath:
    """The path of a linear model, to its end: what was kept lies at the logged epochs, before their updates."""
    d = len(result.weights)
    before = [(epoch, theta) for epoch, theta in path if epoch < result.epochs]
    steps = [*before, (result.epochs, result.parameters)]
    return figures.ParameterPath(
        epochs=np.array([epoch for epoch, _ in steps]),
        values=np.array([np.append(theta[:d], theta[d] if len(theta) > d else 0.0) for _, theta in steps]),
    )


def _sample(source: Source, split: str) -> figures.Points:
    """At most a few thousand rows of a split, evenly spread, always the same ones."""
    total = source.num_rows(split)
    if total == 0:
        return figures.Points(x=np.zeros([0, source.num_features]), y=np.zeros(0))
    count = min(total, _MOST_ROWS)
    indices = (np.arange(count, dtype=object) * total // count).astype(np.int64)
    x, y = source.take(split, tf.constant(indices))[:2]
    return figures.Points(x=x.numpy(), y=y.numpy(), total=total)
