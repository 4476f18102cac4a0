"""Extreme singular values, by operations of which the order is fixed: no library's bits are in them.

Legend: `[n, P]` the matrix.
"""

from __future__ import annotations

import math

import numpy as np

from tapedist.data.exact_arithmetic import folded

_HALVINGS = 128


def extremes(matrix: np.ndarray) -> tuple[float, float, int]:
    """The largest singular value, the smallest one above `max(n, P) * 2**-52` of it, and how many there are up to it.

    By the reflections of Golub and Kahan and by bisection of what they leave (Golub and Van Loan, "Matrix
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
    """The largest singular value over the smallest one; infinite without one that bisection can tell from 0."""
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
    mirror[0] += np.copysign(length, mirror[0])
    along = folded(mirror[:, np.newaxis] * others, axis=0) * (2 / folded(mirror * mirror))
    return float(length), others - np.multiply.outer(mirror, along)


def _number(place: int, squares: list[float], most: float) -> float:
    """The singular value of which `place` are no smaller, by bisection from 0 to `most`."""
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _at_least(middle, squares) >= place else (low, middle)
    return low


def _at_least(bound: float, squares: list[float]) -> int:
    """How many singular values are at least `bound`, above 0.

    They and their negatives are the eigenvalues of a tridiagonal matrix with the band beside a diagonal of zeros, of
    which Sturm's sequence counts those below (Golub and Van Loan, 8.4.1 and 8.6.1).
    """
    below, pivot = 0, -bound
    for square in squares:
        below += pivot < 0
        pivot = -bound - square / (pivot or -1e-300)
    return len(squares) + 1 - below - (pivot < 0)
