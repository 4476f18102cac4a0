"""How good the learned parameters are: their distance to the optimum and to the truth, and the table that says so."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tapedist.results.extended import Extended
from tapedist.results.extended_moments import Rows
from tapedist.results.inference import Coefficient
from tapedist.results.least_squares import LeastSquares, from_moments, least_squares, shown

__all__ = [
    "Distance",
    "LeastSquares",
    "ResidualMetrics",
    "as_dict",
    "distance",
    "format_table",
    "from_moments",
    "least_squares",
    "residual_metrics",
    "truth_errors",
]

_SHOWN_COEFFICIENTS = 20
_SHORTEST_NAME = 12


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far given parameters are from the optimum.

    Attributes:
        loss: data loss at the parameters, without penalty; None if it is not finite.
        excess_loss: how much of it is above the optimum's; None likewise.
        standard_errors: per parameter (weights, then the intercept if there is one) `|given - optimum|` in standard
            errors; None where that is undefined.
        max_standard_errors: the largest of them; None if one is undefined or the optimum is not unique.
    """

    loss: float | None
    excess_loss: float | None
    standard_errors: tuple[float | None, ...]
    max_standard_errors: float | None


def distance(fit: LeastSquares, weights: np.ndarray, bias: float = 0.0) -> Distance:
    """Distance of `weights [d]` and `bias`, float64 in raw units, to the optimum of `fit`.

    The differences are taken in extended precision, so that they mean something below one rounding of the parameters.
    """
    with np.errstate(all="ignore"):
        excess = fit.excess_loss(weights, bias)
        gaps = (Extended.of(weights) - fit.form.weights).hi.tolist()
        if fit.fit_intercept:
            gaps.append(float((Extended.of(bias) - fit.form.bias).hi))
    # Without coefficients there is nothing to count in, whatever the parameters.
    ratios = tuple(_ratio(abs(gap), c.standard_error) for gap, c in zip(gaps, fit.coefficients, strict=False))
    defined = [r for r in ratios if r is not None]
    largest = max(defined) if defined and len(defined) == len(ratios) else None
    if not math.isfinite(fit.loss + excess):
        return Distance(None, None, ratios, largest)
    return Distance(fit.loss + excess, excess, ratios, largest)


def truth_errors(fit: LeastSquares, weights: np.ndarray, bias: float = 0.0) -> tuple[float | None, ...]:
    """`(optimum - truth) / standard error` per parameter, for data whose true `weights [d]` and `bias` are known.

    About 95 % of them lie within 2 of zero. None where undefined; empty if the optimum is not unique.
    """
    truth = [*np.asarray(weights, np.float64).tolist(), float(bias)]
    return tuple(_ratio(c.estimate - t, c.standard_error) for c, t in zip(fit.coefficients, truth, strict=False))


def _ratio(gap: float, standard_error: float | None) -> float | None:
    if standard_error is None:
        return None
    if standard_error == 0:
        return 0.0 if gap == 0 else None
    ratio = gap / standard_error
    return ratio if math.isfinite(ratio) else None


@dataclasses.dataclass(frozen=True)
class ResidualMetrics:
    """Errors of given parameters over rows, weighted.

    Attributes:
        num_rows: rows of positive weight.
        sum_weights: sum of the weights.
        loss: mean squared error.
        rmse: its square root.
        mae: mean absolute error.
    """

    num_rows: int
    sum_weights: float
    loss: float
    rmse: float
    mae: float


def residual_metrics(blocks: Iterable[Rows], weights: np.ndarray, bias: float = 0.0) -> ResidualMetrics | None:
    """One pass over `blocks` of rows (as `least_squares` takes them) at `weights [d]` and `bias`; None without rows."""
    sums, count = Extended.zeros(3), 0
    for x, y, w in blocks:
        used = np.ones(len(y)) if w is None else np.asarray(w, np.float64)
        x, y, used = x[used > 0], y[used > 0], used[used > 0]
        residuals = np.abs(np.asarray(y, np.float64) - (np.asarray(x, np.float64) @ weights + bias))
        sums = sums + np.array([used.sum(), used @ residuals**2, used @ residuals])
        count += len(y)
    total, squares, absolute = sums.hi.tolist()
    if not count:
        return None
    return ResidualMetrics(count, total, squares / total, math.sqrt(squares / total), absolute / total)


