"""Update rules against NumPy's arithmetic and against Keras."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import Rule

from tapedist.config import OPTIMIZERS, TrainConfig
from tapedist.training.optimizers import Optimizer, from_config

STEPS = 200
RATE = 0.02
# Keras keeps its constants in float32, which its adam shows in proportion to the way gone.
KERAS_RATE = 0.005


def _gradients() -> np.ndarray:
    """One vector a step, of sizes from 1e-6 to 1e3, with an exact zero."""
    random = np.random.Generator(np.random.Philox(4))
    gradients = random.standard_normal((STEPS, 5)) * 10.0 ** np.array([-6, -1, 0, 3, 0])
    gradients[:, 4] = 0.0
    return gradients


def _path(optimizer: Optimizer) -> np.ndarray:
    """Parameters after each step, `[STEPS, 5]`."""
    theta, slots, path = np.linspace(-1, 1, 5), optimizer.fresh_slots(5).reshape(-1, 5), []
    for step, gradient in enumerate(_gradients()):
        theta, slots = optimizer.rule(
            tf.constant(theta), tf.constant(slots), tf.constant(gradient), tf.constant(step + 1.0, "double"),
            *optimizer.constants,
        )  # fmt: skip
        path.append(theta)
    return np.array(path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numpy_agrees(name: str):
    optimizer = from_config(TrainConfig(optimizer=name, learning_rate=RATE))
    found = _path(optimizer)
    rule, theta = Rule(name, RATE, 5), np.linspace(-1, 1, 5)
    for step, gradient in enumerate(_gradients()):
        theta = rule(theta, gradient)
        np.testing.assert_allclose(found[step], theta, rtol=1e-12, atol=1e-15, err_msg=f"diverged at step {step}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keras_agrees(name: str):
    optimizer = from_config(TrainConfig(optimizer=name, learning_rate=KERAS_RATE))
    found = _path(optimizer)
    peer = {
        "sgd": keras.optimizers.SGD(KERAS_RATE),
        "momentum": keras.optimizers.SGD(KERAS_RATE, momentum=0.9),
        "nesterov": keras.optimizers.SGD(KERAS_RATE, momentum=0.9, nesterov=True),
        "adam": keras.optimizers.Adam(KERAS_RATE),
    }[name]
    theta = keras.Variable(np.linspace(-1, 1, 5), dtype="float64")
    for step, gradient in enumerate(_gradients()):
        peer.apply([tf.constant(gradient)], [theta])
        scale = np.abs(found[: step + 1]).max(0)
        assert (np.abs(found[step] - theta.numpy()) <= 1e-6 * np.maximum(1.0, scale)).all(), f"diverged at step {step}"


def test_settings_reach_the_rule():
    config = TrainConfig(optimizer="adam", learning_rate=0.1, adam_beta_1=0.5, adam_beta_2=0.6, adam_epsilon=0.01)
    rule = Rule("adam", 0.1, 5, betas=(0.5, 0.6), epsilon=0.01)
    theta = np.linspace(-1, 1, 5)
    for gradient in _gradients():
        theta = rule(theta, gradient)
    np.testing.assert_allclose(_path(from_config(config))[-1], theta, rtol=1e-12)
    heavy = from_config(TrainConfig(optimizer="momentum", momentum=0.5, learning_rate=RATE))
    other = from_config(TrainConfig(optimizer="momentum", learning_rate=RATE))
    assert not np.allclose(_path(heavy), _path(other))


def test_the_found_rate_stands_for_auto():
    config = TrainConfig(learning_rate="auto")
    with pytest.raises(AssertionError, match="must be settled"):
        from_config(config)
    optimizer = from_config(config, auto_rate=0.5)
    theta, _ = optimizer.rule(tf.ones(2, "double"), tf.zeros([0, 2]), tf.ones(2, "double"), 1, *optimizer.constants)
    assert theta.numpy().tolist() == [0.5, 0.5]
