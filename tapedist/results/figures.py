"""The figures of a run, as PNG files.

They are drawn with matplotlib's objects on its Agg canvas: no pyplot, no backend switch, no window, so that a program
that uses tapedist keeps its own matplotlib state.

Legend: `k` rows, `d` features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tapedist.data.source import Source, row_arrays
from tapedist.regression.prediction import predict_rows
from tapedist.results import figure_style as style
from tapedist.results.report_charts import caption, sampled, thinned
from tapedist.results.result import TrainResult
from tapedist.runtime_flags import default_figure_settings
from tapedist.storage.files import storage_error
from tapedist.training.interfaces import Row

MOST_DOTS = 5000
MOST_FEATURES = 3
MOST_PARAMETERS = 8
_MOST_VERTICES = 2000
_LOG_RATIO = 10.0  # A loss that falls by more than this is drawn on a logarithmic axis.
_MOST_ROWS = MOST_DOTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
    """Rows to draw.

    Attributes:
        x: features, `[k, d]`.
        y: targets, `[k]`.
        total: the number of rows that these are a sample of; `k` by default.
    """

    x: np.ndarray
    y: np.ndarray
    total: int | None = None

    def drawn(self, most: int = MOST_DOTS) -> Points:
        """At most `most` of the rows whose numbers are finite, always the same ones."""
        keep = sampled(len(self.y), most)
        x, y = np.asarray(self.x)[keep].astype(np.float64), np.asarray(self.y)[keep].astype(np.float64)
        finite = np.isfinite(y) & np.isfinite(x).all(axis=1)
        return Points(x=x[finite], y=y[finite], total=self.rows)

    @property
    def rows(self) -> int:
        return len(self.y) if self.total is None else self.total

    @property
    def caption(self) -> str:
        """The number of rows drawn, as in `showing 5,000 of 8,000,000 rows`."""
        return caption(len(self.y), self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A linear model: `weights` `[d]` and `bias`; for predictions without cancellation far from 0, also the `center`
    `[d]` and the prediction there.
    """

    weights: np.ndarray
    bias: float
    center: np.ndarray | None = None
    bias_at_center: float | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        bias = self.bias if self.bias_at_center is None else self.bias_at_center
        return predict_rows(x, self.weights, bias, self.center)

    def formula(self, x: str, y: str) -> str:
        """`y = 9 x - 2`, for one feature."""
        sign = "\N{MINUS SIGN}" if self.bias < 0 else "+"
        slope, offset = style.number(float(self.weights[0])), style.number(abs(self.bias))
        return f"{style.plain(y, 14)} = {slope} {style.plain(x, 14)} {sign} {offset}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterPath:
    """Parameters over time: `epochs` `[t]` and `values` `[t, d + 1]`, the weights and then the bias."""

    epochs: np.ndarray
    values: np.ndarray


