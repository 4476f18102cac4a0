"""Per-example losses: pure functions `(y_hat, y) -> loss`, all of shape `[k]`.

The weighted mean over rows is taken in `steps.py`, once, with one global denominator.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import tensorflow as tf

from tapedist.training.exact import times

Loss = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class ResidualLoss:
    """One of the package's losses; they depend on the residual `r = y_hat - y` alone.

    Attributes:
        name: "squared" for `r**2`, without the factor 1/2; "absolute" for `|r|`, whose gradient at 0 is taken as 0; or
            "huber": `r**2 / 2` where `|r| <= delta`, else `delta * (|r| - delta / 2)` (Huber, "Robust estimation of a
            location parameter", 1964).
        delta: where the huber loss turns from squared to linear.
    """

    name: str
    delta: float = math.inf

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        residual = y_hat - y
        if self.name == "squared":
            return times(residual, residual)
        size = tf.abs(residual)
        if self.name == "absolute":
            return size
        # `near * |r| - near**2 / 2` is both branches in one: `r**2 / 2` where `near` is `|r|`, else the line. Clipped
        # rather than selected, so that the gradient has no branch that could overflow.
        near = tf.minimum(size, tf.constant(self.delta, size.dtype))
        return times(near, size) - times(near, near) * 0.5

    def largest_slope(self, residual: tf.Tensor) -> tf.Tensor:
        """A bound of `|dloss / dr|` for residuals up to a float64 bound; of squared error, of half the slope."""
        if self.name == "absolute":
            return tf.ones_like(residual)
        return residual if self.name == "squared" else tf.minimum(residual, tf.constant(self.delta, tf.float64))


squared = ResidualLoss("squared")
absolute = ResidualLoss("absolute")


def huber(delta: float) -> ResidualLoss:
    """The huber loss that turns linear at `delta`."""
    return ResidualLoss("huber", delta)


def by_name(name: str, *, huber_delta: float) -> ResidualLoss:
    """The loss that `--loss` names."""
    return huber(huber_delta) if name == "huber" else ResidualLoss(name)


def is_custom(loss: Loss) -> bool:
    """Returns whether a loss is the user's own."""
    return not isinstance(loss, ResidualLoss)


def checked(loss: Loss) -> Loss:
    """`loss`, refusing shapes that would broadcast.

    Raises:
        ValueError: when traced, if predictions, targets or losses are not all of the same shape `[k]`.
    """

    def checked_loss(y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        if y_hat.shape.rank != 1 or y_hat.shape != y.shape:
            raise ValueError(
                f"model output of shape {y_hat.shape} for targets of shape {y.shape}: both must be [k]; "
                "drop the last axis of the output with tf.squeeze(y_hat, 1)"
            )
        values = loss(y_hat, y)
        if values.shape != y.shape:
            raise ValueError(f"loss of shape {values.shape} for targets of shape {y.shape}: must be one per example")
        return values

    return checked_loss
