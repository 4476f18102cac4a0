"""Small charts as SVG text: crisp at any size, coloured by the page's style sheet, so that dark mode and print work.

The classes of the marks (`train`, `test`, `line`, `rule`, ...) are styled in `report_template.html`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np

_WIDTH, _HEIGHT = 480, 320
_TOP, _RIGHT, _BOTTOM = 12, 14, 46
_CHARACTER = 10.0  # Width of a tick label's character, at its size on a phone, in a wide font.
_DOTS_PER_PATH = 25
_LARGEST = 1e300  # Beyond, the difference of two numbers may overflow.


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
    """As many ticks as have room for their labels side by side."""
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
    # Never narrower than float64 can tell apart.
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
        """The `svg` element; `title` is what a screen reader says."""
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
            # One path is painted once, however often it covers a spot; several let crowds look denser.
            length = _DOTS_PER_PATH if kind == "dots" else len(points)
            for start in range(0, len(points), length):
                parts.append(f'<path class="{kind} {style}" d="{_path(kind, points[start : start + length])}"/>')
        x_label, y_label = (html.escape(label) for label in self._labels)
        middle = (_TOP + bottom) / 2
        parts.append(f'<text class="label" x="{(left + right) / 2:.1f}" y="{_HEIGHT - 8}">{x_label}</text>')
        parts.append(f'<text class="label" transform="translate(13 {middle}) rotate(-90)">{y_label}</text></svg>')
        return "".join(parts)


def _path(kind: str, points: list[list[float]]) -> str:
    if kind == "dots":  # A line of no length with round caps is a dot, and takes a third of a circle's bytes.
        return "".join(f"M{x:g} {y:g}h0" for x, y in points)
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
