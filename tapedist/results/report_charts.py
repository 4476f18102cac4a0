"""The four figures of the report: loss, fit, residuals, normal quantiles."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from tapedist.results.sampling import caption, sampled, thinned
from tapedist.results.svg import Chart
from tapedist.results.words import printable
from tapedist.training.interfaces import Row

_MOST_DOTS = 1500
_MOST_VERTICES = 500
_MOST_QUANTILES = 400
_LOG_RATIO = 10.0
NO_ROWS = "No rows were held out."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
    """Rows and what the model says about them.

    Attributes:
        actual: targets, `[k]`.
        predicted: predictions, `[k]`.
        x: the feature, `[k]` or `[k, 1]`, if there is just one; then the fit is drawn over it.
        weights: of the rows, positive, `[k]`; None if all weigh alike.
        split: which rows these are.
        total: rows that these stand for, if they are a sample; `k` by default.
        feature_name: name of the one feature.
        target_name: what is predicted.
    """

    actual: np.ndarray
    predicted: np.ndarray
    x: np.ndarray | None = None
    weights: np.ndarray | None = None
    split: str = "test"
    total: int | None = None
    feature_name: str = "x"
    target_name: str = "y"

    @property
    def residuals(self) -> np.ndarray:
        """Actual minus predicted, `[k]`."""
        return np.asarray(self.actual, np.float64) - np.asarray(self.predicted, np.float64)

    def caption(self, drawn: int) -> str:
        total = len(self.actual) if self.total is None else self.total
        return f"{text(self.split.capitalize())} split, {caption(drawn, total)}."


def text(value: str) -> str:
    """`value` as HTML text, also fit for an attribute; control characters are shown, not obeyed."""
    return html.escape(printable(value))


def _figure(name: str, title: str, content: str, below: str = "") -> str:
    under = f"<figcaption>{below}</figcaption>" if below else ""
    return f'<figure id="{name}"><h2>{title}</h2>{content}{under}</figure>'


def _missing(name: str, title: str, reason: str) -> str:
    return _figure(name, title, f'<p class="quiet">{reason}</p>')


def _key(style: str, words: str) -> str:
    return f'<span class="key {style}"></span>{words}'


def loss(history: Sequence[Row]) -> str:
    """Training and test loss over epochs."""
    series = {}
    for split in ("train", "test"):
        rows = [row for row in history if row.split == split and np.isfinite(row.loss)]
        if rows:
            picked = thinned(len(rows), _MOST_VERTICES)
            series[split] = np.array([(rows[i].epoch, rows[i].loss) for i in picked], np.float64).T
    if not series:
        return _missing("loss", "Loss over epochs", "No finite loss was recorded.")
    values = np.concatenate([losses for _, losses in series.values()])
    logarithmic = bool(0 < values.min() < values.max() / _LOG_RATIO)
    chart = Chart("epoch", "loss", log_y=logarithmic)
    words = []
    for split, (epochs, losses) in series.items():
        if len(epochs) > 1:
            chart.line(split, epochs, losses)
        else:
            chart.dots(f"{split} solid", epochs, losses)
        words.append(_key(split, f"{'training' if split == 'train' else 'test'}, last {losses[-1]:.6g}"))
    scale = " Logarithmic scale." if logarithmic else ""
    return _figure("loss", "Loss over epochs", chart.render("Loss over epochs"), f"{''.join(words)}.{scale}")


def fit(rows: Predictions | None, missing: str = NO_ROWS) -> str:
    """Targets over the one feature with the fitted line; of several features, predicted against actual."""
    if rows is None or not len(rows.actual):
        return _missing("fit", "Fit", missing)
    picked = sampled(len(rows.actual), _MOST_DOTS)
    actual, predicted = np.asarray(rows.actual)[picked], np.asarray(rows.predicted)[picked]
    target = printable(rows.target_name, 32)
    below = f"{_key('test', 'rows')} "
    if rows.x is not None:
        x = np.ravel(rows.x)[picked]
        chart = Chart(printable(rows.feature_name, 32), target)
        chart.dots("test", x, actual)
        order = np.argsort(x, kind="stable")[thinned(len(x), _MOST_VERTICES)]
        chart.line("model", x[order], predicted[order])
        return _figure(
            "fit", "Fit", chart.render("Fit"), f"{below}{_key('model', 'fitted')}. {rows.caption(len(picked))}"
        )
    chart = Chart(f"actual {target}", f"predicted {target}")
    chart.dots("test", actual, predicted)
    finite = np.concatenate([actual[np.isfinite(actual)], predicted[np.isfinite(predicted)]])
    ends = np.array([finite.min(), finite.max()]) if len(finite) else np.zeros(0)
    chart.line("model", ends, ends)
    title = "Predicted against actual"
    below += f"{_key('model', 'predicted = actual')}. {rows.caption(len(picked))}"
    return _figure("fit", title, chart.render(title), below)


def residuals(rows: Predictions | None, missing: str = NO_ROWS) -> str:
    """Residuals over predictions: a pattern means that the model misses something."""
    if rows is None or not len(rows.actual):
        return _missing("residuals", "Residuals", missing)
    picked = sampled(len(rows.actual), _MOST_DOTS)
    predicted, all_left = np.asarray(rows.predicted)[picked], rows.residuals
    chart = Chart(f"predicted {printable(rows.target_name, 32)}", "actual \N{MINUS SIGN} predicted")
    chart.dots("test", predicted, all_left[picked])
    finite = predicted[np.isfinite(predicted)]
    if len(finite):
        chart.line("rule", np.array([finite.min(), finite.max()]), np.zeros(2))
    known = all_left[np.isfinite(all_left)]
    spread = f"Mean {known.mean():.3g}, standard deviation {known.std():.4g}. " if len(known) else ""
    spread = spread.replace("-", "\N{MINUS SIGN}")
    return _figure("residuals", "Residuals", chart.render("Residuals"), spread + rows.caption(len(picked)))


def quantiles(rows: Predictions | None, missing: str = NO_ROWS) -> str:
    """Sorted residuals against the quantiles of a normal distribution (Q-Q plot).

    The i-th of k sorted residuals is held against the quantile of (i - 1/2) / k (Hazen).
    """
    title = "Normal Q-Q plot"
    if rows is None or not len(rows.actual):
        return _missing("quantiles", title, missing)
    # A row of weight w stands for a mean of w rows, whose residuals vary less: only so scaled are they alike.
    scaled = rows.residuals if rows.weights is None else rows.residuals * np.sqrt(rows.weights)
    left = np.sort(scaled[np.isfinite(scaled)])
    spread = left.std() if len(left) else 0.0
    if not spread > 0:
        return _missing("quantiles", title, "All residuals are equal, so there is nothing to compare.")
    picked = _quantile_places(len(left))
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / len(left)) for i in picked.tolist()])
    standard = (left[picked] - left.mean()) / spread
    chart = Chart("normal quantile", "residual in standard deviations")
    ends = np.array([normal[0], normal[-1]])
    chart.line("rule", ends, ends)
    chart.dots("test clear", normal, standard)
    of = "residuals" if rows.weights is None else "residuals, times the root of their weights,"
    below = f"Points on the dashed line: the {of} are normally distributed. "
    return _figure("quantiles", title, chart.render(title), below + rows.caption(len(picked)))


def _quantile_places(count: int) -> np.ndarray:
    """Ranks to draw: both tails whole, since they tell most, and the middle thinned."""
    tail = min(count, _MOST_QUANTILES // 4)
    middle = thinned(count, _MOST_QUANTILES // 2)
    return np.unique(np.concatenate([np.arange(tail), middle, np.arange(count - tail, count)]))
