"""What a linear model's rows say about its parameters: the least-squares optimum of the training rows, how sure it is,
and how far what was learned is from it.

Legend: `n` training rows, `d` features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from tapedist.data.exact_arithmetic import folded
from tapedist.data.exact_moments import MOST_SLICES, ExactMoments, exact_moments
from tapedist.data.orders import Source
from tapedist.data.ranges import Ranges, ranges
from tapedist.data.source import row_blocks, taken_as_float32
from tapedist.regression.distance import Distance, as_dict, distance, residual_metrics, truth_errors
from tapedist.regression.double_double import Extended
from tapedist.regression.least_squares import (
    FLOAT32_ROUNDING,
    FLOAT64_ROUNDING,
    LeastSquares,
    from_exact,
    from_moments,
    from_rough,
)
from tapedist.regression.prediction import IntervalShape

# About two seconds of arithmetic on one core.
_AFFORDABLE = 5e8
# With so few columns the pass costs about what it cost to open the table and check its cells, however many rows it has.
_FEW_COLUMNS = 16
# What one look at a number for the absolute errors costs, in the same arithmetic.
_LOOK = 8
_MOST_INTERVAL_NUMBERS = 1_000_000
_MOST_SURVEYED = 512  # Features.
_FEW_SLICES = 3  # Of long tables: 63 bits of the square of a column's largest number.


class SecondMoments(Protocol):
    """Centred second moments of the training rows, as `training.moments` has them; columns in raw units."""

    @property
    def sum_weights(self) -> float: ...
    @property
    def means(self) -> np.ndarray: ...
    @property
    def centred(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """The optimum, and the learned parameters beside it.

    Attributes:
        fit: the least-squares optimum of the training rows.
        learned: how far the learned parameters are from it.
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
        # Predictions are rounded, which the quadratic form knows nothing of, and no mean square is below a mean's.
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
    """What the training rows of a linear model say before training.

    Attributes:
        fit: the least-squares optimum; it says which features are linear combinations of others.
        exact: whether its coefficients and standard errors have nine digits and more.
    """

    fit: LeastSquares
    exact: bool


def surveyed_moments(source: Source, known: Ranges, heed: Callable[[], object] = lambda: None) -> ExactMoments:
    """The moments that `survey` judges by, in extended precision where that does not take long: one pass.

    Args:
        source: the rows, raw.
        known: of the training rows.
        heed: called now and then while rows are read; may raise to break it off.

    Raises:
        InputError: if a number is not finite.
    """
    products = source.num_features <= _MOST_SURVEYED
    num_slices = MOST_SLICES if _is_quick(source) or not products else _FEW_SLICES
    return exact_moments(source, known, num_slices=num_slices, products=products, heed=heed)


def survey(source: Source, moments: ExactMoments, *, fit_intercept: bool) -> Survey | None:
    """What moments of the training rows say before training; None for too many features.

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
    for digits in (9, 0):
        if (fit := from_rough(moments, digits=digits, **known)) is not None:
            return Survey(fit, exact=digits > 0)
    return None


def optimum(
    source: Source,
    *,
    fit_intercept: bool,
    moments: SecondMoments | None = None,
    whatever_it_costs: bool = False,
    heed: Callable[[], object] = lambda: None,
) -> LeastSquares | None:
    """The least-squares optimum of the training rows, or None where another pass over them would take long.

    Args:
        source: the rows, raw.
        fit_intercept: whether the model has a bias.
        moments: second moments of the rows, if somebody has them; used where they are good enough and save a pass that
            is not quick, or where they are all there is.
        whatever_it_costs: whether to read the rows however many there are.
        heed: called now and then while they are read; may raise to break it off.

    Raises:
        InputError: if the rows have no optimum in float64 range.
    """
    n, d = source.num_rows("train"), source.num_features
    known: dict[str, Any] = {"fit_intercept": fit_intercept, "names": source.feature_names}
    if moments is not None and source.weighted:
        moments = None  # How many rows have a positive weight is not among them.
    quick = n * (d + 2) * max(d + 2, 8) <= _AFFORDABLE
    if moments is not None and not (hasattr(source, "rows") and quick):  # A table's own digits are worth a quick look.
        fit = _from_moments(moments, n, digits=9, **known)
        if fit is not None:
            return fit
    if whatever_it_costs or _is_quick(source):
        exact = exact_moments(source, ranges(source, "train", heed=heed), heed=heed)
        return from_exact(exact, precision=_precision(source), **known)
    return None if moments is None else _from_moments(moments, n, digits=0, **known)


def _is_quick(source: Source) -> bool:
    """Whether a pass in extended precision does not take long."""
    n, columns = source.num_rows("train"), source.num_features + 2
    return n * columns * max(columns, 8) <= _AFFORDABLE or (hasattr(source, "rows") and columns <= _FEW_COLUMNS)


def _precision(source: Source) -> float:
    return FLOAT32_ROUNDING if taken_as_float32(source) else FLOAT64_ROUNDING


def mean_absolute_error(
    source: Source,
    weights: np.ndarray,
    bias: float,
    *,
    center: np.ndarray | None = None,
    whatever_it_costs: bool = False,
    heed: Callable[[], object] = lambda: None,
) -> float | None:
    """Of parameters in raw units over the training rows, or None where a pass over them would take long.

    Args:
        source: the rows, raw.
        weights: `[d]`.
        bias: the prediction at `center`; 0 without an intercept.
        center: `[d]`; None for zeros.
        whatever_it_costs: whether to read the rows however many there are.
        heed: called now and then while they are read; may raise to break it off.
    """
    if not whatever_it_costs and source.num_rows("train") * (source.num_features + 2) * _LOOK > _AFFORDABLE:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # Whatever was learned, this is only a look at it.
        blocks = row_blocks(source, "train", heed=heed)
        errors = residual_metrics(blocks, weights, bias, 0.0 if center is None else center)
    return errors.mae if errors and math.isfinite(errors.mae) else None


def intercept_at_zero(weights: np.ndarray, bias: float, center: np.ndarray | None) -> float | Extended:
    """The intercept with more digits than float64 has, where `bias` is the prediction at `center`."""
    if center is None or not center.any():
        return bias
    with np.errstate(over="ignore", invalid="ignore"):
        exact = Extended.of(bias) - (Extended.of(center) * weights).sum()
    return (
        exact if np.isfinite(exact.hi) else float(bias - folded(center * weights))
    )  # Products beyond 1e300 have no halves.


def _from_moments(moments: SecondMoments, n: int, *, digits: int, **known: Any) -> LeastSquares | None:
    return from_moments(
        num_rows=n,
        sum_weights=moments.sum_weights,
        means=moments.means,
        centred=moments.centred,
        digits=digits,
        **known,
    )
