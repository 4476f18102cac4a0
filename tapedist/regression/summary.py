"""Statistics of a linear model: the least-squares optimum of the training rows, its standard errors, and the distance
of the learned parameters from it.

Legend: `n` training rows, `d` features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tapedist.config import TrainConfig
from tapedist.data.catalog import check_target
from tapedist.data.exact_arithmetic import folded
from tapedist.data.exact_moments import MOST_SLICES, ExactMoments, exact_moments
from tapedist.data.ranges import ranges
from tapedist.data.source import Ranges, RowArrays, Source, row_blocks, taken_as_float32
from tapedist.data.standardize import ColumnMoments, RawUnits, StandardUnits
from tapedist.data.standardize import check_squares as check_column_squares
from tapedist.regression.double_double import Extended
from tapedist.regression.least_squares import (
    FLOAT32_ROUNDING,
    FLOAT64_ROUNDING,
    LeastSquares,
    Moments,
    from_exact,
    from_moments,
    from_rough,
    least_squares,
)
from tapedist.regression.prediction import IntervalShape

__all__ = [
    "AGREES_WITHIN",
    "Distance",
    "LeastSquares",
    "ResidualMetrics",
    "as_dict",
    "distance",
    "from_moments",
    "least_squares",
    "residual_metrics",
    "truth_errors",
]


# Within so many standard errors, learned parameters and the optimum are shown in one column.
AGREES_WITHIN = 0.01
# About two seconds of arithmetic on one core.
_AFFORDABLE = 5e8
# With so few columns the pass takes about as long as opening the table and checking its cells, for any number of rows.
_FEW_COLUMNS = 16
# Operations on a number for the absolute errors, relative to one of the moments.
_LOOK = 8
_MOST_INTERVAL_NUMBERS = 1_000_000
_MOST_SURVEYED = 512  # Features.
_FEW_SLICES = 3  # Of long tables: 63 bits of the square of a column's largest number.


@dataclasses.dataclass(frozen=True)
class Distance:
    """The distance of given parameters from the optimum.

    Attributes:
        loss: data loss at the parameters, without penalty; None if it is not finite.
        excess_loss: its excess over the optimum's; None likewise.
        standard_errors: per parameter (weights, then the intercept if there is one) `|given - optimum|` in standard
            errors; None where that is undefined, as for aliased features.
        max_standard_errors: the largest of them; None if one is undefined. An aliased feature of weight 0 does not
            count; with any other weight its distance is undefined.
    """

    loss: float | None
    excess_loss: float | None
    standard_errors: tuple[float | None, ...]
    max_standard_errors: float | None

    @property
    def agrees(self) -> bool:
        """Returns whether the parameters are the optimum to within `AGREES_WITHIN`."""
        return self.max_standard_errors is not None and self.max_standard_errors <= AGREES_WITHIN


def distance(fit: LeastSquares, weights: np.ndarray, bias: float | Extended = 0.0) -> Distance:
    """Distance of `weights [d]` and `bias`, float64 in raw units, to the optimum of `fit`.

    Differences are in extended precision, because they may be below one rounding of the parameters.
    """
    with np.errstate(all="ignore"):  # Diverged parameters may overflow; the result has None then.
        excess = fit.excess_loss(weights, bias)
        gaps = (Extended.of(weights) - fit.form.weights).hi.tolist()
        if fit.fit_intercept:
            gaps.append(float((Extended.of(bias) - fit.form.bias).hi))
    ratios = tuple(_ratio(abs(gap), c.standard_error) for gap, c in zip(gaps, fit.coefficients, strict=True))
    left_out = {j for j in fit.aliased if gaps[j] == 0}
    counted = [ratio for j, ratio in enumerate(ratios) if j not in left_out]
    defined = [ratio for ratio in counted if ratio is not None]
    largest = max(defined) if defined and len(defined) == len(counted) else None
    if not math.isfinite(fit.loss + excess):
        return Distance(None, None, ratios, largest)
    return Distance(fit.loss + excess, excess, ratios, largest)


def truth_errors(fit: LeastSquares, weights: np.ndarray, bias: float = 0.0) -> tuple[float | None, ...]:
    """`(optimum - truth) / standard error` per parameter, for data whose true `weights [d]` and `bias` are known.

    About 95 % of them lie within 2 of zero. None where undefined.
    """
    truth = [*np.asarray(weights, np.float64).tolist(), float(bias)]
    return tuple(_ratio(c.optimum - t, c.standard_error) for c, t in zip(fit.coefficients, truth, strict=False))


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


def residual_metrics(
    blocks: Iterable[RowArrays], weights: np.ndarray, bias: float = 0.0, center: np.ndarray | float = 0.0
) -> ResidualMetrics | None:
    """One pass over `blocks` of rows (as `least_squares` takes them), predicted from `weights [d]` and the prediction
    `bias` at `center [d]`; None without rows.
    """
    sums, count, unit = Extended.zeros(3), 0, 0.0
    for x, y, w in blocks:
        used = np.ones(len(y)) if w is None else np.asarray(w, np.float64)
        x, y, used = x[used > 0], y[used > 0], used[used > 0]
        if not len(y):
            continue
        # Weights are divided by the largest power of two among them, so that neither their sum nor a product overflows.
        heaviest = float(np.ldexp(1.0, np.frexp(used.max())[1] - 1))
        if heaviest > unit:
            sums, unit = sums.scaled(unit / heaviest), heaviest
        used = used / unit
        residuals = np.abs(np.asarray(y, np.float64) - ((np.asarray(x, np.float64) - center) @ weights + bias))
        sums = sums + np.array([used.sum(), used @ residuals**2, used @ residuals])
        count += len(y)
    if not count:
        return None
    total, squares, absolute = sums.hi.tolist()
    return ResidualMetrics(count, total * unit, squares / total, math.sqrt(squares / total), absolute / total)


def as_dict(fit: LeastSquares) -> dict[str, Any]:
    """The result as plain JSON values: undefined ones are None, nothing is NaN or infinite."""
    skipped = ("form", "weights", "coefficients", "names", "aliased", "combinations")
    fields = {f.name: getattr(fit, f.name) for f in dataclasses.fields(fit) if f.name not in skipped}
    values = {
        **fields,
        "names": list(fit.names),
        "weights": fit.weights.tolist(),
        "aliased": [
            {"feature": feature, "name": fit.names[feature], "because": reason}
            for feature, reason in zip(fit.aliased, fit.aliased_because(), strict=True)
        ],
        "coefficients": [dataclasses.asdict(c) for c in fit.coefficients],
    }
    return _finite(values)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """The optimum, and the learned parameters' distance from it.

    Attributes:
        fit: the least-squares optimum of the training rows.
        learned: the distance of the learned parameters.
        parameters: float64 `[P]`, the learned ones: the weights, then the bias if there is one.
        truth: `(optimum - truth) / standard error` per parameter; None where no truth is known.
        mae: the learned parameters' weighted mean absolute error over the training rows; None if it was not computed.
    """

    fit: LeastSquares
    learned: Distance
    parameters: np.ndarray
    truth: tuple[float | None, ...] | None
    mae: float | None = None

    @classmethod
    def of(
        cls,
        fit: LeastSquares,
        weights: np.ndarray,
        bias: float,
        truth: Any = None,
        mae: float | None = None,
        center: np.ndarray | None = None,
    ) -> Statistics:
        """The statistics of parameters in raw units: `bias` is the prediction at `center`, by default at 0; `truth` is
        `(weights, bias)` or None.
        """
        errors = truth_errors(fit, np.asarray(truth[0]), truth[1]) if truth else None
        at_zero = intercept_at_zero(weights, bias, center)
        parameters = np.append(weights, Extended.of(at_zero).hi) if fit.fit_intercept else np.array(weights, np.float64)
        learned = distance(fit, weights, at_zero)
        # Predictions are rounded, which the quadratic form does not include; a mean square is at least the mean's
        # square.
        if learned.loss is not None and mae is not None:
            learned = dataclasses.replace(learned, loss=max(learned.loss, mae * mae))
        return cls(fit=fit, learned=learned, parameters=parameters, truth=errors, mae=mae)

    def as_json(self) -> dict[str, Any]:
        """Plain values for `model.json`; what is undefined is None."""
        shape = IntervalShape.of(self.fit)
        small = shape is not None and shape.inverse.size <= _MOST_INTERVAL_NUMBERS
        content = as_dict(self.fit)
        return {
            **content,
            "coefficients": list(self._rows(content["coefficients"])),
            "learned": {**dataclasses.asdict(self.learned), "mae": self.mae},
            "truth_errors": None if self.truth is None else list(self.truth),
            "interval": shape.as_json() if shape is not None and small else None,
        }

    def _rows(self, coefficients: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows of the table, by the names of its columns."""
        truth = self.truth or [None] * len(coefficients)
        columns = zip(coefficients, self.parameters.tolist(), self.learned.standard_errors, truth, strict=True)
        for entry, learned, gap, from_truth in columns:
            row = {"name": entry.pop("name"), "learned": learned, **entry, "off_by": gap}
            yield row if self.truth is None else {**row, "truth_off_by": from_truth}


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """The analysis of a linear model's training rows before training.

    Attributes:
        fit: the least-squares optimum, with the features that are linear combinations of others.
        exact: whether its coefficients and standard errors have nine digits and more.
    """

    fit: LeastSquares
    exact: bool


