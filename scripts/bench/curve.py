"""Rows per second against `n_samples`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from comparison import Row
from measure import Summary

mpl.use("Agg")
import matplotlib.pyplot as plt

_COLORS = ("#2a6fbb", "#c0562b", "#3d8c55", "#7d5ba6")
_MARKERS = "osD^"


def draw(rows: Sequence[tuple[Row, Mapping[str, Summary]]], path: pathlib.Path) -> None:
    """One line per engine, with the quartiles of its rounds as bars; saved to `path`."""
    names = list(dict.fromkeys(name for _, found in rows for name in found))
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for name, color, marker in zip(names, _COLORS, _MARKERS, strict=False):
        points = [(row.work, found[name]) for row, found in rows if name in found]
        rates = [one.rate for _, one in points]
        low = [one.rate - one.work / one.quartiles[2] for _, one in points]
        high = [one.work / one.quartiles[0] - one.rate for _, one in points]
        axes.errorbar(
            [n for n, _ in points], rates, yerr=[low, high], color=color, marker=marker, markersize=5, linewidth=1.6,
            capsize=2, label=name,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="n_samples", ylabel="rows per second")
    axes.set_title(
        "Rows visited per second, one feature (a pass of moments opens its input anew)", loc="left", fontsize=11
    )
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=144)
    plt.close(figure)
