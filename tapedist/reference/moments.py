"""Second moments as exact integers, and full batches of squared error computed from them.

Legend: `k` rows of a chunk, `d` features, `c = d + 2` columns (the features, the target, ones), `P` parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tapedist.reference.exact import Kind, folded, pow2, rounded_to
from tapedist.reference.loops import Step, advanced, loss_limit
from tapedist.reference.rows import Chunk, Ranges, as_dtype
from tapedist.reference.steps import Problem, first_slots

MOMENT_ROWS = 2**13  # Products of integers up to 2**20 that a float64 sum holds exactly.
UNIT = 2.0**-82  # Of a product of two columns, in terms of their tops.
DEPENDENT = 1e-13  # Columns with less than this share of their squares left are dependent.


class Columns(NamedTuple):
    """How columns are cut into integers.

    Attributes:
        shift: `[c]`, subtracted first.
        top: `[c]`, powers of two above what is left.
        weighted_top: `[c]`, the same of weighted columns.
    """

    shift: np.ndarray
    top: np.ndarray
    weighted_top: np.ndarray


def columns_of(found: Ranges, kind: Kind) -> Columns:
    """The shifts and tops that follow from ranges."""
    low, high = as_dtype(found.low, kind), as_dtype(found.high, kind)
    quantum = pow2(np.where(high > low, high - low, 1.0)) / 32
    middle = low / 2 + high / 2
    steps = middle / quantum
    shift = np.where(np.abs(steps) < 2.0**52, np.rint(steps) * quantum, middle)
    shift = np.where(high > low, shift, low)
    top = pow2(np.maximum(np.maximum(np.abs(low - shift), np.abs(high - shift)), kind.least))
    shift, top = np.append(shift, 0.0), np.append(top, 1.0)
    weight = 1.0 if found.weight is None else max(float(as_dtype(found.weight, kind)), kind.least)
    return Columns(shift, top, pow2(weight * top))


def slices(z: np.ndarray, top: np.ndarray) -> list[np.ndarray]:
    """Three integers of at most `2**20` for each number `[k, c]`, the first in steps of `top * 2**-20`."""
    found = []
    for number in range(3):
        step = top * 2.0 ** (-20 - 21 * number)
        on_grid = rounded_to(z, step)
        z = z - on_grid
        found.append(on_grid / step)
    return found


def moment_integers(chunks: Iterable[Chunk], columns: Columns) -> np.ndarray:
    """Sums of products of the shifted columns: Python ints `[c, c]`, in units of `top_i * top_j * 2**-82`.

    Of weighted rows the left factor is weighted, and has a top of its own. Products of the last slices, of which the
    sum is not a whole number of units, are left out.
    """
    count = len(columns.top)
    total, weighted = np.zeros([count, count], object), False
    for x, y, w in chunks:
        z = np.column_stack([x, y, np.ones(len(y))]) - columns.shift
        weighted = w is not None
        left = z if w is None else w[:, np.newaxis] * z
        for first in range(0, len(z), MOMENT_ROWS):
            part = slice(first, first + MOMENT_ROWS)
            lefts, rights = slices(left[part], columns.weighted_top), slices(z[part], columns.top)
            for a in range(3):
                for b in range(3 - a):
                    product = (lefts[a].T @ rights[b]).astype(np.int64).astype(object)
                    total = total + product * 2 ** (21 * (2 - a - b))
    return np.triu(total) + np.triu(total, 1).T if weighted else total


class Moments(NamedTuple):
    """Second moments of the features and, last, the target; each number rounded once.

    Attributes:
        sum_weights: `W`.
        means: `[d + 1]`.
        centred: `[d + 1, d + 1]`: weighted sums of products of the centred columns.
    """

    sum_weights: float
    means: np.ndarray
    centred: np.ndarray


def moments(sums: np.ndarray, columns: Columns) -> Moments:
    """The moments of exact integers `[c, c]`."""
    weight = int(sums[-1, -1])
    total = weight if weight else 1
    of_columns = sums[:-1, -1]
    # Weighted tops are those of the columns times one and the same power of two, so the units of a quotient match.
    means = [
        float(Fraction(shift) + Fraction(int(number), total) * Fraction(top))
        for shift, number, top in zip(columns.shift.tolist(), of_columns, columns.top.tolist(), strict=False)
    ]
    numerators = sums[:-1, :-1] * total - of_columns[:, np.newaxis] * of_columns[np.newaxis]
    # Python's quotient of two integers is rounded once.
    quotients = (numerators / total).astype(np.float64)
    units = columns.weighted_top[:-1, np.newaxis] * columns.top[np.newaxis, :-1] * UNIT
    return Moments(float(weight) * (float(columns.weighted_top[-1]) * UNIT), np.array(means), quotients * units)


class Form(NamedTuple):
    """A squared loss about its optimum.

    Attributes:
        optimum: `[P]`; one of them, if many are optimal.
        least: the loss there.
        spread: `[d, d]`, covariances of the features.
        means: `[d]`, of the features.
    """

    optimum: np.ndarray
    least: float
    spread: np.ndarray
    means: np.ndarray


def quadratic_form(found: Moments, *, fit_intercept: bool) -> Form:
    """The form of the rows' moments."""
    covariance = found.centred / found.sum_weights
    spread, cross, target = covariance[:-1, :-1], covariance[:-1, -1], covariance[-1, -1]
    mx, my = found.means[:-1], found.means[-1]
    if fit_intercept:
        weights, residual = solved(spread, cross, target)
        optimum = np.append(weights, my - in_order(weights * mx))
    else:
        outer = mx[:, np.newaxis] * mx[np.newaxis]
        optimum, residual = solved(spread + outer, cross + mx * my, target + my * my)
    return Form(optimum, max(0.0, residual), spread, mx)