def surveyed_moments(source: Source, known: Ranges) -> ExactMoments:
    """The moments for `survey` by one pass, in extended precision where that does not take long.

    Args:
        source: the rows, raw.
        known: of the training rows.

    Raises:
        InputError: if a number is not finite.
    """
    products = source.num_features <= _MOST_SURVEYED
    num_slices = MOST_SLICES if _is_quick(source) or not products else _FEW_SLICES
    return exact_moments(source, known, num_slices=num_slices, products=products)


def survey(source: Source, moments: ExactMoments, *, fit_intercept: bool) -> Survey | None:
    """The survey from moments of the training rows; None for too many features.

    Args:
        source: the rows, raw.
        moments: of the same rows.
        fit_intercept: whether the model has a bias.

    Raises:
        InputError: if the rows have no optimum in float64 range.
    """
    if not moments.products:
        return None
    known: dict[str, Any] = {"fit_intercept": fit_intercept, "names": source.feature_names}
    if moments.num_slices == MOST_SLICES:
        return Survey(from_exact(moments, precision=_precision(source), **known), exact=True)
    # Nine digits if a few slices give them, else a fit that is good enough for units and rates, but not for statistics.
    for digits in (9, 0):
        if (fit := from_rough(moments, digits=digits, **known)) is not None:
            return Survey(fit, exact=digits > 0)
    return None


