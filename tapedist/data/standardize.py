"""Columns of mean 0 and deviation 1, and the way back: training sees the one, everybody else the raw units.

Legend: `n` rows, `d` features, `P` parameters (the weights, then the bias if there is one).

    x_s = (x - center) / scale        w = w_s / scale
    y_s = y - target_center           b = b_s + target_center - sum_j center_j * w_j

The target is shifted but not scaled, so that every loss that depends on the difference alone keeps its value and its
units. A feature that is left out is 0 in every row that training sees, and so is its weight.
Without an intercept nothing can be shifted: centers are 0, and a column's scale is its root mean square.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from tapedist.data.exact_moments import MOST, ExactMoments, exact_moments
from tapedist.data.layout import RowNumbers, Units
from tapedist.data.ranges import ranges
from tapedist.data.source import Ranges, Source
from tapedist.errors import InputError
from tapedist.text import display

_LEAST_SCALE = 2.0**-1021  # Of which the reciprocal and some multiples of it are finite.
_ROUNDINGS = 4.0  # A column that varies by no more than so many roundings is constant, as in `regression.factor`.


class RawUnits:
    """Parameters that are in raw units already."""

    left_out: tuple[int, ...] = ()

    def rows(self, source: Source) -> Source:
        """The source's rows as training sees them."""
        return source

    def to_raw(self, parameters: np.ndarray) -> np.ndarray:
        return np.array(parameters, np.float64)

    def at_center(self, parameters: np.ndarray) -> tuple[np.ndarray | None, float | None]:
        return None, None

    def from_raw(self, parameters: np.ndarray, center: np.ndarray | None = None, at_center: float = 0.0) -> np.ndarray:
        return np.array(parameters, np.float64)

    def penalized(self, penalized: np.ndarray) -> np.ndarray:
        return penalized


@dataclasses.dataclass(frozen=True, eq=False)
class StandardUnits:
    """What is subtracted from the columns and what they are divided by.

    Attributes:
        center: float64 `[d]`.
        scale: float64 `[d]`, positive.
        target_center: subtracted from the target.
        fit_intercept: whether the last parameter is a bias.
        left_out: numbers of the features that training sees as 0.
    """

    center: np.ndarray
    scale: np.ndarray
    target_center: float
    fit_intercept: bool
    left_out: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, source: Source, *, fit_intercept: bool, center_target: bool = True, left_out: Sequence[int] = (),
        columns: ColumnMoments | None = None,
    ) -> StandardUnits:  # fmt: skip
        """Units of mean 0 and deviation 1.

        Args:
            source: the rows.
            fit_intercept: whether there is a bias to take up the shift.
            center_target: whether the target may be shifted.
            left_out: numbers of the features that training sees as 0.
            columns: of the training rows; None takes them by two passes.

        Raises:
            InputError: if a column's squares overflow, or the reciprocal of its deviation does.
        """
        columns = columns or ColumnMoments.of(source)
        means, scale = columns.means, (columns.deviations if fit_intercept else columns.sizes)[:-1]
        scale = np.where(scale > 0, scale, 1.0)
        scale[list(left_out)] = 1.0
        _check_reciprocals(source, scale)
        left = tuple(sorted(left_out))
        if not fit_intercept:
            return cls(np.zeros(len(scale)), scale, 0.0, False, left)
        target_center = float(means[-1]) if center_target else 0.0
        return cls(means[:-1], scale, target_center, True, left)

    @classmethod
    def raw(cls, num_features: int, *, fit_intercept: bool, left_out: Sequence[int]) -> RawUnits | StandardUnits:
        """The columns' own units; some features may be left out all the same."""
        if not left_out:
            return RawUnits()
        return cls(np.zeros(num_features), np.ones(num_features), 0.0, fit_intercept, tuple(sorted(left_out)))

    @functools.cached_property
    def factor(self) -> np.ndarray:
        """What centred columns are multiplied by, float64 `[d]`."""
        factor = 1 / self.scale
        factor[list(self.left_out)] = 0.0
        return factor

    def rows(self, source: Source) -> Source:
        """The source's rows as training sees them."""
        return StandardizedSource(source, self)

    def to_raw(self, parameters: np.ndarray) -> np.ndarray:
        """`[P]` in raw units; the bias is the exact value for these weights, rounded once."""
        d = len(self.scale)
        weights = parameters[:d] / self.scale
        weights[list(self.left_out)] = 0.0
        if not self.fit_intercept:
            return weights
        return np.append(weights, _moved(parameters[d], weights, -self.center, less=-self.target_center))

    def at_center(self, parameters: np.ndarray) -> tuple[np.ndarray, float]:
        """`center [d]` and the prediction there in raw units, for parameters `[P]` in the units of training.

        With the weights of `to_raw` they say what its bias says, with digits for rows that are far from 0.
        """
        bias = float(parameters[len(self.scale)]) if self.fit_intercept else 0.0
        return self.center, bias + self.target_center

    def from_raw(self, parameters: np.ndarray, center: np.ndarray | None = None, at_center: float = 0.0) -> np.ndarray:
        """`[P]` in the units of training, of raw ones.

        Args:
            parameters: the weights, then the bias.
            center: where the prediction is known with more digits than the bias has, float64 `[d]`; or None.
            at_center: the prediction there.
        """
        d = len(self.scale)
        raw = np.array(parameters[:d], np.float64)
        weights = raw * self.scale
        weights[list(self.left_out)] = 0.0
        if not self.fit_intercept:
            return weights
        # What a feature that is left out has added at the center stays in the bias.
        if center is None:
            return np.append(weights, _moved(parameters[d], raw, self.center, less=self.target_center))
        return np.append(weights, _moved(at_center, raw, self.center, -center, less=self.target_center))

    def penalized(self, penalized: np.ndarray) -> np.ndarray:
        """Factors of the L2 penalty `[P]` that make it the penalty of the raw weights: the objective stays the same."""
        factors = np.array(penalized, np.float64)
        with np.errstate(over="ignore", under="ignore"):
            squares = (1 / self.scale) ** 2
        # No infinity: times 0 it would be no number.
        factors[: len(self.scale)] *= np.minimum(squares, np.finfo(np.float64).max)
        factors[list(self.left_out)] = 0.0
        return factors


