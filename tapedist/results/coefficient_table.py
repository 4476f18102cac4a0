"""The regression's result as plain text for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

from tapedist.regression.inference import Coefficient
from tapedist.regression.least_squares import LeastSquares, display
from tapedist.regression.summary import AGREES_WITHIN, Distance

_SHOWN_COEFFICIENTS = 20
_SHOWN_REASONS = 8
_SHORTEST_NAME = 12
_FACTS_WIDTH = 100  # Of lines of short facts in a file, which has no width.


def format_table(
    fit: LeastSquares,
    learned: Distance | None = None,
    truth: Sequence[float | None] | None = None,
    *,
    parameters: Sequence[float] | None = None,
    mae: float | None = None,
    width: int | None = None,
) -> str:
    """The result as aligned plain text, without a final newline.

    Args:
        fit: the optimum.
        learned: the trained parameters' distance to it, for a column of its own and a closing sentence.
        truth: the result of `truth_errors`, for a column of its own.
        parameters: the trained parameters `[P]`; where they agree with the optimum, one column shows both.
        mae: the trained parameters' mean absolute error.
        width: columns of the terminal (at least 80 are needed); None for a file, where nothing is wrapped or left out.
    """
    rows = "1 row" if fit.num_rows == 1 else f"{fit.num_rows} rows"
    heading = [f"Least squares: {rows}", f"{fit.degrees_of_freedom} residual degrees of freedom"]
    if parameters is not None and learned is not None and learned.agrees:
        heading.append(f"learned is the least-squares optimum to within {AGREES_WITHIN:g} standard errors")
    lines = [*_wrapped(heading, width or math.inf, separator=", ")]
    lines += _coefficient_lines(fit, learned, truth, parameters, width)
    lines += _aliased_lines(fit, width)
    lines += _wrapped(_quality(fit), width or _FACTS_WIDTH, indent="  ", separator=" | ")
    if learned is not None:
        lines += _wrapped(_closing(learned, mae), width or math.inf, separator=", ")
    return "\n".join(lines)


def _closing(learned: Distance, mae: float | None) -> list[str]:
    """The parts of the closing sentence."""
    if learned.loss is None or learned.excess_loss is None:
        return ["Learned parameters: not finite, or their loss is not"]
    side = "below" if learned.excess_loss < 0 else "above"
    parts = [f"Learned parameters: loss {learned.loss:.6g} ({abs(learned.excess_loss):.3g} {side} the optimum)"]
    if mae is not None:
        parts.append(f"MAE {mae:.6g}")
    if learned.max_standard_errors is not None:
        parts.append(f"at most {learned.max_standard_errors:.3g} SE away")
    return parts


def _coefficient_lines(
    fit: LeastSquares,
    learned: Distance | None,
    truth: Sequence[float | None] | None,
    parameters: Sequence[float] | None,
    width: int | None,
) -> Iterator[str]:
    shown_ones = fit.coefficients[:_SHOWN_COEFFICIENTS]
    columns = [("", [display(c.name) for c in shown_ones])]
    heads = ("optimum", "std error", "t", "p", f"{100 * fit.level:g} % interval")
    columns += [
        (head, list(cells)) for head, cells in zip(heads, zip(*map(_cells, shown_ones), strict=True), strict=True)
    ]
    agrees = learned is not None and learned.agrees
    if parameters is not None:
        values = [_number(value, c) for value, c in zip(parameters, shown_ones, strict=False)]
        columns[1 : 2 if agrees else 1] = [("learned", values)]
    for head, gaps in (
        ("off by", None if learned is None or (agrees and parameters is not None) else learned.standard_errors),
        ("truth off by", truth),
    ):
        if gaps is not None:
            columns.append((head, ["" if gap is None else f"{gap:.2g} SE" for gap in gaps[:_SHOWN_COEFFICIENTS]]))
    columns = columns[:1] + [column for column in columns[1:] if any(column[1])]
    yield from _aligned(columns, width or math.inf, spare=[heads[2], heads[4]])
    hidden = len(fit.coefficients) - _SHOWN_COEFFICIENTS
    if hidden > 0:
        yield f"  ... and {hidden} more"


def _aliased_lines(fit: LeastSquares, width: int | None) -> list[str]:
    """The lines about aliased features and the reasons."""
    if not fit.aliased:
        return []
    reasons = fit.left_out()
    text = f"Left out, with weight 0: {'; '.join(reasons[:_SHOWN_REASONS])}"
    if len(reasons) > _SHOWN_REASONS:
        text += f"; and {len(reasons) - _SHOWN_REASONS} more"
    return textwrap.wrap(text, width or 10**9, initial_indent="  ", subsequent_indent="  ")


def _aligned(columns: list[tuple[str, list[str]]], width: float, spare: list[str]) -> Iterator[str]:
    """Lines of a table. If it is too wide, its first column is narrowed, then the columns in `spare` are left out."""
    widths = [max(len(cell) for cell in (head, *cells)) for head, cells in columns]
    room = width - sum(widths[1:]) - 2 * len(widths)
    if room < min(widths[0], _SHORTEST_NAME) and spare:
        kept = [column for column in columns if column[0] != spare[0]]
        yield from _aligned(kept, width, spare[1:])
        return
    widths[0] = int(min(widths[0], max(room, _SHORTEST_NAME)))
    for row in zip(*([head, *cells] for head, cells in columns), strict=True):
        name = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 3] + "..."
        numbers = (cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        yield "  ".join([f"  {name.ljust(widths[0])}", *numbers])


def _cells(entry: Coefficient) -> tuple[str, str, str, str, str]:
    interval = ""
    if entry.low is not None and entry.high is not None:
        interval = f"[{_number(entry.low, entry)}, {_number(entry.high, entry)}]"
    t = "" if entry.t is None else f"{entry.t:.4g}"
    p = "" if entry.p is None else "<1e-300" if entry.p < 1e-300 else f"{entry.p:.3g}"
    error = "" if entry.standard_error is None else _number(entry.standard_error, entry)
    return _number(entry.optimum, entry), error, t, p, interval


def _number(value: float, entry: Coefficient) -> str:
    """Digits down to the third of the standard error; exponents only for very small or large numbers."""
    if not entry.standard_error:
        return f"{value:.8g}"
    # Further digits are below the error of the estimate, and differ from sample to sample.
    decimals = max(0, 2 - math.floor(math.log10(entry.standard_error)))
    if decimals <= 9 and max(abs(entry.optimum), abs(value), entry.standard_error) < 1e9:
        return f"{value:.{decimals}f}"
    return f"{value:.{min(16, max(3, _order(entry.optimum) - _order(entry.standard_error) + 3))}g}"


def _order(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else -400


def _quality(fit: LeastSquares) -> list[str]:
    parts = [
        *_r2(fit),
        ("adjusted R2", fit.adjusted_r2),
        ("residual std", fit.residual_std),
        ("RMSE", fit.rmse),
        ("loss", fit.loss),
        ("condition number", fit.condition_number),
    ]
    return [f"{name} {'undefined' if value is None else format(value, '.6g')}" for name, value in parts]


def _r2(fit: LeastSquares) -> list[tuple[str, float | None]]:
    if fit.fit_intercept:
        return [("R2", fit.r2)]
    # Without an intercept there are two of them, and other programs report either as R2.
    return [("R2 about 0", fit.r2), ("R2 about the mean", fit.r2_about_mean)]


def _wrapped(parts: list[str], width: float, *, separator: str, indent: str = "") -> Iterator[str]:
    """Joins parts to lines; a part is never broken."""
    line = indent + parts[0]
    for part in parts[1:]:
        if len(line) + len(separator) + len(part) > width:
            yield line + separator.rstrip(" |")
            line = "  " + part
        else:
            line += separator + part
    yield line
