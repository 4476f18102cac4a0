"""The weighted least-squares optimum with its standard errors, from second moments of any precision.

`least_squares` and `from_exact` keep about 106 bits, so that the result is accurate on ill-conditioned data;
`from_moments` starts from float64 moments that exist already, and returns None where they are not accurate enough.
All use the same factorisation.

Features that are linear combinations of those before them are aliased: left out, with weight 0, as by R's `lm`
(`factor.py`).

Legend: `n` rows of positive weight, `d` features, `r` of them kept, `p = d + 1` parameters (`d` without an intercept).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tapedist.data.exact_arithmetic import SLICE_BITS, two_product
from tapedist.data.exact_moments import ExactMoments, as_columns
from tapedist.data.ranges import ranges_of_blocks
from tapedist.data.source import RowArrays
from tapedist.errors import InputError
from tapedist.regression.double_double import Extended
from tapedist.regression.factor import ALIASED_BELOW, Factor, factorise
from tapedist.regression.inference import Coefficient, coefficient
from tapedist.regression.quadratic_form import CentredMoments, LossAboutOptimum, loss_about_optimum

FLOAT64_ROUNDING = 2.0**-53
FLOAT32_ROUNDING = 2.0**-24
_SUMMED = 8.0  # Roundings of a mean in float64, from which centred columns are measured.
_MOST_NAMES = 8  # In one sentence.
_RELATIVE_ERROR = 2.0**-48  # Of sums in float64.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LeastSquares:
    """The optimum of the weighted mean of squared errors. What is undefined is None, never NaN.

    Weights are analytic: multiplying all of them by one number changes no standard error. Rows of weight 0 do not
    count.

    Attributes:
        names: the features' names.
        fit_intercept: whether there is an intercept.
        num_rows: `n`.
        sum_weights: sum of the weights; infinite beyond float64.
        rank: parameters that the rows determine, the intercept included.
        degrees_of_freedom: `n - rank`, of the residuals.
        aliased: numbers of the features that are left out, ascending: the optimum without them is unique.
        combinations: for each of them the features that it is a combination of; empty if it does not vary.
        weights: float64 `[d]`, raw units; 0 for aliased features.
        bias: the intercept (0.0 if there is none).
        coefficients: one entry per parameter, the weights in order and then the intercept.
        loss: the smallest possible loss, `sum w (y_hat - y)**2 / sum w`.
        rmse: its square root.
        residual_std: `sqrt(sum w r**2 / degrees_of_freedom)`.
        r2: `1 - sum w r**2 / sum w (y - mean)**2`; without an intercept, about 0 in place of the mean, as by `lm`.
        r2_about_mean: `1 - sum w r**2 / sum w (y - mean)**2` always; below 0 where the mean alone is a better fit.
        adjusted_r2: as `r2`, of variances.
        condition_number: 2-norm condition of the centred columns (uncentred without an intercept) at unit length,
            aliased ones left out.
        level: of the intervals.
        form: the loss about the optimum.
    """

    names: tuple[str, ...]
    fit_intercept: bool
    num_rows: int
    sum_weights: float
    rank: int
    degrees_of_freedom: int
    aliased: tuple[int, ...]
    combinations: tuple[tuple[int, ...], ...]
    weights: np.ndarray
    bias: float
    coefficients: tuple[Coefficient, ...]
    loss: float
    rmse: float
    residual_std: float | None
    r2: float | None
    r2_about_mean: float | None
    adjusted_r2: float | None
    condition_number: float | None
    level: float
    form: LossAboutOptimum = dataclasses.field(repr=False)

    def aliased_because(self) -> tuple[str, ...]:
        """Why each feature is aliased: "does not vary", "is a linear combination of a, b"."""
        return tuple(map(self._reason, self.aliased, self.combinations))

    def _reason(self, feature: int, parts: tuple[int, ...]) -> str:
        if not parts:
            return "does not vary" if self.fit_intercept else "is zero in every row"
        if self.rank == self.num_rows and feature > self.form.factor.kept[-1]:
            rows = "1 row determines" if self.num_rows == 1 else f"{self.num_rows} rows determine"
            return f"is one too many: {rows} no more parameters"
        return f"is a linear combination of {_listed([self.names[part] for part in parts])}"

    def left_out(self) -> list[str]:
        """Sentences about the aliased features: "year does not vary", "c is a linear combination of a, b"."""
        return left_out((self.names[j] for j in self.aliased), self.aliased_because())

    def excess_loss(self, weights: np.ndarray, bias: float | Extended = 0.0) -> float:
        """`L(weights, bias) - L(optimum)` by the quadratic form, without cancellation near the optimum.

        Args:
            weights: float64 `[d]`, raw units.
            bias: must be 0 if there is no intercept.
        """
        return self.form.excess(weights, bias)

    def standard_error_of_mean(self, x: np.ndarray) -> np.ndarray | None:
        """Standard errors `[k]` of the optimum's mean response at rows `x [k, d]`; None where undefined.

        A prediction interval for one new row of weight 1 adds `residual_std**2` to the square.
        """
        if self.residual_std is None:
            return None
        # The form's unit is a row of `weight_scale`, whose residual has this standard deviation.
        std = self.residual_std / math.sqrt(self.form.weight_scale)
        return std * np.sqrt(self.form.leverage(np.asarray(x, np.float64)))


def least_squares(
    blocks: Callable[[], Iterable[RowArrays]],
    *,
    num_features: int,
    fit_intercept: bool = True,
    names: Sequence[str] | None = None,
    level: float = 0.95,
    precision: float = FLOAT64_ROUNDING,
    tolerance: float = ALIASED_BELOW,
    aliased: Sequence[int] | None = None,
) -> LeastSquares:
    """The optimum over rows that are streamed twice, for their ranges and their moments, in constant memory.

    Args:
        blocks: returns the rows, the same in every call: `x [k, d]`, `y [k]` and weights `w [k]` or None, any `k`.
        num_features: `d`. Memory and time grow with `d**2` and `n d**2 + d**3`.
        fit_intercept: whether to fit an intercept.
        names: the features' names.
        level: of the confidence intervals, inside (0, 1).
        precision: relative rounding of the numbers in `x` and `y`, unless they are integers or other multiples of a
            power of two. `FLOAT32_ROUNDING` for rows that were float32.
        tolerance: a feature is aliased where at most this share of its length is left by those before it.
        aliased: numbers of the features to leave out, if another fit has decided that.

    Raises:
        InputError: No row has a positive weight, a value is not finite, or a weight is negative.
    """
    labels = _labels(names, num_features)
    moments = ExactMoments(ranges_of_blocks(blocks(), (*labels, "target")), names=labels)
    for x, y, w in blocks():
        moments.add(as_columns(x, y), None if w is None else np.asarray(w, np.float64))
    return from_exact(
        moments, fit_intercept=fit_intercept, names=labels, level=level, precision=precision, tolerance=tolerance,
        aliased=aliased,
    )  # fmt: skip


def from_exact(
    moments: ExactMoments,
    *,
    fit_intercept: bool = True,
    names: Sequence[str] | None = None,
    level: float = 0.95,
    precision: float = FLOAT64_ROUNDING,
    tolerance: float = ALIASED_BELOW,
    aliased: Sequence[int] | None = None,
) -> LeastSquares:
    """The optimum from exact moments of the rows; other arguments as for `least_squares`.

    Raises:
        InputError: No row has a positive weight, or the target's squares overflow.
    """
    centred = _centred(moments, fit_intercept=fit_intercept, exact=moments.exact(precision))
    factor = _factor(centred, precision=precision, tolerance=tolerance, aliased=aliased)
    return _solve(centred, factor, _labels(names, moments.num_features), level)


def from_rough(
    moments: ExactMoments,
    *,
    fit_intercept: bool = True,
    names: Sequence[str] | None = None,
    level: float = 0.95,
    digits: int = 9,
) -> LeastSquares | None:
    """As `from_moments`, from exact moments of a few slices, which are rounded.

    Raises:
        InputError: No row has a positive weight, or the target's squares overflow.
    """
    centred = _centred(moments, fit_intercept=fit_intercept, exact=np.zeros(len(moments.shift), bool))
    # What slices leave out is relative to the largest number of a column. If that is an outlier, the column's mean
    # square, and with it the result, has fewer digits.
    share = np.maximum(np.diag(centred.products.hi), 0.0) / float(centred.total.hi)
    least = float(share[share > 0].min(initial=1.0))
    error = max(_RELATIVE_ERROR, moments.num_slices * 2.0 ** -(SLICE_BITS * moments.num_slices) / least)
    return _good_enough(centred, _labels(names, moments.num_features), level, digits=digits, relative_error=error)


def _centred(moments: ExactMoments, *, fit_intercept: bool, exact: np.ndarray) -> CentredMoments:
    if not moments.num_rows:
        raise InputError("weights: no row has a positive weight; at least one is needed")
    moments.check_limits()
    about_mean = Extended(*moments.centred())
    products = about_mean if fit_intercept else Extended(*moments.about_zero())
    means = Extended(*moments.means()) if fit_intercept else Extended.zeros(len(moments.shift))
    # `2**weight_exponent` may be above float64's range; the excess goes into the sums.
    halves = max(0, moments.weight_exponent - 1023)
    return CentredMoments(
        num_rows=moments.num_rows,
        total=Extended(*moments.total()).scaled(2.0**halves),
        weight_scale=math.ldexp(1.0, moments.weight_exponent - halves),
        means=means,
        products=products.scaled(2.0**halves),
        target_about_mean=float(about_mean.hi[-1, -1]) * 2.0**halves,
        scale=np.ldexp(1.0, moments.exponents),
        exact=exact,
        fit_intercept=fit_intercept,
    )


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of the rows of a split, centred, in float64.

    Attributes:
        sum_weights: `W`.
        means: float64 `[d + 1]`, the target's last.
        centred: float64 `[d + 1, d + 1]`: `C`.
    """

    sum_weights: float
    means: np.ndarray
    centred: np.ndarray


