"""The triangular factor of centred second moments, and what it says about rank.

Cholesky's factorisation with diagonal pivoting (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed.,
10.3) in double-double arithmetic. Its factor is the `R` of a pivoted QR factorisation of the centred rows.

Legend: `d` features, `r` the rank. Columns are in scaled units.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tapedist.results.extended import Extended

# A column is dependent where less is left of it than a few roundings of the data could have made.
_ROUNDINGS = 4.0
# Parts of a dependency below this share of a column are rounding.
_NEGLIGIBLE = 1e-6
_ABOUT = 0.9


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """`products[order][:, order] = upper' @ upper` up to dependent columns.

    Attributes:
        order: feature numbers, the `r` independent ones first.
        rank: `r`.
        upper: `[r, d]`, upper trapezoidal, columns in `order`.
        target: `[r]`, the target's part: `upper' @ target` are its products with the features.
        residual: the target's sum of squares that the features leave; 0 where it is rounding.
        dependencies: for each dependent feature, its number and the numbers of the features that make it.
    """

    order: list[int]
    rank: int
    upper: Extended
    target: Extended
    residual: float
    dependencies: list[tuple[int, list[int]]]

    @property
    def independent(self) -> list[int]:
        return self.order[: self.rank]

    def condition_number(self) -> float | None:
        """2-norm condition of the independent columns at unit length; None if there are none."""
        if not self.rank:
            return None
        square = self.upper.hi[:, : self.rank]
        singular = np.linalg.svd(square / np.linalg.norm(square, axis=0), compute_uv=False)
        return float(singular[0] / singular[-1])

    def coefficients(self) -> Extended:
        """`[r]`: the optimum's weights of the independent features, the others being 0."""
        return solve_upper(self.upper[:, : self.rank], self.target[:, None])[:, 0]

    def inverse(self) -> Extended:
        """`[r, r]`: the inverse of the square part of `upper`."""
        return solve_upper(self.upper[:, : self.rank], Extended.of(np.eye(self.rank)))


def solve_upper(upper: Extended, right: Extended) -> Extended:
    """`upper**-1 @ right` for an upper triangular `[r, r]` and `right [r, m]`."""
    rest, solution = right.copy(), Extended.zeros(*right.shape)
    for k in reversed(range(upper.shape[0])):
        solution[k] = rest[k] / upper[k, k]
        rest[:k] = rest[:k] - upper[:k, k, None] * solution[None, k, :]
    return solution


def factorise(products: Extended, rounding: np.ndarray) -> Factor:
    """Factorises `[d + 1, d + 1]` products, the target last.

    Args:
        products: weighted sums of products of the centred columns.
        rounding: float64 `[d + 1]`, the sum of squares that one rounding of each column's raw numbers can make.
    """
    count = products.shape[0] - 1
    rounding = _ROUNDINGS**2 * rounding
    original = np.diag(products.hi)[:count].copy()
    rows = Extended.zeros(count, count + 1)
    chosen: list[int] = []
    dependencies: list[tuple[int, list[int]]] = []
    rest, left = products, list(range(count))
    while left:
        diagonal = np.diag(rest.hi)[:-1]
        share = np.divide(diagonal, original[left], out=np.zeros(len(left)), where=diagonal > 0)
        # Among columns about as independent, the earliest: so it is the later ones that are named as dependent.
        place = int(np.argmax(share >= _ABOUT * share.max()))
        column = left.pop(place)
        kept = [k for k in range(len(left) + 2) if k != place]
        parts = _back_substituted(rows.hi[: len(chosen), chosen], rows.hi[: len(chosen), column])
        if diagonal[place] <= rounding[column] + parts**2 @ rounding[chosen]:
            large = np.abs(parts) * np.sqrt(original[chosen]) > _NEGLIGIBLE * np.sqrt(original[column])
            dependencies.append((column, [c for c, is_large in zip(chosen, large, strict=True) if is_large]))
            rest = rest[np.ix_(kept, kept)]
            continue
        root = rest[place, place].sqrt()
        row = rest[place][kept] / root
        rows[len(chosen), column] = root
        rows[len(chosen), [*left, count]] = row
        chosen.append(column)
        rest = rest[np.ix_(kept, kept)] - row[:, None] * row[None, :]
    order, r = chosen + [column for column, _ in dependencies], len(chosen)
    upper, target = rows[:r][:, order], rows[:r, count]
    noise = rounding[count] + _back_substituted(upper.hi[:, :r], target.hi) ** 2 @ rounding[chosen]
    residual = float(rest.hi[0, 0])
    return Factor(order, r, upper, target, residual if residual > noise else 0.0, dependencies)


def _back_substituted(upper: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`upper**-1 @ right` in float64, for one right-hand side."""
    solution = right.copy()
    for k in reversed(range(len(right))):
        solution[k] /= upper[k, k]
        solution[:k] -= upper[:k, k] * solution[k]
    return solution
