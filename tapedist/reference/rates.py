"""The automatic learning rate of full batches of squared error, from the moments of the rows.

Half the Hessian is `R' R` for a root `R [k, P]`, of which the singular values keep digits that the product would lose
where features have large means.

Legend: `d` features, `P` parameters (the weights, then the bias if there is one).
"""

from __future__ import annotations

import math

import numpy as np

from tapedist.reference.exact import folded
from tapedist.reference.moments import Moments

EPSILON = 2.0**-52
ORTHOGONAL = 2.0**-48  # A folded product of two columns, relative to their lengths, that may be rounding alone.


def root(found: Moments, *, fit_intercept: bool, l2: np.ndarray) -> np.ndarray:
    """A root of half the Hessian of the mean squared error and the penalty `[d]`."""
    covariance = found.centred[:-1, :-1] / found.sum_weights
    lengths = np.sqrt(np.where(np.diag(covariance) > 0, np.diag(covariance), 1.0))
    # Correlations first: features of very different units would drown each other's.
    upper = triangle(covariance / (lengths[:, np.newaxis] * lengths[np.newaxis])) * lengths
    weights = np.concatenate([upper, found.means[np.newaxis, :-1], np.diag(np.sqrt(l2))])
    if not fit_intercept:
        return weights
    bias = np.zeros([len(weights), 1])
    bias[len(upper)] = 1.0
    return np.concatenate([weights, bias], axis=1)


def triangle(correlations: np.ndarray) -> np.ndarray:
    """`R [r, d]` with `R' R = correlations`, by Cholesky's factorisation with complete pivoting.

    The largest diagonal element that is left comes next, until none is above rounding (Higham, "Accuracy and Stability
    of Numerical Algorithms", 2nd ed., 10.3).
    """
    rest, d = correlations.copy(), len(correlations)
    rows = np.zeros([d, d])
    for number in range(d):
        pivot = int(np.diag(rest).argmax())
        if not rest[pivot, pivot] > d * EPSILON:
            return rows[:number]
        rows[number] = rest[pivot] / np.sqrt(rest[pivot, pivot])
        rest = rest - rows[number][:, np.newaxis] * rows[number]
        rest[pivot] = rest[:, pivot] = 0.0
    return rows


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """Of `[k, P]`, by rotations that make its columns orthogonal, pair after pair.

    One-sided Jacobi (Hestenes 1958; Golub and Van Loan, "Matrix Computations", 4th ed., 8.6.3); the small ones keep
    their digits (Demmel and Veselic, "Jacobi's method is more accurate than QR", 1992).
    """
    columns = np.ascontiguousarray(matrix.T)
    for _ in range(60):
        rotated = False
        for p in range(len(columns)):
            for q in range(p + 1, len(columns)):
                rotated |= rotate(columns, p, q)
        if not rotated:
            break
    return np.array([math.sqrt(folded(column * column)) for column in columns])


def rotate(columns: np.ndarray, p: int, q: int) -> bool:
    """Makes two of `columns` `[P, k]` orthogonal; False if they are."""
    first, second = columns[p].copy(), columns[q].copy()
    app, aqq, apq = (float(folded(a * b)) for a, b in ((first, first), (second, second), (first, second)))
    if abs(apq) <= ORTHOGONAL * (math.sqrt(app) * math.sqrt(aqq)):
        return False
    tau = (aqq - app) / (2 * apq)
    t = math.copysign(1.0, tau) / (abs(tau) + math.sqrt(1 + tau * tau))
    c = 1 / math.sqrt(1 + t * t)
    s = t * c
    columns[p], columns[q] = c * first - s * second, s * first + c * second
    return True


def auto_rate(found: Moments, *, fit_intercept: bool, l2: np.ndarray) -> float:
    """The rate at which gradient descent converges fastest, to nine digits; 1 if no direction is curved.

    `2 / (smallest + largest)` of the eigenvalues above rounding (Polyak, "Introduction to Optimization", 1987, 1.4).
    """
    matrix = root(found, fit_intercept=fit_intercept, l2=l2)
    values = singular_values(matrix)
    largest = float(values.max())
    if not largest > 0:
        return 1.0
    smallest = float(values[values > largest * max(matrix.shape) * EPSILON].min())
    return float(f"{2 / (2 * smallest**2 + 2 * largest**2):.8e}")