def _moved(bias: float, weights: np.ndarray, *shifts: np.ndarray, less: float = 0.0) -> float:
    """`bias + sum_j (shifts_j) * weights_j - less`, exact but for the last rounding.

    Args:
        bias: the prediction somewhere.
        weights: float64 `[d]`.
        *shifts: float64 `[d]` each, which together lead from there to where it is wanted.
        less: subtracted.
    """
    if not (np.isfinite(weights).all() and np.isfinite(bias)):
        return float("nan")
    total = Fraction(float(bias)) - Fraction(float(less))
    for shift in shifts:
        total += sum(
            (Fraction(s) * Fraction(w) for s, w in zip(shift.tolist(), weights.tolist(), strict=True)), Fraction(0)
        )
    return float(total)


class StandardizedSource(Source):
    """A source whose rows are in standard units.

    Args:
        source: the raw rows.
        units: how they are shifted and scaled.
    """

    def __init__(self, source: Source, units: StandardUnits):
        self._source, self._units = source, units
        self.num_features, self.feature_names = source.num_features, source.feature_names
        self.target_name, self.weighted = source.target_name, source.weighted
        self.weight_exponent = source.weight_exponent
        self.read_by_numpy, self.held_by_tensorflow = source.read_by_numpy, source.held_by_tensorflow
        # TensorFlow shifts and scales rows.
        self.row_major = source.row_major or not source.read_by_numpy

    @property
    def raw(self) -> Source:
        return self._source

    def num_rows(self, split: str) -> int:
        return self._source.num_rows(split)

    def in_units(self, raw: Ranges) -> Ranges:
        """The ranges of these rows, of those of the raw ones: what makes the rows keeps their order."""
        units = self._units
        center, factor = np.append(units.center, units.target_center), np.append(units.factor, 1.0)
        with np.errstate(over="ignore", invalid="ignore"):  # Of a feature that is left out.
            low, high = (np.where(factor == 0, 0.0, (ends - center) * factor) for ends in (raw.low, raw.high))
        return Ranges(low + 0.0, high + 0.0, raw.weight)

    @functools.cached_property
    def holds_tiny(self) -> bool:
        """Whether training may meet numbers other than 0 below 2**-126."""
        center = np.append(self._units.center, self._units.target_center)
        factor = np.append(self._units.factor, 1.0)
        tiny = self._source.holds_tiny
        # A number that differs from its column's center does so by half a unit of the center's last place or more.
        may_be = np.where(center == 0, tiny | (factor < 1), np.abs(center) * factor < 2.0**-60) & (factor != 0)
        return bool(may_be.any()) or (self.weighted and tiny)

    def fingerprint(self) -> str:
        units = self._units
        numbers = np.concatenate([units.center, units.factor, [units.target_center]]).astype("<f8")
        return hashlib.sha256(self._source.fingerprint().encode() + numbers.tobytes()).hexdigest()

    def take(self, split: str, indices: Any) -> tuple[Any, ...]:
        """Rows in standard units, float64."""
        return self._standard(*self._source.take(split, indices))

    def take_runs(self, split: str, first: Any, *, length: int) -> tuple[Any, ...]:
        return self._standard(*self._source.take_runs(split, first, length=length))

    def read_into(self, out: Sequence[np.ndarray], split: str, rows: RowNumbers, *, units: Units | None = None) -> None:
        assert units is None
        own = Units(self._units.center, self._units.factor, self._units.target_center)
        self._source.read_into(out, split, rows, units=own)

    def read_ahead(self, split: str, rows: range) -> None:
        self._source.read_ahead(split, rows)

    def _standard(self, x: Any, y: Any, *rest: Any) -> tuple[Any, ...]:
        import tensorflow as tf

        units = self._units
        x = (tf.cast(x, tf.float64) - units.center) * units.factor
        return x, tf.cast(y, tf.float64) - units.target_center, *rest