def as_dict(fit: LeastSquares) -> dict[str, Any]:
    """The result as plain JSON values: undefined ones are None, nothing is NaN or infinite."""
    skipped = ("form", "weights", "coefficients", "names")
    fields = {f.name: getattr(fit, f.name) for f in dataclasses.fields(fit) if f.name not in skipped}
    values = {
        **fields,
        "names": list(fit.names),
        "weights": None if fit.weights is None else fit.weights.tolist(),
        "coefficients": [dataclasses.asdict(c) for c in fit.coefficients],
    }
    return _finite(values)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_table(fit: LeastSquares, learned: Distance | None = None, *, width: int = 100) -> str:
    """The result as aligned plain text of at most `width` columns (at least 80), without a final newline.

    Args:
        fit: the optimum.
        learned: the trained parameters' distance to it, for a column of its own and a closing sentence.
        width: columns of the terminal.
    """
    counts = f"{fit.num_rows} rows, {fit.degrees_of_freedom} residual degrees of freedom"
    lines = [f"Least squares: {counts}"]
    if fit.problem is not None:
        lines += textwrap.wrap(f"No coefficient table: {fit.problem}.", width)
    else:
        lines += _coefficient_lines(fit, learned, width)
    lines += _wrapped(_quality(fit), width)
    if learned is not None:
        lines += textwrap.wrap(_closing(learned), width)
    return "\n".join(lines)


def _closing(learned: Distance) -> str:
    if learned.loss is None or learned.excess_loss is None:
        return "Learned parameters: not finite, or their loss is not"
    sentence = f"Learned parameters: loss {learned.loss:.6g}, {learned.excess_loss:.3g} above the optimum"
    if learned.max_standard_errors is not None:
        sentence += f", at most {learned.max_standard_errors:.3g} standard errors from it"
    return sentence


def _coefficient_lines(fit: LeastSquares, learned: Distance | None, width: int) -> Iterator[str]:
    columns = [("", [shown(c.name) for c in fit.coefficients[:_SHOWN_COEFFICIENTS]])]
    cells = [_cells(c) for c in fit.coefficients[:_SHOWN_COEFFICIENTS]]
    heads = ("estimate", "std error", "t", "p", f"{100 * fit.level:g} % interval")
    columns += [(head, list(column)) for head, column in zip(heads, zip(*cells, strict=True), strict=True)]
    if learned is not None:
        gaps = learned.standard_errors[:_SHOWN_COEFFICIENTS]
        columns.append(("learned off by", ["" if gap is None else f"{gap:.2g} SE" for gap in gaps]))
    yield from _aligned(columns, width, spare=[heads[2], heads[4]])
    hidden = len(fit.coefficients) - _SHOWN_COEFFICIENTS
    if hidden > 0:
        yield f"  ... and {hidden} more"


def _aligned(columns: list[tuple[str, list[str]]], width: int, spare: list[str]) -> Iterator[str]:
    """Lines of a table. Where it is too wide, its first column gives way, then the columns named in `spare`."""
    widths = [max(len(cell) for cell in (head, *cells)) for head, cells in columns]
    room = width - sum(widths[1:]) - 2 * len(widths)
    if room < min(widths[0], _SHORTEST_NAME) and spare:
        kept = [column for column in columns if column[0] != spare[0]]
        yield from _aligned(kept, width, spare[1:])
        return
    widths[0] = min(widths[0], max(room, _SHORTEST_NAME))
    for row in zip(*([head, *cells] for head, cells in columns), strict=True):
        name = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 3] + "..."
        numbers = (cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        yield "  ".join([f"  {name.ljust(widths[0])}", *numbers])


def _cells(entry: Coefficient) -> tuple[str, str, str, str, str]:
    form = _number_format(entry)
    interval = "" if entry.low is None else f"[{entry.low:{form}}, {entry.high:{form}}]"
    t = "" if entry.t is None else f"{entry.t:.4g}"
    p = "" if entry.p is None else "<1e-300" if entry.p < 1e-300 else f"{entry.p:.3g}"
    error = "" if entry.standard_error is None else f"{entry.standard_error:{form}}"
    return f"{entry.estimate:{form}}", error, t, p, interval


def _number_format(entry: Coefficient) -> str:
    """Digits down to the third of the standard error; exponents only for very small or large numbers."""
    if not entry.standard_error:
        return ".8g"
    decimals = max(0, 2 - math.floor(math.log10(entry.standard_error)))
    if decimals <= 9 and max(abs(entry.estimate), entry.standard_error) < 1e9:
        return f".{decimals}f"
    return f".{min(16, max(3, _order(entry.estimate) - _order(entry.standard_error) + 3))}g"


def _order(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else -400


def _quality(fit: LeastSquares) -> list[str]:
    parts = [
        ("R2", fit.r2),
        ("adjusted R2", fit.adjusted_r2),
        ("residual std", fit.residual_std),
        ("RMSE", fit.rmse),
        ("loss", fit.loss),
        ("condition number", fit.condition_number),
    ]
    return [f"{name} {'undefined' if value is None else format(value, '.6g')}" for name, value in parts]


def _wrapped(parts: list[str], width: int) -> Iterator[str]:
    line = "  " + parts[0]
    for part in parts[1:]:
        if len(line) + 3 + len(part) > width:
            yield line
            line = "  " + part
        else:
            line += " | " + part
    yield line