def draw_all(
    directory: Path,
    *,
    train: Points,
    test: Points,
    history: Sequence[Row],
    fitted: Line | None = None,
    truth: Line | None = None,
    optimum: Line | None = None,
    path: ParameterPath | None = None,
    feature_names: Sequence[str] = ("x",),
    target_name: str = "y",
) -> list[Path]:
    """Draws the figures that the data allow: `training_data`, `test_data`, `test_fit`, `loss_curve`, `parameter_path`.

    Args:
        directory: where the PNG files go; made if absent.
        train: rows of the training split.
        test: rows of the test split; may be none.
        history: rows of metrics.
        fitted: the fitted model, if it is linear.
        truth: the model that made the rows, if known.
        optimum: the least-squares optimum, if known.
        path: the parameters over time, if kept.
        feature_names: `d` names.
        target_name: the target's name.

    Returns:
        The files drawn.

    Raises:
        StorageError: if a file cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("create", directory, error) from error
    features, target = list(feature_names), target_name
    with default_figure_settings():
        figures = {
            "training_data": data_figure("Training data", train, style.TRAIN, features, target, fitted),
            "test_data": data_figure("Test data", test, style.TEST, features, target, fitted),
            "test_fit": fit_figure(test, fitted, truth, features, target) if fitted else None,
            "loss_curve": loss_figure(history),
            "parameter_path": path_figure(path, truth, optimum, features) if path else None,
        }
        return [style.save(figure, directory / f"{name}.png") for name, figure in figures.items() if figure]


def data_figure(
    title: str, points: Points, color: str, features: Sequence[str], target: str, fitted: Line | None
) -> style.Figure | None:
    """Target over feature; of several features, those that move the prediction most."""
    points = points.drawn()
    if not len(points.y):
        return None
    chosen = np.arange(len(features))
    subtitle = points.caption
    if len(features) > MOST_FEATURES:
        # By the effect on the prediction, as coefficients depend on the units of their features.
        moves = np.std(points.x, axis=0) * (np.abs(fitted.weights) if fitted else 1)
        chosen = np.sort(np.argsort(-moves, kind="stable")[:MOST_FEATURES])
        subtitle += f" · the {MOST_FEATURES} of {len(features)} features that move the prediction most"
    figure, axes = style.new_figure(title, subtitle, columns=len(chosen))
    for one, feature in zip(axes, chosen.tolist(), strict=True):
        style.dots(one, points.x[:, feature], points.y, color)
        style.label(one, x=style.plain(features[feature]))
    style.label(axes[0], y=style.plain(target))
    return figure


def fit_figure(
    points: Points, fitted: Line, truth: Line | None, features: Sequence[str], target: str
) -> style.Figure | None:
    """The test rows with the fitted line; with several features, predicted against actual values."""
    points = points.drawn()
    if not len(points.y):
        return None
    if len(features) > 1:
        return _predicted_figure(points, fitted, target)
    figure, (axes,) = style.new_figure("Test data with the fitted line", points.caption)
    style.dots(axes, points.x[:, 0], points.y, style.TEST, "test rows")
    ends = np.array([points.x.min(), points.x.max()])[:, None]
    if truth:  # Wider and below the fitted line, so that both are visible where they agree.
        formula = truth.formula(features[0], target)
        axes.plot(ends, truth(ends), color=style.TRUTH, alpha=0.55, linewidth=5.5, label=f"truth:  {formula}")
    formula = fitted.formula(features[0], target)
    axes.plot(ends, fitted(ends), color=style.INK, linewidth=2, label=f"fitted:  {formula}")
    style.label(axes, style.plain(features[0]), style.plain(target))
    style.legend(axes, "upper left" if fitted.weights[0] >= 0 else "upper right")
    return figure


def _predicted_figure(points: Points, fitted: Line, target: str) -> style.Figure:
    predicted = fitted(points.x)
    figure, (axes,) = style.new_figure("Test data: predicted against actual", points.caption)
    style.dots(axes, points.y, predicted, style.TEST, "test rows")
    ends = np.array([min(points.y.min(), predicted.min()), max(points.y.max(), predicted.max())])
    axes.plot(ends, ends, color=style.INK, linewidth=2, label="predicted = actual")
    style.label(axes, f"actual {style.plain(target)}", f"predicted {style.plain(target)}")
    style.legend(axes, "upper left")
    return figure


def loss_figure(history: Sequence[Row]) -> style.Figure | None:
    """Training and test loss over epochs."""
    splits = {"train": ("training", style.TRAIN), "test": ("test", style.TEST)}
    series = {}
    for split in splits:
        rows = [row for row in history if row.split == split and np.isfinite(row.loss)]
        if rows:
            picked = thinned(len(rows), _MOST_VERTICES)
            series[split] = np.array([(rows[i].epoch, rows[i].loss) for i in picked]).T
    if not series:
        return None
    losses = np.concatenate([losses for _, losses in series.values()])
    logarithmic = 0 < losses.min() < losses.max() / _LOG_RATIO
    subtitle = "mean loss per row, without penalty" + (" · logarithmic scale" if logarithmic else "")
    figure, (axes,) = style.new_figure("Loss over epochs", subtitle)
    for split, (epochs, values) in series.items():
        name, color = splits[split]
        few = len(epochs) < 30
        axes.plot(
            epochs,
            values,
            color=color,
            linewidth=2.2,
            linestyle="-" if len(epochs) > 1 else "none",
            marker="o" if few else None,
            markersize=7,
            markeredgecolor="white",
            label=f"{name}, last {style.number(values[-1], padded=True)}",
        )
    if logarithmic:
        axes.set_yscale("log")
        style.plain_log_ticks(axes)
    style.count_axis(axes)
    style.label(axes, "epoch", "loss")
    style.legend(axes)
    return figure


def path_figure(
    path: ParameterPath, truth: Line | None, optimum: Line | None, features: Sequence[str]
) -> style.Figure | None:
    """Weights and bias over epochs, against truth and optimum where these are known."""
    picked = thinned(len(path.epochs), _MOST_VERTICES)
    if not len(picked):
        return None
    epochs, values = path.epochs[picked], path.values[picked]
    d = len(features)
    shown = np.sort(np.argsort(-np.abs(values[-1, :d]), kind="stable")[:MOST_PARAMETERS])
    notes = ["dashed: truth"] * bool(truth) + ["diamond: least-squares optimum"] * bool(optimum)
    notes += [f"{len(shown)} largest of {d:,} weights"] * (len(shown) < d)
    heights = (1.0 + 0.35 * (len(shown) - 1), 1.0)
    figure, (above, below) = style.new_figure("Parameters over epochs", " · ".join(notes), row_heights=heights)
    for place, column in enumerate(shown.tolist()):
        name = "W" if d == 1 else style.plain(features[column], longest=20)
        known = [None if line is None else float(line.weights[column]) for line in (truth, optimum)]
        _draw_path(above, epochs, values[:, column], known, name, style.SERIES[place])
    known = [None if line is None else line.bias for line in (truth, optimum)]
    _draw_path(below, epochs, values[:, d], known, "b", style.INK)
    style.label(above, y="weight W" if d == 1 else "weights W")
    style.label(below, x="epoch", y="bias b")
    style.count_axis(below)
    style.legend(above, beside=True)
    style.legend(below, beside=True)
    return figure


def _draw_path(
    axes: style.Axes, epochs: np.ndarray, values: np.ndarray, known: Sequence[float | None], name: str, color: str
) -> None:
    truth, optimum = known
    axes.plot(epochs, values, color=color, linewidth=2.2, label=f"{name} = {style.number(values[-1], padded=True)}")
    if truth is not None:
        axes.axhline(truth, color=color, alpha=0.6, linewidth=1.4, dashes=(4, 3), zorder=1.5)
    if optimum is not None:
        diamond = axes.plot(epochs[-1:], [optimum], "D", markersize=7, clip_on=False, zorder=3)
        diamond[0].set(markerfacecolor="white", markeredgecolor=color, markeredgewidth=1.6)


def draw(directory: Path, result: TrainResult, *, source: Source, path: Sequence[tuple[int, np.ndarray]]) -> list[Path]:
    """Draws a run's figures; see `draw_all`.

    Args:
        directory: where the files go.
        result: the run's result.
        source: the rows; a few thousand of each split are drawn.
        path: `(epoch, parameters)` over time.

    Raises:
        StorageError: if a file cannot be written.
    """
    linear = len(result.weights) > 0
    return draw_all(
        directory,
        train=_sample(source, "train"),
        test=_sample(source, "test"),
        history=result.history,
        fitted=_fitted(result) if linear else None,
        truth=Line(weights=np.array(result.truth[0]), bias=result.truth[1]) if result.truth else None,
        optimum=_optimum(result),
        path=_path(result, path) if linear and path else None,
        feature_names=source.feature_names,
        target_name=source.target_name,
    )


def _fitted(result: TrainResult) -> Line:
    return Line(weights=result.weights, bias=result.bias, center=result.center, bias_at_center=result.bias_at_center)


def _optimum(result: TrainResult) -> Line | None:
    fit = result.statistics.fit if result.statistics else None
    if fit is None or fit.weights is None or fit.bias is None:
        return None
    return Line(weights=fit.weights, bias=fit.bias)


def _path(result: TrainResult, path: Sequence[tuple[int, np.ndarray]]) -> ParameterPath:
    """The path of a linear model and its end: the points kept are those at logged epochs, before their updates."""
    d = len(result.weights)
    before = [(epoch, theta) for epoch, theta in path if epoch < result.epochs]
    steps = [*before, (result.epochs, result.parameters)]
    return ParameterPath(
        epochs=np.array([epoch for epoch, _ in steps]),
        values=np.array([np.append(theta[:d], theta[d] if len(theta) > d else 0.0) for _, theta in steps]),
    )


def _sample(source: Source, split: str) -> Points:
    """At most a few thousand rows of a split, evenly spread, always the same ones."""
    total = source.num_rows(split)
    if total == 0:
        return Points(x=np.zeros([0, source.num_features]), y=np.zeros(0))
    count = min(total, _MOST_ROWS)
    # Python's integers: the product overflows int64 for the largest splits.
    indices = (np.arange(count, dtype=object) * total // count).astype(np.int64)
    x, y, _ = row_arrays(source, split, indices)
    return Points(x=x, y=y, total=total)