@dataclasses.dataclass(frozen=True, eq=False)
class ColumnMoments:
    """Weighted means and deviations of the features and, last, the target over the training rows, each rounded once.

    Attributes:
        means: float64 `[d + 1]`.
        deviations: float64 `[d + 1]`, about the means.
        sizes: float64 `[d + 1]`, deviations from 0: roots of the mean squares.
    """

    means: np.ndarray
    deviations: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, source: Source) -> ColumnMoments:
        """One pass over the training rows for their ranges, where those are not known, and one for the moments.

        Args:
            source: the rows; those of weight 0 do not count, whatever they hold.

        Raises:
            InputError: if a column's squares overflow.
        """
        known = ranges(source, "train")
        check_squares(source, known)
        return cls.of_exact(exact_moments(source, known, products=False))

    @classmethod
    def of_exact(cls, moments: ExactMoments) -> ColumnMoments:
        """What moments that somebody has say of single columns."""
        if not moments.num_rows:
            zeros = np.zeros(len(moments.shift))
            return cls(zeros, zeros, zeros)
        from_mean, from_zero = (moments.deviations(about_mean=about_mean) for about_mean in (True, False))
        return cls(moments.means()[0], from_mean, from_zero)

    def constant(self) -> tuple[int, ...]:
        """Numbers of the features that do not vary but by rounding."""
        rounding = _ROUNDINGS * 2.0**-53 * np.abs(self.means[:-1])
        return tuple(np.flatnonzero(self.deviations[:-1] <= rounding).tolist())


def check_squares(source: Source, known: Ranges) -> None:
    """Whether sums of a few of the numbers fit.

    Args:
        source: the rows.
        known: of them.

    Raises:
        InputError: if not, with the column.
    """
    if known.weight > 0 and (bad := ~(np.maximum(np.abs(known.low), np.abs(known.high)) < MOST)).any():
        name = [*source.feature_names, source.target_name][int(bad.argmax())]
        raise InputError(f"column {display(name)}: its squares overflow float64; use larger units for it")


def _check_reciprocals(source: Source, scale: np.ndarray) -> None:
    bad = np.flatnonzero((scale > 0) & (scale < _LEAST_SCALE))
    if len(bad):
        name = source.feature_names[bad[0]]
        raise InputError(
            f"column {display(name)}: varies by {scale[bad[0]]:g} only, of which the reciprocal overflows "
            "float64; use smaller units for it"
        )
