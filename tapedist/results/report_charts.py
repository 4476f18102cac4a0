"""The four figures of the report: loss, fit, residuals, normal quantiles.

They are SVG text: crisp at any size, coloured by the page's style sheet, so that dark mode and print work. The classes
of the marks (`train`, `test`, `line`, `rule`, ...) are styled in `report_template.html`.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from tapedist.text import printable
from tapedist.training.interfaces import Row

_WIDTH, _HEIGHT = 480, 320
_TOP, _RIGHT, _BOTTOM = 12, 14, 46
_CHARACTER = 10.0  # Width of a tick label's character, at its size on a phone, in a wide font.
_DOTS_PER_PATH = 25
_LARGEST = 1e300  # Beyond, the difference of two numbers may overflow.
_MOST_DOTS = 1500
_MOST_VERTICES = 500
_MOST_QUANTILES = 400
_LOG_RATIO = 10.0
NO_ROWS = "No rows were held out."


def sampled(count: int, most: int) -> np.ndarray:
    """Up to `most` of `count` indices, drawn at random from a fixed seed, in ascending order."""
    if count <= most:
        return np.arange(count)
    # Seeded, so that the same rows give the same page.
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False, shuffle=False))


def thinned(count: int, most: int) -> np.ndarray:
    """Up to `most` of `count` indices, evenly spaced, with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)) if count else np.arange(0)


def caption(drawn: int, total: int) -> str:
    """The number of rows shown, as in `showing 5,000 of 8,000,000 rows`."""
    return f"{drawn:,} rows" if drawn == total else f"showing {drawn:,} of {total:,} rows"


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at a step of 1, 2 or 5 times a power of ten; roughly `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.85)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, min(last, first + 50) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, with 2 and 5 times them over few decades; at most about 6."""
    decades = math.log10(high) - math.log10(low)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, round(decades / 6))
    factors = (1, 2, 5) if decades <= 2.3 else (1,)
    found = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    return [value for value in found if low <= value <= high]


def _tick_text(value: float) -> str:
    if value == 0:
        return "0"
    text = f"{value:,.10g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.6g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _fitting_ticks(low: float, high: float, width: float) -> list[float]:
    """As many ticks as there is room for labels."""
    for about in (6, 4, 2):
        found = ticks(low, high, about)
        if sum(len(_tick_text(value)) + 2 for value in found) * _CHARACTER <= width:
            break
    return found


def _extent(parts: Sequence[np.ndarray], logarithmic: bool) -> tuple[float, float]:
    values = np.concatenate([np.ravel(part) for part in parts])
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if logarithmic:
        return (low / 1.15, high * 1.15)
    # At least as wide as differences that float64 can represent.
    pad = max(0.04 * (high - low), 1e-12 * max(abs(low), abs(high))) if high > low else max(abs(low), 1.0) * 0.5
    return low - pad, high + pad


class Chart:
    """Collects marks, then draws them on axes that hold them all.

    Args:
        x: label of the x axis.
        y: label of the y axis.
        log_y: whether the y axis is logarithmic; then every y must be above 0.
    """

    def __init__(self, x: str, y: str, *, log_y: bool = False):
        self._labels = x, y
        self._log = log_y
        self._marks: list[tuple[str, str, np.ndarray, np.ndarray]] = []

    def _add(self, kind: str, style: str, x: np.ndarray, y: np.ndarray) -> None:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        usable = (np.abs(x) < _LARGEST) & (np.abs(y) < _LARGEST)  # False for NaN, too.
        if usable.any():
            self._marks.append((kind, style, x[usable], y[usable]))

    def dots(self, style: str, x: np.ndarray, y: np.ndarray) -> None:
        """Points; those that are not finite are left out."""
        self._add("dots", style, x, y)

    def line(self, style: str, x: np.ndarray, y: np.ndarray) -> None:
        """A line through points."""
        self._add("line", style, x, y)

    def render(self, title: str) -> str:
        """The `svg` element; `title` is for screen readers."""
        x_low, x_high = _extent([x for _, _, x, _ in self._marks] or [np.zeros(0)], False)
        y_low, y_high = _extent([y for _, _, _, y in self._marks] or [np.ones(1)], self._log)
        y_ticks = log_ticks(y_low, y_high) if self._log else ticks(y_low, y_high)
        left = 34 + _CHARACTER * max((len(_tick_text(value)) for value in y_ticks), default=1)
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        x_ticks = _fitting_ticks(x_low, x_high, right - left)

        def x_at(x: np.ndarray | float) -> np.ndarray:
            return left + (np.asarray(x) - x_low) / (x_high - x_low) * (right - left)

        def y_at(y: np.ndarray | float) -> np.ndarray:
            low, high, y = (math.log(y_low), math.log(y_high), np.log(y)) if self._log else (y_low, y_high, y)
            return bottom - (np.asarray(y) - low) / (high - low) * (bottom - _TOP)

        parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{html.escape(title)}</title>']
        for value in y_ticks:
            y = float(y_at(value))
            parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right}"/>')
            parts.append(f'<text class="tick y" x="{left - 8:.1f}" y="{y + 4:.1f}">{_tick_text(value)}</text>')
        for value in x_ticks:
            x = float(x_at(value))
            parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>')
            parts.append(f'<text class="tick x" x="{x:.1f}" y="{bottom + 18}">{_tick_text(value)}</text>')
        for kind, style, x_values, y_values in self._marks:
            points = np.round(np.stack([x_at(x_values), y_at(y_values)], axis=1), 1).tolist()
            # Dots of one path do not add up where they overlap; several paths make dense places darker.
            length = _DOTS_PER_PATH if kind == "dots" else len(points)
            for start in range(0, len(points), length):
                parts.append(f'<path class="{kind} {style}" d="{_path(kind, points[start : start + length])}"/>')
        x_label, y_label = (html.escape(label) for label in self._labels)
        middle = (_TOP + bottom) / 2
        parts.append(f'<text class="label" x="{(left + right) / 2:.1f}" y="{_HEIGHT - 8}">{x_label}</text>')
        parts.append(f'<text class="label" transform="translate(13 {middle}) rotate(-90)">{y_label}</text></svg>')
        return "".join(parts)


def _path(kind: str, points: list[list[float]]) -> str:
    if kind == "dots":  # A line of no length with round caps is a dot, in a third of a circle's bytes.
        return "".join(f"M{x:g} {y:g}h0" for x, y in points)
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
    """Rows and their predictions.

    Attributes:
        actual: targets, `[k]`.
        predicted: predictions, `[k]`.
        x: the feature, `[k]` or `[k, 1]`, if there is just one; then the fit is drawn over it.
        weights: of the rows, positive, `[k]`; None if they are equal.
        split: the split of the rows.
        total: the number of rows that these are a sample of; `k` by default.
        feature_name: name of the one feature.
        target_name: name of the target.
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
    """`value` as HTML text, also for attributes; control characters are escaped."""
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
    """Residuals over predictions; a pattern is a sign of a wrong model."""
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

    The i-th of k sorted residuals is drawn over the quantile of (i - 1/2) / k (Hazen).
    """
    title = "Normal Q-Q plot"
    if rows is None or not len(rows.actual):
        return _missing("quantiles", title, missing)
    # A row of weight w is a mean of w rows, whose residual has a smaller deviation: scaled, all have the same one.
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
    """Ranks to draw: both tails whole, because deviations show there, and the middle thinned."""
    tail = min(count, _MOST_QUANTILES // 4)
    middle = thinned(count, _MOST_QUANTILES // 2)
    return np.unique(np.concatenate([np.arange(tail), middle, np.arange(count - tail, count)]))