def from_moments(
    *,
    num_rows: int,
    sum_weights: float,
    means: np.ndarray,
    centred: np.ndarray,
    fit_intercept: bool = True,
    names: Sequence[str] | None = None,
    level: float = 0.95,
    digits: int = 9,
    relative_error: float = _RELATIVE_ERROR,
    aliased: Sequence[int] | None = None,
) -> LeastSquares | None:
    """The optimum from float64 second moments, without a pass over the rows, or None where that is not accurate.

    Args:
        num_rows: rows of positive weight.
        sum_weights: sum of the weights.
        means: float64 `[d + 1]`, weighted means of the features and, last, the target.
        centred: float64 `[d + 1, d + 1]`, weighted sums of products of the centred columns.
        fit_intercept: whether to fit an intercept.
        names: the features' names.
        level: of the confidence intervals.
        digits: correct decimal digits required in coefficients and standard errors; 0 for no requirement.
        relative_error: of the entries of `centred`, relative to the columns' lengths.
        aliased: as for `least_squares`.

    Returns:
        The optimum; None if the condition number, nearly dependent features or a nearly exact fit make `digits`
        doubtful, so that the rows should be streamed through `least_squares`.
    """
    labels = _labels(names, len(means) - 1)
    if not (np.isfinite(centred).all() and np.isfinite(means).all() and 0 < sum_weights < math.inf):
        return None
    moments = _scaled(num_rows, sum_weights, means, centred, fit_intercept=fit_intercept)
    return _good_enough(moments, labels, level, digits=digits, relative_error=relative_error, aliased=aliased)


