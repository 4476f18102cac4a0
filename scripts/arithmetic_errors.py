"""How far sums are from the exact ones: the specified arithmetic beside plain float32 and float64 sums.

    python scripts/arithmetic_errors.py [--rows=2000]

Prints the table of measured errors in `docs/arithmetic.md`, in seconds. The exact sums are of fractions, over the rows
as they are rounded to the type they are trained in, at the same float64 parameters.

Legend: `n` rows, `d` features, `P = d + 1` parameters.
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tapedist import reference as ref


class Case(NamedTuple):
    """Rows and where the gradient is taken."""

    x: np.ndarray
    y: np.ndarray
    w: np.ndarray | None
    theta: np.ndarray


class Sums(NamedTuple):
    """Means over rows: the loss, the gradient `[P]`, the covariances `[d + 1, d + 1]`."""

    loss: float
    gradient: np.ndarray
    covariance: np.ndarray


def cases(n: int) -> dict[str, Case]:
    """Rows of three features by name."""
    g = np.random.default_rng(0)
    x, noise, truth = g.normal(size=(n, 3)), 0.1 * g.normal(size=n), np.array([1.5, -2.0, 0.75])
    outlier = x.copy()
    outlier[n // 2, 0] = 1e6
    weights = 10.0 ** -g.uniform(0, 12, n)

    def near(x: np.ndarray, noise: np.ndarray, w: np.ndarray | None = None) -> Case:
        y = x @ truth + 0.5 + noise
        root = np.sqrt(np.ones(len(y)) if w is None else w)
        design = np.column_stack([x, np.ones(len(y))])
        best = np.linalg.lstsq(design * root[:, np.newaxis], y * root, rcond=None)[0]
        return Case(x, y, w, best * (1 + 1e-6 * np.array([1, -1, 1, -1])))

    return {
        "normal, far from the optimum": near(x, noise)._replace(theta=np.zeros(4)),
        "normal, near the optimum": near(x, noise),
        "perfect fit, near the optimum": near(x, 0 * noise),
        "offset 1e6": near(x + 1e6, noise),
        "an outlier of 1e6 deviations": near(outlier, noise),
        "weights over 12 decades": near(x, noise, weights),
        "one row": near(x, noise)._replace(x=x[:1], y=x[:1] @ truth + noise[:1]),
    }


def specified(case: Case, kind: ref.Kind, rows: ref.Chunk) -> Sums:
    """By the specification."""
    problem = ref.Problem(dtype=np.dtype(kind.dtype).name)
    found = ref.ranges([(case.x, case.y, case.w)])
    limits, columns = ref.bounds(found, kind), ref.columns_of(found, kind)
    totals = ref.totals(case.theta, [rows], limits, problem)
    loss, weight, gradient = ref.loss_and_gradient_sums(case.theta, totals, limits, problem)
    moments = ref.moments(ref.moment_integers([rows], columns), columns)
    return Sums(loss / weight, gradient / weight, moments.centred / moments.sum_weights)


def plain(case: Case, dtype: type, rows: ref.Chunk) -> Sums:
    """By NumPy's sums and products in `dtype`; covariances about means that were summed first."""
    x, y = (column.astype(dtype) for column in rows[:2])
    w = np.ones(len(y), dtype) if rows[2] is None else rows[2].astype(dtype)
    theta = case.theta.astype(dtype)
    design = np.column_stack([x, np.ones(len(y), dtype)])
    r = design @ theta - y
    columns = np.column_stack([x, y])
    columns = columns - (w @ columns) / w.sum()
    weight = w.sum()
    return Sums(
        float((w * r) @ r / weight),
        (2 * ((w * r) @ design) / weight).astype(float),
        ((columns * w[:, np.newaxis]).T @ columns / weight).astype(float),
    )


class Exact(NamedTuple):
    """Exact means, and those of the terms' sizes by which the gradient's errors are measured."""

    loss: Fraction
    gradient: list[Fraction]
    sizes: list[Fraction]
    covariance: list[list[Fraction]]


def exact(case: Case, rows: ref.Chunk) -> Exact:
    """By fractions."""
    columns = [[Fraction(v) for v in column] for column in np.column_stack([rows[0], rows[1]]).T.tolist()]
    w = [Fraction(v) for v in (np.ones(len(rows[1])) if rows[2] is None else rows[2]).tolist()]
    theta = [Fraction(v) for v in case.theta.tolist()]
    total = sum(w, Fraction(0))
    one = [Fraction(1)] * len(w)
    design = [*columns[:-1], one]
    r = [sum((a * b for a, b in zip(row, theta, strict=True)), Fraction(0)) for row in zip(*design, strict=True)]
    r = [a - b for a, b in zip(r, columns[-1], strict=True)]
    means = [_mean(column, one, w, total) for column in columns]
    centred = [[a - mean for a in column] for column, mean in zip(columns, means, strict=True)]
    return Exact(
        _mean(r, r, w, total),
        [2 * _mean(r, column, w, total) for column in design],
        [2 * _mean([abs(v) for v in r], [abs(v) for v in column], w, total) for column in design],
        [[_mean(a, b, w, total) for b in centred] for a in centred],
    )


def _mean(a: list[Fraction], b: list[Fraction], w: list[Fraction], total: Fraction) -> Fraction:
    return sum((p * q * v for p, q, v in zip(a, b, w, strict=True)), Fraction(0)) / total


def errors(found: Sums, true: Exact) -> tuple[float, float, float]:
    """Of the loss, of itself; of the gradient, of the mean size of its terms; of covariances, of the deviations."""
    gradient = [
        float(abs(Fraction(float(a)) - b) / size) if size else 0.0
        for a, b, size in zip(found.gradient, true.gradient, true.sizes, strict=True)
    ]
    deviations = np.sqrt([float(true.covariance[j][j]) for j in range(len(true.covariance))])
    covariance = [
        float(abs(Fraction(float(found.covariance[i, j])) - true.covariance[i][j])) / (deviations[i] * deviations[j])
        for i in range(len(deviations))
        for j in range(len(deviations))
        if deviations[i] and deviations[j]
    ]
    loss = float(abs(Fraction(found.loss) - true.loss) / true.loss) if true.loss else 0.0
    return loss, max(gradient), max(covariance, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    n = parser.parse_args().rows
    print("| type | rows | loss | plain | gradient | plain | covariances | plain |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype, kind in ref.KINDS.items():
        for name, case in cases(n).items():
            rows = ref.as_trained(case.x, case.y, case.w, kind)
            true = exact(case, rows)
            pairs = zip(
                errors(specified(case, kind, rows), true), errors(plain(case, kind.dtype, rows), true), strict=True
            )
            cells = " | ".join(f"{ours:.1e} | {theirs:.1e}" for ours, theirs in pairs)
            print(f"| {dtype} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