def optimum(
    source: Source,
    *,
    fit_intercept: bool,
    moments: Moments | None = None,
    force: bool = False,
) -> LeastSquares | None:
    """The least-squares optimum of the training rows, or None where another pass over them would take long.

    Args:
        source: the rows, raw.
        fit_intercept: whether the model has a bias.
        moments: second moments of the rows, if there are any; used if they are accurate enough and save a pass that is
            not quick, or if no pass is made.
        force: whether to read the rows however many there are.

    Raises:
        InputError: if the rows have no optimum in float64 range.
    """
    n, d = source.num_rows("train"), source.num_features
    known: dict[str, Any] = {"fit_intercept": fit_intercept, "names": source.feature_names}
    if moments is not None and source.weighted:
        moments = None  # They do not have the number of rows of positive weight, which standard errors need.
    quick = n * (d + 2) * max(d + 2, 8) <= _AFFORDABLE
    # A quick pass over a table is worth its exact digits; training's moments are of rounded rows.
    if moments is not None and not (source.dtype is not None and quick):
        fit = _from_moments(moments, n, digits=9, **known)
        if fit is not None:
            return fit
    if force or _is_quick(source):
        exact = exact_moments(source, ranges(source, "train"))
        return from_exact(exact, precision=_precision(source), **known)
    return None if moments is None else _from_moments(moments, n, digits=0, **known)


