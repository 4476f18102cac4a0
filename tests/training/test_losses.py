"""Per-example losses: values and gradients against NumPy, and shapes that must not broadcast."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from oracle import LOSSES

from tapedist import config
from tapedist.training.losses import by_name, checked

Y_HAT = np.array([0.0, 1.0, -1.0, 0.999, -1.001, 30.0, 1e200, -1e300])
Y = np.array([0.0, 0.0, 0.0, 0.0, 0.0, -30.0, 0.0, 0.0])


@pytest.mark.parametrize("name", config.LOSSES)
def test_values_and_gradients(name: str):
    last = -2 if name == "squared" else None  # Their squares overflow.
    y_hat, y = Y_HAT[:last], Y[:last]
    with tf.GradientTape() as tape:
        predictions = tf.constant(y_hat)
        tape.watch(predictions)
        losses = by_name(name, huber_delta=1.0)(predictions, tf.constant(y))
    values, slopes = LOSSES[name](y_hat - y)
    np.testing.assert_allclose(losses, values, rtol=1e-15)
    np.testing.assert_allclose(tape.gradient(losses, predictions), slopes, rtol=1e-15)


@pytest.mark.parametrize("delta", [0.1, 1.0, 7.5])
def test_huber_bends_at_delta(delta: float):
    residuals = np.array([0.0, delta / 2, delta, 2 * delta, -3 * delta])
    wanted = np.where(abs(residuals) <= delta, residuals**2 / 2, delta * (abs(residuals) - delta / 2))
    found = by_name("huber", huber_delta=delta)(tf.constant(residuals), tf.zeros(5, tf.float64))
    np.testing.assert_allclose(found, wanted, rtol=1e-15)


@pytest.mark.parametrize(
    ("y_hat", "y"), [([4, 1], [4]), ([4], [4, 1]), ([4, 1], [4, 1]), ([1], [4]), ([], [4]), ([4], [5])]
)
def test_shapes_that_would_broadcast_are_refused(y_hat: list[int], y: list[int]):
    loss = checked(by_name("squared", huber_delta=1.0))
    with pytest.raises(ValueError, match=r"both must be \[k\]"):
        loss(tf.zeros(y_hat), tf.zeros(y))


@pytest.mark.parametrize("shape", [[], [1], [4, 1], [2]])
def test_a_loss_must_be_one_per_example(shape: list[int]):
    with pytest.raises(ValueError, match="must be one per example"):
        checked(lambda y_hat, y: tf.zeros(shape))(tf.zeros(4), tf.zeros(4))