def in_order(terms: np.ndarray) -> float:
    """The sum from left to right."""
    total = 0.0
    for number, term in enumerate(terms.tolist()):
        total = total + term if number else term
    return total


def solved(matrix: np.ndarray, right: np.ndarray, target: float) -> tuple[np.ndarray, float]:
    """Least squares from products: the solution, 0 for dependent columns, and what is left of `target`.

    Gaussian elimination of the bordered matrix at unit diagonal.
    """
    count = len(right)
    scale = np.sqrt(np.maximum(np.diag(matrix), 0.0))
    scale = np.where(scale > 0, scale, 1.0)
    table = np.empty([count + 1, count + 1])
    table[:count, :count] = matrix / (scale[:, np.newaxis] * scale[np.newaxis])
    table[:count, count] = table[count, :count] = right / scale
    table[count, count] = target
    pivots = []
    for k in range(count):
        if table[k, k] > DEPENDENT:
            pivots.append(k)
            factors = table[k + 1 :, k] / table[k, k]
            table[k + 1 :, k + 1 :] -= factors[:, np.newaxis] * table[k, k + 1 :]
    solution = np.zeros(count)
    for k in reversed(pivots):
        above = in_order(table[k, k + 1 : count] * solution[k + 1 :])
        solution[k] = (table[k, count] - above) / table[k, k]
    return solution / scale, float(table[count, count])


def form_gradient(theta: np.ndarray, form: Form) -> tuple[float, np.ndarray]:
    """The mean loss and its gradient `[P]`."""
    d = len(form.means)
    dw = theta[:d] - form.optimum[:d]
    along = folded(form.spread * dw[:, np.newaxis])
    offset = folded(dw * form.means)
    if len(theta) > d:
        offset = offset + (theta[d] - form.optimum[d])
    loss = float((folded(dw * along) + offset * offset) + form.least)
    gradient = (along + along) + (offset + offset) * form.means
    return 0.0 if loss < 0 else loss, np.append(gradient, offset + offset) if len(theta) > d else gradient


def moment_epochs(form: Form, theta: np.ndarray, problem: Problem) -> Iterator[Step]:
    """Full-batch updates without end, computed from the form; the sum of weights counts as 1."""
    at, limit = Step(0, theta, first_slots(len(theta), problem), math.nan, math.nan), math.inf
    while True:
        loss, gradient = form_gradient(at.theta, form)
        at = advanced(at, loss, 1.0, gradient, limit, problem)
        if at.step == 1:
            limit = loss_limit(loss)
        yield at