def _is_quick(source: Source) -> bool:
    """Returns whether a pass in extended precision does not take long."""
    n, columns = source.num_rows("train"), source.num_features + 2
    return n * columns * max(columns, 8) <= _AFFORDABLE or (source.dtype is not None and columns <= _FEW_COLUMNS)


def _precision(source: Source) -> float:
    return FLOAT32_ROUNDING if taken_as_float32(source) else FLOAT64_ROUNDING


def mean_absolute_error(
    source: Source,
    weights: np.ndarray,
    bias: float,
    *,
    center: np.ndarray | None = None,
    force: bool = False,
) -> float | None:
    """The mean absolute error over the training rows, or None where a pass over them would take long.

    Args:
        source: the rows, raw.
        weights: `[d]`.
        bias: the prediction at `center`; 0 without an intercept.
        center: `[d]`; None for zeros.
        force: whether to read the rows however many there are.
    """
    if not force and source.num_rows("train") * (source.num_features + 2) * _LOOK > _AFFORDABLE:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # Diverged parameters give None, not a warning.
        blocks = row_blocks(source, "train")
        errors = residual_metrics(blocks, weights, bias, 0.0 if center is None else center)
    return errors.mae if errors and math.isfinite(errors.mae) else None


def intercept_at_zero(weights: np.ndarray, bias: float, center: np.ndarray | None) -> float | Extended:
    """The intercept in extended precision, where `bias` is the prediction at `center`."""
    if center is None or not center.any():
        return bias
    with np.errstate(over="ignore", invalid="ignore"):
        exact = Extended.of(bias) - (Extended.of(center) * weights).sum()
    return (
        exact if np.isfinite(exact.hi) else float(bias - folded(center * weights))
    )  # Products beyond 1e300 have no halves.


def _from_moments(moments: Moments, n: int, *, digits: int, **known: Any) -> LeastSquares | None:
    return from_moments(
        num_rows=n,
        sum_weights=moments.sum_weights,
        means=moments.means,
        centred=moments.centred,
        digits=digits,
        **known,
    )


def linear_units(
    config: TrainConfig, source: Source, *, custom_loss: bool, surveyed: bool
) -> tuple[RawUnits | StandardUnits, Survey | None]:
    """The units of a linear model's masters, and the survey of the rows.

    A feature that is a linear combination of others is left out, so that there is one optimum, which does not depend on
    the initial parameters.
    """
    if not surveyed and not config.standardizes:
        return RawUnits(), None
    known = ranges(source, "train")
    check_column_squares(source, known)
    moments = surveyed_moments(source, known) if surveyed else None
    columns = ColumnMoments.of_exact(moments or exact_moments(source, known, products=False))
    if config.standardizes and not custom_loss:
        check_target(config, source, columns)
    found = survey(source, moments, fit_intercept=config.fit_intercept) if moments else None
    left_out: Sequence[int] = ()
    if surveyed:
        left_out = found.fit.aliased if found else columns.constant()
    if not config.standardizes:
        units = StandardUnits.raw(source.num_features, fit_intercept=config.fit_intercept, left_out=left_out)
        return units, found
    # The target may be shifted only if the loss depends on the residual alone, which a custom one need not.
    units = StandardUnits.of(
        source, fit_intercept=config.fit_intercept, center_target=not custom_loss, left_out=left_out, columns=columns
    )
    return units, found
