"""Double-double arithmetic: about 106 bits from pairs of float64, on whole arrays.

A value is the exact sum `hi + lo` with `|lo| <= ulp(hi) / 2`. Sums and products are exact before their one rounding
(two-sum: Knuth, "The Art of Computer Programming" vol. 2, 4.2.2; two-product: Dekker, "A floating-point technique
for extending the available precision", 1971), and the four operations keep a relative error of a few 2**-104 (Hida,
Li and Bailey, "Algorithms for quad-double precision floating point arithmetic", 2001).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tapedist.data.exact_arithmetic import Floats, two_product, two_sum


def _quick_two_sum(a: Floats, b: Floats) -> tuple[Any, Any]:
    """`two_sum` where `|a| >= |b|`, in half of its operations."""
    total = a + b
    return total, b - (total - a)


@dataclasses.dataclass(frozen=True, eq=False)
class Extended:
    """An array of double-double numbers.

    Attributes:
        hi: float64 array, the value rounded to float64.
        lo: float64 array of the same shape, what the rounding left.
    """

    hi: np.ndarray
    lo: np.ndarray

    # Without it NumPy would make `array + extended` an array of objects; with it, NumPy calls `__radd__`.
    __array_ufunc__ = None

    @classmethod
    def of(cls, value: Any) -> Extended:
        """Returns an `Extended` as it is, and converts anything else by way of float64."""
        if isinstance(value, Extended):
            return value
        hi = np.array(value, np.float64)
        return cls(hi, np.zeros_like(hi))

    @classmethod
    def zeros(cls, *shape: int) -> Extended:
        return cls(np.zeros(shape), np.zeros(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.hi.shape

    @property
    def T(self) -> Extended:
        return Extended(self.hi.T, self.lo.T)

    def __getitem__(self, key: Any) -> Extended:
        return Extended(np.asarray(self.hi[key]), np.asarray(self.lo[key]))

    def __setitem__(self, key: Any, value: Any) -> None:
        value = Extended.of(value)
        self.hi[key], self.lo[key] = value.hi, value.lo

    def copy(self) -> Extended:
        return Extended(self.hi.copy(), self.lo.copy())

    def __neg__(self) -> Extended:
        return Extended(-self.hi, -self.lo)

    def __add__(self, other: Any) -> Extended:
        other = Extended.of(other)
        high, error = two_sum(self.hi, other.hi)
        low, low_error = two_sum(self.lo, other.lo)
        # Two renormalisations: the form of Hida, Li and Bailey that keeps its error bound under cancellation.
        high, error = _quick_two_sum(high, error + low)
        return Extended(*_quick_two_sum(high, error + low_error))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Extended:
        return self + -Extended.of(other)

    def __rsub__(self, other: Any) -> Extended:
        return -self + other

    def __mul__(self, other: Any) -> Extended:
        other = Extended.of(other)
        high, error = two_product(self.hi, other.hi)
        # `lo * lo` is below the last bit of the result.
        return Extended(*_quick_two_sum(high, error + (self.hi * other.lo + self.lo * other.hi)))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Extended:
        other = Extended.of(other)
        # Long division: three float64 digits of the quotient, each from what the digits before it leave.
        first = self.hi / other.hi
        rest = self - other * first
        second = rest.hi / other.hi
        rest = rest - other * second
        return Extended.of(first) + second + rest.hi / other.hi

    def __rtruediv__(self, other: Any) -> Extended:
        return Extended.of(other) / self

    def scaled(self, powers: Any) -> Extended:
        """Times powers of two: exact, and without the overflow of a product's parts."""
        return Extended(self.hi * powers, self.lo * powers)

    def sqrt(self) -> Extended:
        """Square root; every element must be positive. One Newton step from the float64 root doubles its digits."""
        root = np.sqrt(self.hi)
        rest = self - Extended(*two_product(root, root))
        return Extended.of(root) + rest.hi / (2 * root)

    def sum(self, axis: int = 0) -> Extended:
        """Sum over one axis, in order."""
        # One slice after the other: NumPy's own sum knows nothing of `lo`, and adds in an order of its own.
        total = Extended.of(np.zeros(np.delete(self.shape, axis)))
        for hi, lo in zip(np.moveaxis(self.hi, axis, 0), np.moveaxis(self.lo, axis, 0), strict=True):
            total = total + Extended(hi, lo)
        return total

    def matmul(self, other: Extended) -> Extended:
        """`self @ other` for `[n, k]` and `[k]` or `[k, m]`."""
        # A sum of outer products, in order, without a BLAS, whose last bits depend on threads.
        vector = len(other.shape) == 1
        right = other[:, None] if vector else other
        total = Extended.zeros(self.shape[0], right.shape[1])
        for k in range(self.shape[1]):
            total = total + self[:, k, None] * right[None, k, :]
        return total[:, 0] if vector else total
