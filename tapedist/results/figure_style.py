"""The style of all figures, set on each object, so that no global state of matplotlib is touched.

Colours are from the palette of Okabe and Ito ("Color Universal Design", 2008), which the colour-blind can distinguish.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from tapedist.storage.files import replacing
from tapedist.text import number as number
from tapedist.text import printable

TRAIN, TEST, TRUTH = "#0072B2", "#D55E00", "#009E73"
INK, QUIET, GRID = "#1F2328", "#6A737D", "#E4E7EB"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")

_WIDTH, _HEIGHT, _DPI = 8.0, 5.0, 144
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.85, 0.25, 0.62, 0.98  # Margins in inches; left and right are minimums.
_EDGE = 0.12  # Inches kept free at the left and right edges.
_LONGEST_NAME = 32


def plain(name: str, longest: int = _LONGEST_NAME) -> str:
    """A user's name as matplotlib text: no math, no control characters, not too long."""
    text = printable(name, longest).replace("$", r"\$")
    return " " + text if text.startswith("_") else text  # Legends leave out what starts with an underscore.


def new_figure(
    title: str,
    subtitle: str = "",
    *,
    columns: int = 1,
    row_heights: Sequence[float] = (1,),
) -> tuple[Figure, list[Axes]]:
    """A figure with a title at its top left and a grid of axes, row by row.

    Args:
        title: the title.
        subtitle: further facts, such as how many rows are drawn.
        columns: columns of axes; they share their y axis.
        row_heights: relative heights of the rows of axes; they share their x axis.
    """
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=_LEFT / _WIDTH,
        right=1 - _RIGHT / _WIDTH,
        bottom=_BOTTOM / _HEIGHT,
        top=1 - _TOP / _HEIGHT,
        wspace=0.08,
        hspace=0.14,
    )
    rows, grid = len(row_heights), {"height_ratios": list(row_heights)}
    axes = figure.subplots(rows, columns, squeeze=False, sharex=rows > 1, sharey=columns > 1, gridspec_kw=grid)
    left = _LEFT / _WIDTH
    figure.text(left, 1 - 0.3 / _HEIGHT, title, fontsize=15, fontweight="bold", color=INK, va="center")
    figure.text(left, 1 - 0.62 / _HEIGHT, subtitle, fontsize=10.5, color=QUIET, va="center")
    for one in axes.flat:
        _quiet(one)
    return figure, list(axes.flat)


def _quiet(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=10, length=0, pad=6)
    axes.margins(0.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_Grouped())


class _Grouped(ScalarFormatter):
    """Ticks with thousands separators, as in `450,000`."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        text = super().__call__(value, pos)
        whole, point, decimals = text.partition(".")
        digits = whole.lstrip("-\N{MINUS SIGN}+")
        if not (digits.isdecimal() and len(digits) > 3):
            return text
        return f"{whole.removesuffix(digits)}{int(digits):,}{point}{decimals}"


def label(axes: Axes, x: str = "", y: str = "") -> None:
    """Names the axes, where given."""
    if x:
        axes.set_xlabel(x, fontsize=11, color=INK, labelpad=6)
    if y:
        axes.set_ylabel(y, fontsize=11, color=INK, labelpad=8)


def count_axis(axes: Axes) -> None:
    """Whole numbers on the x axis, with thousands separators."""
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def legend(axes: Axes, where: str = "best", beside: bool = False) -> None:
    """A legend on a light background, so that it can be read over points; or one `beside` the axes."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.04), "handlelength": 1.6} if beside else {"loc": where}
    shown = axes.legend(fontsize=10 if beside else 10.5, framealpha=0.92, edgecolor="none", labelcolor=INK, **place)
    shown.set_in_layout(beside)  # One within the axes needs no margin, and to find its place takes long.
    for handle in shown.legend_handles:
        if isinstance(handle, Line2D) and handle.get_marker() == "o":
            handle.set_alpha(1)


def dots(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, name: str = "") -> None:
    """Points, fainter and smaller the more there are."""
    crowd = min(1.0, (len(x) / 5000) ** 0.5)
    style = {"markersize": 5.5 - 2.7 * crowd, "alpha": 0.75 - 0.4 * crowd, "markeredgewidth": 0}
    axes.plot(x, y, "o", color=color, label=name or "_", **style)


def fit_margins(figure: Figure) -> None:
    """Widens the margins to fit long tick labels at the left and a legend at the right."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    inner = [axes.get_window_extent(renderer) for axes in figure.axes]
    outer = [axes.get_tightbbox(renderer) or box for axes, box in zip(figure.axes, inner, strict=True)]
    left = min(box.x0 for box in inner) - min(box.x0 for box in outer)
    right = max(box.x1 for box in outer) - max(box.x1 for box in inner)
    left, right = (max(least, found / _DPI + _EDGE) for least, found in ((_LEFT, left), (_RIGHT, right)))
    figure.subplots_adjust(left=left / _WIDTH, right=1 - right / _WIDTH)
    widest = max(text.get_window_extent(renderer).width for text in figure.texts) / _DPI
    for text in figure.texts:
        text.set_x(min(left, _WIDTH - _EDGE - widest) / _WIDTH)


def save(figure: Figure, path: Path) -> Path:
    """Draws `figure` into a PNG file; an older one is replaced in one step.

    Raises:
        StorageError: if the file cannot be written.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A column's name may be in a script that the built-in font lacks; boxes are drawn then, without a warning.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        fit_margins(figure)
        figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 2})
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path


def plain_log_ticks(axes: Axes) -> None:
    """A logarithmic y axis labelled `1, 2, 5, 10, ...` when it spans few decades, else by powers of ten."""
    low, high = np.log10(axes.get_ylim())
    if high - low < 4:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 2.5 else (1,)))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.10g}" if value < 1e7 else f"{value:g}")
        )
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
