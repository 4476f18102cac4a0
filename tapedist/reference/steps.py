"""One step: exact sums of losses and gradients, and the update that they make.

Legend: `k` rows of a chunk, `d` features, `P` parameters (the weights, then the bias if there is one), `s` slots, `l`
grids of a gradient's sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from tapedist.reference.exact import CAP, KINDS, SLACK, Kind, flush, folded, integers, pow2, rounded_to, trim, value
from tapedist.reference.rows import Bounds, Chunk

TINY = 2.0**-900  # A smaller slot is 0, so that no machine meets a denormal.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What is minimised, and how.

    Attributes:
        dtype: of the rows, "float32" or "float64".
        loss: "squared", "absolute" or "huber".
        delta: where the huber loss turns linear.
        fit_intercept: whether the last parameter is a bias.
        l2: weight of the penalty.
        penalized: its factors `[P]`; None for 1, and 0 for the bias.
        optimizer: "sgd", "momentum", "nesterov", "adam" or "metric".
        rate: the learning rate; of "metric" the first.
        hold: steps for which "metric" keeps it.
        curvature: how fast "metric" lets it fall.
        metric: `[P, P]`, symmetric.
    """

    dtype: str = "float32"
    loss: str = "squared"
    delta: float = 1.0
    fit_intercept: bool = True
    l2: float = 0.0
    penalized: np.ndarray | None = None
    optimizer: str = "sgd"
    rate: float = 0.01
    momentum: float = 0.9
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    hold: float = math.inf
    curvature: float = 1.0
    metric: np.ndarray | None = None

    @property
    def kind(self) -> Kind:
        return KINDS[self.dtype]

    @property
    def short_delta(self) -> float:
        """`delta` as residuals are rounded."""
        return float(trim(self.delta, self.kind.drop[0]))

    def factors(self, count: int) -> np.ndarray:
        """Of the penalty, `[P]`."""
        if self.penalized is not None:
            return self.penalized
        return np.append(np.ones(count - self.fit_intercept), np.zeros(int(self.fit_intercept)))


class Diverged(FloatingPointError):
    """The parameters before this step are the last good ones."""


def used(theta: np.ndarray, kind: Kind) -> np.ndarray:
    """Parameters as rows are multiplied by them."""
    return trim(flush(theta, kind.least), kind.drop[1])


def term_bounds(theta: np.ndarray, limits: Bounds, problem: Problem) -> tuple[float, np.ndarray]:
    """Bounds of the terms of one step: `(of the loss, of the gradient [P])`.

    Raises:
        Diverged: if residuals could leave the range that is computed with.
    """
    kind, d = problem.kind, len(limits.x)
    at = np.abs(used(theta, kind))
    with np.errstate(over="ignore", invalid="ignore"):
        products = np.maximum(limits.x * at[:d], kind.floor)
        cap = max(CAP, (d - 1).bit_length())
        size = rounded_to(products, pow2(products.max()) * 2.0 ** (cap - 53)).sum()
        residual = np.maximum(((size + (at[d] if problem.fit_intercept else 0.0)) + limits.y) * SLACK, kind.floor)
    if not residual < kind.most:
        raise Diverged(f"residuals may reach {residual}")
    slopes = {"squared": residual, "absolute": 1.0, "huber": min(residual, problem.short_delta)}
    slope = max((1.0 if limits.w is None else limits.w) * slopes[problem.loss], kind.floor) * SLACK
    of_gradient = slope * np.append(limits.x, np.ones(int(problem.fit_intercept)))
    return slope * residual, of_gradient


