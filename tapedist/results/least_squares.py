"""The weighted least-squares optimum with its standard errors, from second moments of any precision.

`least_squares` reads the rows once and keeps about 106 bits, so that it holds its digits on ill-conditioned data;
`from_moments` starts from float64 moments that somebody already has, and declines where they are not good enough.
Both end in the same factorisation and the same result.

Legend: `n` rows of positive weight, `d` features, `r` the rank, `p = d + 1` parameters (`d` without an intercept).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tapedist.errors import InputError
from tapedist.results.extended import Extended, two_product
from tapedist.results.extended_moments import ExtendedMoments, Rows
from tapedist.results.factor import Factor, factorise
from tapedist.results.inference import Coefficient, coefficient
from tapedist.results.quadratic_form import CentredMoments, QuadraticForm, quadratic_form

FLOAT64_ROUNDING = 2.0**-53
FLOAT32_ROUNDING = 2.0**-24


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LeastSquares:
    """The optimum of the weighted mean of squared errors. What is undefined is None, never NaN.

    Weights are analytic: multiplying all of them by one number changes no standard error. Rows of weight 0 do not
    count.

    Attributes:
        names: the features' names.
        fit_intercept: whether there is an intercept.
        num_rows: `n`.
        sum_weights: sum of the weights.
        rank: parameters that the rows determine, the intercept included.
        degrees_of_freedom: `n - rank`, of the residuals.
        problem: why the optimum is not unique, one sentence that names the columns; None if it is.
        weights: float64 `[d]`, raw units; None if the optimum is not unique.
        bias: the intercept (0.0 if there is none); None if the optimum is not unique.
        coefficients: one entry per parameter, the weights in order and then the intercept; empty if not unique.
        loss: the smallest possible loss, `sum w (y_hat - y)**2 / sum w`. Defined even where the optimum is not unique.
        rmse: its square root.
        residual_std: `sqrt(sum w r**2 / degrees_of_freedom)`.
        r2: `1 - sum w r**2 / sum w (y - mean)**2`; without an intercept, about 0 in place of the mean.
        adjusted_r2: the same, of variances.
        condition_number: 2-norm condition of the centred columns (uncentred without an intercept) at unit length.
        level: of the intervals.
        form: the loss about the optimum; about one of them where it is not unique.
    """

    names: tuple[str, ...]
    fit_intercept: bool
    num_rows: int
    sum_weights: float
    rank: int
    degrees_of_freedom: int
    problem: str | None
    weights: np.ndarray | None
    bias: float | None
    coefficients: tuple[Coefficient, ...]
    loss: float
    rmse: float
    residual_std: float | None
    r2: float | None
    adjusted_r2: float | None
    condition_number: float | None
    level: float
    form: QuadraticForm = dataclasses.field(repr=False)

    def excess_loss(self, weights: np.ndarray, bias: float | Extended = 0.0) -> float:
        """`L(weights, bias) - L(optimum)`, by the quadratic form, so that nothing cancels near the optimum.

        Args:
            weights: float64 `[d]`, raw units.
            bias: must be 0 if there is no intercept.
        """
        return self.form.excess(weights, bias)

    def standard_error_of_mean(self, x: np.ndarray) -> np.ndarray | None:
        """Standard errors `[k]` of the optimum's mean response at rows `x [k, d]`; None where undefined.

        A prediction interval for one new row of weight 1 adds `residual_std**2` to the square.
        """
        if self.residual_std is None or self.weights is None:
            return None
        return self.residual_std * np.sqrt(self.form.leverage(np.asarray(x, np.float64)))


def least_squares(
    blocks: Callable[[], Iterable[Rows]],
    *,
    num_features: int,
    fit_intercept: bool = True,
    names: Sequence[str] | None = None,
    level: float = 0.95,
    precision: float = FLOAT64_ROUNDING,
) -> LeastSquares:
    """The optimum over rows that are streamed once, block by block, in constant memory.

    Args:
        blocks: gives the rows: pairs of `x [k, d]` and `y [k]` with weights `w [k]` or None, any `k`.
        num_features: `d`. Memory and time grow with `d**2` and `n d**2 + d**3`.
        fit_intercept: whether to fit an intercept.
        names: the features' names.
        level: of the confidence intervals, inside (0, 1).
        precision: relative rounding of the numbers in `x`; features that are linear combinations of each other up to
            it count as dependent. `FLOAT32_ROUNDING` for rows that were float32.

    Raises:
        InputError: No row has a positive weight, a value is not finite, or a weight is negative.
    """
    labels = _labels(names, num_features)
    moments = ExtendedMoments(num_features, centred=fit_intercept, names=labels).merge(blocks())
    sums, scale = moments.sums, moments.scale[1:]
    if not moments.num_rows:
        raise InputError("weights: no row has a positive weight; at least one is needed")
    products, means = sums[1:, 1:], Extended.zeros(num_features + 1)
    if fit_intercept:
        offsets = sums[0, 1:] / sums[0, 0]
        products = products - offsets[:, None] * sums[0, 1:][None, :]
        means = offsets * scale + moments.shift
    centred = CentredMoments(
        num_rows=moments.num_rows,
        total=sums[0, 0],
        weight_scale=moments.weight_scale,
        means=means,
        products=products,
        scale=scale,
        fit_intercept=fit_intercept,
    )
    return _solve(centred, factorise(products, centred.rounding(precision)), labels, level)


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
    relative_error: float = 2.0**-48,
) -> LeastSquares | None:
    """The optimum from float64 second moments, without another look at the rows, or None where that costs digits.

    Args:
        num_rows: rows of positive weight.
        sum_weights: sum of the weights.
        means: float64 `[d + 1]`, weighted means of the features and, last, the target.
        centred: float64 `[d + 1, d + 1]`, weighted sums of products of the centred columns.
        fit_intercept: whether to fit an intercept.
        names: the features' names.
        level: of the confidence intervals.
        digits: correct decimal digits wanted in coefficients and standard errors; 0 takes what there is.
        relative_error: of the entries of `centred`, relative to the columns' lengths.

    Returns:
        The optimum; None if the condition number, nearly dependent features or a nearly exact fit make `digits`
        doubtful, so that the rows should be streamed through `least_squares`.
    """
    labels = _labels(names, len(means) - 1)
    if not (np.isfinite(centred).all() and np.isfinite(means).all()):
        return None
    products = Extended.of(centred)
    if not fit_intercept:
        products = products + Extended(*two_product(means[:, None], means[None, :])) * sum_weights
    diagonal = np.diag(products.hi)
    scale = np.ldexp(1.0, np.frexp(np.sqrt(np.where(diagonal > 0, diagonal / sum_weights, 1.0)))[1])
    moments = CentredMoments(
        num_rows=num_rows,
        total=Extended.of(sum_weights),
        weight_scale=1.0,
        means=Extended.of(means if fit_intercept else np.zeros(len(means))),
        products=products / (scale[:, None] * scale[None, :]),
        scale=scale,
        fit_intercept=fit_intercept,
    )
    factor = factorise(moments.products, moments.rounding(FLOAT64_ROUNDING))
    condition = factor.condition_number() or 1.0
    left = factor.residual / moments.products.hi[-1, -1] if diagonal[-1] > 0 else 1.0
    if digits and (any(others for _, others in factor.dependencies) or num_rows <= len(means)):
        return None
    if digits and max(condition**2, 1 / left if left > 0 else math.inf) * relative_error > 10.0**-digits:
        return None
    return _solve(moments, factor, labels, level)


def _labels(names: Sequence[str] | None, num_features: int) -> tuple[str, ...]:
    labels = tuple(names) if names is not None else tuple(f"x{j + 1}" for j in range(num_features))
    if len(labels) != num_features:
        raise ValueError(f"names={labels!r}: must be {num_features} names, one per feature")
    return labels


def _solve(moments: CentredMoments, factor: Factor, labels: tuple[str, ...], level: float) -> LeastSquares:
    form = quadratic_form(moments, factor)
    unique = factor.rank == len(labels)
    df = moments.num_rows - factor.rank - moments.fit_intercept
    target_scale, total = float(moments.scale[-1]), float(moments.total.hi)
    loss = factor.residual / total * target_scale**2
    std = math.sqrt(factor.residual * moments.weight_scale / df) * target_scale if df > 0 else None
    r2 = _r2(moments, factor)
    adjusted = None if r2 is None or df < 1 else 1 - (1 - r2) * (moments.num_rows - moments.fit_intercept) / df
    return LeastSquares(
        names=labels,
        fit_intercept=moments.fit_intercept,
        num_rows=moments.num_rows,
        sum_weights=total * moments.weight_scale,
        rank=factor.rank + moments.fit_intercept,
        degrees_of_freedom=df,
        problem=None if unique else _problem(moments, factor, labels),
        weights=form.weights.hi.copy() if unique else None,
        bias=float(form.bias.hi) if unique else None,
        coefficients=_coefficients(form, labels, std, df, level) if unique else (),
        loss=loss,
        rmse=math.sqrt(loss),
        residual_std=std,
        r2=r2,
        adjusted_r2=adjusted,
        condition_number=factor.condition_number() if unique else None,
        level=level,
        form=form,
    )


def _r2(moments: CentredMoments, factor: Factor) -> float | None:
    varies = moments.products.hi[-1, -1] > 16 * moments.rounding(FLOAT64_ROUNDING)[-1]
    return 1 - factor.residual / float(moments.products.hi[-1, -1]) if varies else None


def _coefficients(
    form: QuadraticForm, labels: tuple[str, ...], std: float | None, df: int, level: float
) -> tuple[Coefficient, ...]:
    names = (*labels, "intercept") if form.fit_intercept else labels
    estimates = np.append(form.weights.hi, form.bias.hi)
    errors = [None] * len(estimates) if std is None else (std * form.unit_errors()).tolist()
    return tuple(
        coefficient(name, float(estimate), error, df, level)
        for name, estimate, error in zip(names, estimates, errors, strict=False)
    )


def _problem(moments: CentredMoments, factor: Factor, labels: tuple[str, ...]) -> str:
    """Why there is more than one optimum."""
    parameters = len(labels) + moments.fit_intercept
    if moments.num_rows < parameters:
        rows = "1 row" if moments.num_rows == 1 else f"{moments.num_rows} rows"
        return f"{rows} cannot determine {parameters} parameters, so the optimum is not unique"
    groups = []
    for column, others in factor.dependencies:
        name = shown(labels[column])
        if others:
            groups.append(f"{name} is a linear combination of {', '.join(shown(labels[o]) for o in sorted(others))}")
        else:
            groups.append(f"{name} {'does not vary' if moments.fit_intercept else 'is zero in every row'}")
    return f"{'; '.join(groups)}, so the optimum is not unique"


def shown(name: str) -> str:
    """A user's name, fit for a terminal."""
    return name if name.isprintable() else repr(name)
