"""The curvature of the squared loss, and the bounds of stable learning rates that follow from it.

The loss is quadratic, so its Hessian is a constant and each optimiser a linear recurrence in every eigendirection.
Extreme singular values come from operations in a fixed order, without a BLAS or LAPACK, whose last bits vary.

Legend: `d` features, `P` parameters (`d`, and one more with an intercept), in the order weights, bias.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np

from tapedist.data.exact_arithmetic import eliminated, exponent_above, folded, outer_sum

_HALVINGS = 128  # More than bisection of 53 bits takes; it ends when the middle is one of the ends.


@dataclasses.dataclass(frozen=True)
class Curvature:
    """Extreme eigenvalues of the Hessian.

    Attributes:
        lambda_max: the largest.
        lambda_min: the smallest; 0.0 if some direction is flat, so that the optimum is not unique.
        lambda_min_curved: the smallest above 0; `lambda_max` is 0 if there is none.
    """

    lambda_max: float
    lambda_min: float
    lambda_min_curved: float

    @property
    def auto_rate(self) -> float | None:
        """`2 / (lambda_min + lambda_max)`, the rate at which plain gradient descent converges fastest.

        Polyak, "Introduction to Optimization" (1987), 1.4; flat directions, which no rate moves, are left out. None
        if all are flat.
        """
        return 2 / (self.lambda_min_curved + self.lambda_max) if self.lambda_max > 0 else None

    def stable_bound(self, optimizer: str, momentum: float = 0.0) -> float | None:
        """The learning rate below which `optimizer` converges on this loss in full batch; None if not known.

        Per eigenvalue `h`, with rate `a` and momentum `m`, the characteristic roots lie inside the unit circle when
        `a h < 2` (sgd), `a h < 2 (1 + m)` (momentum: Polyak, "Some methods of speeding up the convergence of iteration
        methods", 1964) and `a h < 2 (1 + m) / (1 + 2 m)` (nesterov: Jury's criterion on
        `z**2 - (1 - a h)(1 + m) z + (1 - a h) m`).

        Args:
            optimizer: its name; "sgd", "momentum" and "nesterov" have bounds.
            momentum: `m`, in [0, 1).
        """
        if self.lambda_max <= 0:
            return None
        factors = {"sgd": 2.0, "momentum": 2 * (1 + momentum), "nesterov": 2 * (1 + momentum) / (1 + 2 * momentum)}
        return factors[optimizer] / self.lambda_max if optimizer in factors else None


def hessian(
    *,
    sum_weights: float,
    means: np.ndarray,
    centred: np.ndarray,
    fit_intercept: bool = True,
    l2: float | np.ndarray = 0.0,
) -> np.ndarray:
    """The Hessian `[P, P]` of `sum w (x . weights + bias - y)**2 / sum w + l2 * sum weights**2`.

    Args:
        sum_weights: sum of the weights.
        means: float64 `[d + 1]`, weighted means of the features and, last, the target (not used).
        centred: float64 `[d + 1, d + 1]`, weighted sums of products of the centred columns.
        fit_intercept: whether there is a bias.
        l2: of the penalty, which excludes the bias; one number, or one for each weight `[d]`.
    """
    root = _root(sum_weights, means, centred, fit_intercept, l2)
    return 2 * outer_sum(root.T, root.T)


def curvature(
    *,
    sum_weights: float,
    means: np.ndarray,
    centred: np.ndarray,
    fit_intercept: bool = True,
    l2: float | np.ndarray = 0.0,
) -> Curvature:
    """Extreme eigenvalues of the Hessian; arguments as for `hessian`.

    They are squared singular values of a root of it, which keeps the small ones when features have large means.
    """
    root = _root(sum_weights, means, centred, fit_intercept, l2)
    # Scaled by a power of two, exactly, so that squares neither overflow nor vanish.
    exponent = int(exponent_above(np.abs(root).max(initial=0.0)))
    largest, least, count = extremes(np.ldexp(root, -exponent))
    largest, least = (math.ldexp(value * value, 2 * exponent + 1) for value in (largest, least))
    return Curvature(largest, least if count == root.shape[1] else 0.0, least)


def _root(
    sum_weights: float, means: np.ndarray, centred: np.ndarray, fit_intercept: bool, l2: float | np.ndarray
) -> np.ndarray:
    """`[rows, P]` with `root' root` half the Hessian: centred products, the rank-one part of the means, the penalty."""
    count = len(means) - 1
    covariance = centred[:count, :count] / sum_weights
    lengths = np.sqrt(np.where(np.diag(covariance) > 0, np.diag(covariance), 1.0))
    # Correlations first: pivots of features in very different units could not be compared.
    parts = [_triangle(covariance / np.multiply.outer(lengths, lengths)) * lengths, means[None, :count]]
    if np.any(l2):
        parts.append(np.diag(np.sqrt(np.broadcast_to(l2, [count]))))
    weights = np.concatenate(parts)
    if not fit_intercept:
        return weights
    bias = np.zeros((len(weights), 1))
    bias[len(parts[0])] = 1.0
    return np.concatenate([weights, bias], axis=1)


def _triangle(correlations: np.ndarray) -> np.ndarray:
    """`R [r, d]` with `R' R = correlations [d, d]`, by Cholesky's factorisation with complete pivoting.

    The largest diagonal element that is left comes next, the first one of equal ones, until none is above `d * 2**-52`
    (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., 10.3).
    """
    rest, count, rows = correlations.copy(), len(correlations), []
    for _ in range(count):
        # `argmax` takes the first of equal ones, so that the order of pivots is defined.
        pivot = int(np.diag(rest).argmax())
        if not rest[pivot, pivot] > count * 2.0**-52:
            break
        row = rest[pivot] / np.sqrt(rest[pivot, pivot])
        rest -= np.multiply.outer(row, row)
        rest[pivot], rest[:, pivot] = 0.0, 0.0
        rows.append(row)
    return np.array(rows).reshape(-1, count)


def inverse_hessian(
    inverse: np.ndarray, *, means: np.ndarray, fit_intercept: bool = True, l2: float | np.ndarray = 0.0
) -> np.ndarray:
    """The inverse `[P, P]` of `hessian` on the features that have one; zeros for the others.

    Args:
        inverse: float64 `[d, d]`, of the covariance of the features (about 0 without an intercept); zeros in the rows
            and columns of features without curvature.
        means: float64 `[d]`, of the features; not used without an intercept.
        fit_intercept: whether there is a bias.
        l2: as for `hessian`.
    """
    d = len(means)
    inner = inverse
    if np.any(l2):
        # (C + L)^-1 = (1 + C^-1 L)^-1 C^-1: no inverse of C^-1, which has none where features are left out. The roots
        # of L make what is inverted similar to a matrix that is symmetric and at least 1.
        inner = eliminated(np.eye(d) + inverse * np.broadcast_to(l2, [d]), inverse)[0]
    # Symmetric to the last bit, and half of it: the Hessian is twice the covariance.
    inner = (inner + inner.T) / 4
    if not fit_intercept:
        return inner
    across = -folded(inner * means)
    corner = 0.5 - folded(across * means)
    return np.block([[inner, across[:, np.newaxis]], [across[np.newaxis], np.array([[corner]])]])


def power_iteration(
    blocks: Callable[[], Iterable[tuple[np.ndarray, ...]]],
    *,
    num_features: int,
    fit_intercept: bool = True,
    l2: float | np.ndarray = 0.0,
    iterations: int = 20,
) -> float:
    """`lambda_max` of the Hessian for features too many for its matrix, from passes over the rows.

    Golub and Van Loan, "Matrix Computations", 4th ed., 7.3.1, from the vector of ones. The result is a Rayleigh
    quotient, so it never exceeds the true value.

    Args:
        blocks: each call is one pass of `(x [k, d], y [k][, w [k]])`.
        num_features: `d`.
        fit_intercept: whether there is a bias.
        l2: as for `hessian`.
        iterations: passes.
    """
    vector = np.ones(num_features + fit_intercept)
    largest = 0.0
    for _ in range(iterations):
        vector = vector / np.sqrt(folded(vector * vector))
        image, total = np.zeros_like(vector), 0.0
        for x, _, *rest in blocks():
            weights = rest[0] if rest else np.ones(len(x))
            along = weights * (folded(x * vector[:num_features]) + (vector[-1] if fit_intercept else 0.0))
            image[:num_features] += folded(along[:, np.newaxis] * x, axis=0)
            if fit_intercept:
                image[-1] += folded(along)
            total += float(folded(weights))
        image *= 2 / total
        image[:num_features] += 2 * l2 * vector[:num_features]
        largest = float(folded(vector * image))
        if not image.any():
            return 0.0
        vector = image
    return largest


def extremes(matrix: np.ndarray) -> tuple[float, float, int]:
    """The largest singular value, the smallest one of at least `max(n, P) * 2**-52` of it, and the number of such.

    By the reflections of Golub and Kahan and by bisection of the bidiagonal matrix (Golub and Van Loan, "Matrix
    Computations", 4th ed., 5.4.8 and 8.4.1), so that they are off by a few roundings of the largest one.

    Args:
        matrix: float64 `[n, P]`, of which squares neither overflow nor vanish.
    """
    band = bidiagonal(matrix)
    squares = [value * value for value in band]
    most = max(map(sum, zip([0.0, *band], [*band, 0.0], strict=True)))
    largest = _number(1, squares, most)
    least = largest * max(matrix.shape) * 2.0**-52
    count = _at_least(least, squares) if least > 0 else 0
    return largest, _number(count, squares, most) if count else 0.0, count


def condition(matrix: np.ndarray) -> float:
    """The largest singular value over the smallest one; infinite if bisection cannot distinguish that from 0."""
    band = bidiagonal(matrix)
    squares = [value * value for value in band]
    most = max(map(sum, zip([0.0, *band], [*band, 0.0], strict=True)))
    least = _number(matrix.shape[1], squares, most)
    return _number(1, squares, most) / least if least > 0 else math.inf


def bidiagonal(matrix: np.ndarray) -> list[float]:
    """The magnitudes of a bidiagonal matrix with the same singular values: `d_1, e_1, d_2, e_2, .., d_P`."""
    n, count = matrix.shape
    band, rest = [], np.concatenate([matrix, np.zeros([max(0, count - n), count])])
    while rest.shape[1]:
        length, rest = _reflected(rest)
        band.append(length)
        if not rest.shape[1]:
            break
        length, across = _reflected(rest.T)
        band.append(length)
        rest = across.T
    return band


def _reflected(rest: np.ndarray) -> tuple[float, np.ndarray]:
    """The length of the first column, and the others after the reflection that turns it to the first axis."""
    mirror, others = rest[:, 0].copy(), rest[:, 1:]
    length = np.sqrt(folded(mirror * mirror))
    if not length > 0:
        return 0.0, others
    # The sign that does not cancel.
    mirror[0] += np.copysign(length, mirror[0])
    along = folded(mirror[:, np.newaxis] * others, axis=0) * (2 / folded(mirror * mirror))
    return float(length), others - np.multiply.outer(mirror, along)


def _number(place: int, squares: list[float], most: float) -> float:
    """The singular value number `place` from the largest, by bisection from 0 to `most`."""
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _at_least(middle, squares) >= place else (low, middle)
    return low


def _at_least(bound: float, squares: list[float]) -> int:
    """The number of singular values that are at least `bound`, above 0.

    They and their negatives are the eigenvalues of a tridiagonal matrix with the band beside a diagonal of zeros, of
    which Sturm's sequence counts those below (Golub and Van Loan, 8.4.1 and 8.6.1).
    """
    below, pivot = 0, -bound
    for square in squares:
        below += pivot < 0
        # A pivot of exactly 0 counts as a tiny negative one.
        pivot = -bound - square / (pivot or -1e-300)
    return len(squares) + 1 - below - (pivot < 0)
