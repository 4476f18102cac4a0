"""Update rules on flat float64 vectors.

Legend: `P` parameters, `s` slots (extra vectors that a rule keeps). A rule is a pure function, so the same compiled
update runs on every topology. The rules follow Keras' definitions, so results compare with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.config import TrainConfig

# (parameters [P], slots [s, P], gradient [P], step) -> (parameters [P], slots [s, P]); `step` counts from 1, float64.
Update = Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An update rule.

    Attributes:
        num_slots: `s`.
        update: the rule.
    """

    num_slots: int
    update: Update


def sgd(learning_rate: float) -> Optimizer:
    """`theta <- theta - learning_rate * g`."""
    return Optimizer(0, lambda theta, slots, g, step: (theta - learning_rate * g, slots))


def momentum(learning_rate: float, mu: float, *, nesterov: bool) -> Optimizer:
    """Heavy ball (Polyak 1964) or Nesterov's momentum, in the form of Sutskever et al. (2013).

    `v <- mu * v - learning_rate * g`, then `theta <- theta + v`, or with Nesterov
    `theta <- theta + mu * v - learning_rate * g`.
    """

    def update(theta: tf.Tensor, slots: tf.Tensor, g: tf.Tensor, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        push = learning_rate * g
        velocity = mu * slots[0] - push
        return theta + (mu * velocity - push if nesterov else velocity), velocity[tf.newaxis]

    return Optimizer(1, update)


def adam(learning_rate: float, beta_1: float, beta_2: float, epsilon: float) -> Optimizer:
    """Adam (Kingma and Ba 2015), in the efficient form at the end of their section 2.

    `theta <- theta - learning_rate * sqrt(1 - beta_2**t) / (1 - beta_1**t) * m / (sqrt(v) + epsilon)`.
    """

    def update(theta: tf.Tensor, slots: tf.Tensor, g: tf.Tensor, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        first = slots[0] + (g - slots[0]) * (1 - beta_1)
        second = slots[1] + (g * g - slots[1]) * (1 - beta_2)
        # Constants of the right type at once: a cast would take a Python float through float32.
        rate = learning_rate * tf.sqrt(1 - tf.pow(tf.constant(beta_2, g.dtype), step))
        rate /= 1 - tf.pow(tf.constant(beta_1, g.dtype), step)
        return theta - rate * first / (tf.sqrt(second) + epsilon), tf.stack([first, second])

    return Optimizer(2, update)


def from_config(config: TrainConfig, *, auto_rate: float | None = None) -> Optimizer:
    """The rule that `--optimizer` names.

    Args:
        config: the run's settings.
        auto_rate: what `--learning_rate=auto` stands for.
    """
    rate = auto_rate if isinstance(config.learning_rate, str) else config.learning_rate
    assert rate is not None, "--learning_rate=auto must be settled before"
    if config.optimizer == "sgd":
        return sgd(rate)
    if config.optimizer == "adam":
        return adam(rate, config.adam_beta_1, config.adam_beta_2, config.adam_epsilon)
    return momentum(rate, config.momentum, nesterov=config.optimizer == "nesterov")
