"""Sums over the rows of a step: the loss, the weights and the gradient. The interface of its three implementations.

`LinearSums` (`linear_sums.py`) are exact sums of a linear model, which have no order. `ModuleSums` (`tape_sums.py`) are
those of any other model: rows are summed in pieces of one shape, and pieces are added exactly, in any order.
`PlainSums`, in the same file, are ordinary floating-point sums. The gradient comes from a tape in all of them.

Legend: `d` features, `P` parameters, `T` rows of a tile, `n` tiles, `K` sums of a step.

Rows are `(x, y[, w])`: tiles of `[n, d, T]`, or `[n, T, d]` for `ModuleSums` and `PlainSums`, and `[n, T]`. The first
`count` rows of consecutive tiles are real; what is behind them, and where the weight is 0, must be zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import tensorflow as tf

Rows = tuple[tf.Tensor, ...]


class Totals(NamedTuple):
    """Sums over all rows of a step.

    Attributes:
        loss: `sum w * loss`, float64 `[]`.
        weight: `sum w`.
        gradient: `[P]`, of the loss.
        rows: how many rows were summed.
        ok: whether the numbers were within the bounds of the arithmetic, boolean `[]`.
    """

    loss: tf.Tensor
    weight: tf.Tensor
    gradient: tf.Tensor
    rows: tf.Tensor
    ok: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Slot:
    """The tiles of one step among those of others.

    Attributes:
        first: int32, the number of the first tile.
        tiles: the number of tiles.
        rough: whether the loss may be summed on its first grid alone.
    """

    first: tf.Tensor | int
    tiles: int
    rough: bool = False


class RowSums(Protocol):
    """One way to sum rows.

    Attributes:
        whole: whether many tiles may be summed inside a larger program; else a tile's program must be compiled alone,
            because what surrounds it could change its bits.
        row_major: whether tiles are `[T, d]` rather than `[d, T]`.
        zero: of the sums, before a row is in them.
    """

    whole: bool
    row_major: bool

    @property
    def zero(self) -> tf.Tensor: ...

    def of_tiles(
        self,
        theta: tf.Tensor,
        bounds: tf.Tensor,
        rows: Rows,
        count: tf.Tensor,
        slot: Slot | None = None,
    ) -> tf.Tensor:
        """Sums of some tiles, to be added to others' in any order.

        Args:
            theta: float64 `[P]`, the parameters.
            bounds: float64 `[d + 2]`, `Bounds.largest`.
            rows: see the module's docstring.
            count: int32, the real rows.
            slot: the tiles to sum, if they are all that the step sums. None for all tiles of `rows`, to whose sums
                others are added.
        """

    def total(self, theta: tf.Tensor, bounds: tf.Tensor, sums: tf.Tensor) -> Totals:
        """Converts the sums of all rows to numbers."""


def value_and_gradient(function: Callable[[tf.Tensor], tf.Tensor], at: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A scalar function of one tensor, and its gradient there."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(at)
        value = function(at)
    return value, tape.gradient(value, at)
