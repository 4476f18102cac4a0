"""Per-example losses: pure functions `(y_hat, y) -> loss`, all of shape `[k]`.

The weighted mean over rows is taken elsewhere, once, with one global denominator (`partials.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

Loss = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def squared(y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """`(y_hat - y)**2`, without the factor 1/2."""
    return tf.math.squared_difference(y_hat, y)


def absolute(y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """`|y_hat - y|`; its gradient at 0 is taken as 0."""
    return tf.abs(y_hat - y)


@functools.cache  # One function for each delta, by which compiled programs are found again.
def huber(delta: float) -> Loss:
    """Squared near 0 and linear beyond `delta` (Huber, "Robust estimation of a location parameter", 1964).

    `r**2 / 2` where `|r| <= delta`, else `delta * (|r| - delta / 2)`, with `r = y_hat - y`.
    """

    def huber_loss(y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        size = tf.abs(y_hat - y)
        # Clipped rather than selected, so that the gradient has no branch that could overflow.
        near = tf.minimum(size, tf.constant(delta, size.dtype))
        return near * (size - near / 2)

    return huber_loss


def by_name(name: str, *, huber_delta: float) -> Loss:
    """The loss that `--loss` names."""
    return {"squared": squared, "absolute": absolute, "huber": huber(huber_delta)}[name]


def is_own(loss: Loss) -> bool:
    """Whether a loss is the user's, so that it need not be finite where both its arguments are zero."""
    return getattr(loss, "__module__", "") != __name__


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