def row_terms(theta: np.ndarray, chunk: Chunk, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """What each row adds to the sums: `(loss [k], gradient [k, P])`; squared error's gradient is half of it."""
    (x, y, w), (short, long), delta = chunk, problem.kind.drop, problem.short_delta
    at, d = used(theta, problem.kind), x.shape[1]
    y_hat = np.zeros(len(y))
    for j in range(d):  # In the order of the features, which is part of the result.
        y_hat = y_hat + x[:, j] * at[j]
    if problem.fit_intercept:
        y_hat = y_hat + at[d]
    r = trim(y_hat - y, short)
    if problem.loss == "squared":
        slope, terms = r, r * r
    elif problem.loss == "absolute":
        slope, terms = np.sign(r), np.abs(r)
    else:
        near = np.minimum(np.abs(r), delta)
        slope, terms = np.clip(r, -delta, delta), near * np.abs(r) - (near * near) * 0.5
    if w is not None:
        slope, terms = trim(w * slope, long), w * trim(terms, long)
    gradient = slope[:, np.newaxis] * x
    return terms, np.column_stack([gradient, slope]) if problem.fit_intercept else gradient


class Totals(NamedTuple):
    """Exact sums over rows, as Python ints; those of parts of the rows may be added in any order.

    Attributes:
        rows: how many there were.
        loss: `[2, 1]`.
        weight: `[2, 1]`, zeros where rows have none.
        gradient: `[l, P]`.
    """

    rows: int
    loss: np.ndarray
    weight: np.ndarray
    gradient: np.ndarray

    def plus(self, other: Totals) -> Totals:
        loss, weight, gradient = self.loss + other.loss, self.weight + other.weight, self.gradient + other.gradient
        return Totals(self.rows + other.rows, loss, weight, gradient)


def totals(theta: np.ndarray, chunks: Iterable[Chunk], limits: Bounds, problem: Problem) -> Totals:
    """Exact sums over `chunks`, which hold rows as trained.

    Raises:
        Diverged: if residuals could leave the range that is computed with.
    """
    of_loss, of_gradient = term_bounds(theta, limits, problem)
    nothing = np.zeros([2, 1], object)
    total = Totals(0, nothing, nothing, np.zeros([problem.kind.levels, len(of_gradient)], object))
    for chunk in chunks:
        terms, gradient = row_terms(theta, chunk, problem)
        total = total.plus(
            Totals(
                len(terms),
                integers(terms[:, np.newaxis], of_loss, 2),
                nothing if limits.w is None else integers(np.asarray(chunk[2])[:, np.newaxis], limits.w, 2),
                integers(gradient, of_gradient, problem.kind.levels),
            )
        )
    return total


def loss_and_gradient_sums(
    theta: np.ndarray, found: Totals, limits: Bounds, problem: Problem
) -> tuple[float, float, np.ndarray]:
    """`(sum of w * loss, sum of w, sums of w * gradient [P])` of exact sums taken at `theta`."""
    of_loss, of_gradient = term_bounds(theta, limits, problem)
    weight = float(found.rows) if limits.w is None else float(value(found.weight, limits.w)[0])
    gradient = value(found.gradient, of_gradient) * (2.0 if problem.loss == "squared" else 1.0)
    return float(value(found.loss, of_loss)[0]), weight, gradient


def penalty(theta: np.ndarray, problem: Problem) -> float:
    """What the log adds to the loss."""
    return float(problem.l2 * folded((problem.factors(len(theta)) * theta) * theta))


def first_slots(count: int, problem: Problem) -> np.ndarray:
    """`[s, P]` before the first step; Adam's third and fourth are the powers of its betas."""
    if problem.optimizer == "adam":
        return np.repeat([[0.0], [0.0], [1.0], [1.0]], count, axis=1)
    return np.zeros([int(problem.optimizer in ("momentum", "nesterov")), count])


def update(
    theta: np.ndarray, slots: np.ndarray, sums: np.ndarray, weight: float, problem: Problem, *, step: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The parameters and slots after one more update; `step` were done before."""
    rule, rate = problem.optimizer, problem.rate
    g = sums * (1.0 / (weight if weight else 1.0))
    if problem.l2:
        g = g + ((2 * problem.l2) * problem.factors(len(theta))) * theta
    if rule == "sgd":
        return theta - rate * g, slots
    if rule in ("momentum", "nesterov"):
        push = rate * g
        v = flush(problem.momentum * slots[0] - push, TINY)
        return theta + (problem.momentum * v - push if rule == "nesterov" else v), v[np.newaxis]
    if rule == "adam":
        m = flush(slots[0] + (g - slots[0]) * (1 - problem.beta_1), TINY)
        v = flush(slots[1] + (g * g - slots[1]) * (1 - problem.beta_2), TINY)
        p1, p2 = flush(slots[2] * problem.beta_1, TINY), flush(slots[3] * problem.beta_2, TINY)
        pace = (rate * np.sqrt(1 - p2)) / (1 - p1)
        return theta - (pace * m) / (np.sqrt(v) + problem.epsilon), np.stack([m, v, p1, p2])
    assert problem.metric is not None
    falling = 1.0 / ((1.0 / rate) + problem.curvature * max(step + 1.0 - problem.hold, 0.0))
    return theta - falling * folded(problem.metric * g[:, np.newaxis]), slots