def _good_enough(
    moments: CentredMoments,
    labels: tuple[str, ...],
    level: float,
    *,
    digits: int,
    relative_error: float,
    aliased: Sequence[int] | None = None,
) -> LeastSquares | None:
    # `relative_error` is of squares, so the root of it bounds the lengths that rounded sums can distinguish from 0.
    tolerance = max(ALIASED_BELOW, 4 * math.sqrt(relative_error))
    factor = _factor(moments, precision=_SUMMED * FLOAT64_ROUNDING, tolerance=tolerance, aliased=aliased)
    target = float(moments.products.hi[-1, -1])
    left = factor.residual / target if target > 0 else 1.0
    undecided = aliased is None and any(factor.combinations)
    if digits and (undecided or moments.num_rows <= len(moments.scale)):
        return None
    # Coefficients err by the square of the condition number, the standard errors by what the residual cancels.
    amplified = max((factor.condition_number() or 1.0) ** 2, 1 / left if left > 0 else math.inf)
    if digits and amplified * relative_error > 10.0**-digits:
        return None
    return _solve(moments, factor, labels, level)


def _scaled(
    num_rows: int, sum_weights: float, means: np.ndarray, centred: np.ndarray, *, fit_intercept: bool
) -> CentredMoments:
    """Moments of `from_moments` in units that neither overflow nor underflow."""
    # Powers of two, so that scaling is exact.
    weight_scale = float(np.ldexp(1.0, np.frexp(sum_weights / num_rows)[1]))
    total, variances = sum_weights / weight_scale, np.maximum(np.diag(centred), 0.0) / sum_weights
    sizes = np.sqrt(variances) if fit_intercept else np.maximum(np.sqrt(variances), np.abs(means))
    scale = np.ldexp(1.0, np.where(sizes > 0, np.frexp(sizes)[1], 0))
    products = Extended.of(centred / weight_scale / scale[:, None] / scale[None, :])
    about_mean = float(products.hi[-1, -1])
    if not fit_intercept:
        offsets = means / scale
        products = products + Extended(*two_product(offsets[:, None], offsets[None, :])) * total
    return CentredMoments(
        num_rows=num_rows,
        total=Extended.of(total),
        weight_scale=weight_scale,
        means=Extended.of(means if fit_intercept else np.zeros(len(means))),
        products=products,
        target_about_mean=about_mean,
        scale=scale,
        exact=np.zeros(len(means), bool),
        fit_intercept=fit_intercept,
    )


def _factor(moments: CentredMoments, *, precision: float, tolerance: float, aliased: Sequence[int] | None) -> Factor:
    return factorise(
        moments.products,
        rounding=moments.rounding(precision),
        most=moments.num_rows - moments.fit_intercept,
        tolerance=tolerance,
        aliased=aliased,
    )


def _labels(names: Sequence[str] | None, num_features: int) -> tuple[str, ...]:
    labels = tuple(names) if names is not None else tuple(f"x{j + 1}" for j in range(num_features))
    if len(labels) != num_features:
        raise ValueError(f"names={labels!r}: must be {num_features} names, one per feature")
    return labels


def _solve(moments: CentredMoments, factor: Factor, labels: tuple[str, ...], level: float) -> LeastSquares:
    form, rank = loss_about_optimum(moments, factor), len(factor.kept) + moments.fit_intercept
    df = moments.num_rows - rank
    target_scale, total = float(moments.scale[-1]), float(moments.total.hi)
    rmse = math.sqrt(factor.residual / total) * target_scale
    # Of a row of `weight_scale`.
    std = math.sqrt(factor.residual / df) * target_scale if df > 0 else None
    r2 = _r2(moments, factor, float(moments.products.hi[-1, -1]))
    adjusted = None if r2 is None or df < 1 else 1 - (1 - r2) * (moments.num_rows - moments.fit_intercept) / df
    return LeastSquares(
        names=labels,
        fit_intercept=moments.fit_intercept,
        num_rows=moments.num_rows,
        sum_weights=total * moments.weight_scale,
        rank=rank,
        degrees_of_freedom=df,
        aliased=tuple(factor.aliased),
        combinations=tuple(factor.combinations),
        weights=form.weights.hi.copy(),
        bias=float(form.bias.hi),
        coefficients=_coefficients(form, labels, std, df, level),
        loss=factor.residual / total * target_scale**2,
        rmse=rmse,
        residual_std=None if std is None else std * math.sqrt(moments.weight_scale),
        r2=r2,
        r2_about_mean=_r2(moments, factor, moments.target_about_mean),
        adjusted_r2=adjusted,
        condition_number=factor.condition_number(),
        level=level,
        form=form,
    )


def _r2(moments: CentredMoments, factor: Factor, squares: float) -> float | None:
    """R2 relative to the target's sum of squares; None where that may be rounding alone."""
    varies = squares > moments.rounding(FLOAT64_ROUNDING)[-1] ** 2
    return 1 - factor.residual / squares if varies else None


def _coefficients(
    form: LossAboutOptimum, labels: tuple[str, ...], std: float | None, df: int, level: float
) -> tuple[Coefficient, ...]:
    names = (*labels, "intercept") if form.fit_intercept else labels
    optima = np.append(form.weights.hi, form.bias.hi)
    errors = [None] * len(optima) if std is None else (std * form.unit_errors()).tolist()
    aliased = set(form.factor.aliased)
    return tuple(
        coefficient(name, float(optimum), None if j in aliased else error, df, level)
        for j, (name, optimum, error) in enumerate(zip(names, optima, errors, strict=False))
    )


def left_out(names: Iterable[str], reasons: Iterable[str]) -> list[str]:
    """Sentences with the reasons of `aliased_because`; features with the same reason share one."""
    groups: dict[str, list[str]] = {}
    for name, reason in zip(names, reasons, strict=True):
        groups.setdefault(reason, []).append(name)
    return [f"{_listed(group)} {reason if len(group) == 1 else _plural(reason)}" for reason, group in groups.items()]


def _plural(reason: str) -> str:
    for one, many in (("does ", "do "), ("is one ", "are "), ("is a ", "are each a "), ("is ", "are ")):
        if reason.startswith(one):
            return many + reason.removeprefix(one)
    return reason


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(display, names[:_MOST_NAMES])) + more


def display(name: str) -> str:
    """A user's name, escaped if a terminal would not print it."""
    return name if name.isprintable() else repr(name)
