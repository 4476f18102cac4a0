"""Update rules on flat float64 vectors.

Legend: `P` parameters, `s` slots (extra vectors that a rule keeps). A rule is a pure function, so the same compiled
update runs on every topology. The rules follow Keras' definitions, so results compare with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

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


@dataclasses.dataclass(frozen=True)
class Rate:
    """A learning rate over the steps: constant, then `1 / (1 / first + curvature * (step - hold))`.

    Such a decay, with the inverse Hessian as the metric, is as efficient as any method that sees each row once (Bottou
    and LeCun, "Large scale online learning", 2003); the constant beginning forgets where training started (Bottou,
    Curtis and Nocedal, "Optimization methods for large-scale machine learning", 2018, 4.1).

    Attributes:
        first: the rate of the first steps.
        hold: steps that it is kept for; infinite for a constant rate.
        curvature: the least one of the loss in the metric.
    """

    first: float
    hold: float = math.inf
    curvature: float = 1.0

    def at(self, step: tf.Tensor) -> tf.Tensor | float:
        """The rate of a step, which counts from 1, float64."""
        if math.isinf(self.hold):
            return self.first
        behind = tf.maximum(step - self.hold, tf.zeros_like(step))
        return tf.ones_like(step) / (1 / self.first + self.curvature * behind)


def metric_sgd(rate: Rate, metric: np.ndarray) -> Optimizer:
    """`theta <- theta - rate * metric g`: gradient descent in the metric of a matrix, such as an inverse Hessian.

    Args:
        rate: over the steps.
        metric: float64 `[P, P]`, symmetric.
    """

    def update(theta: tf.Tensor, slots: tf.Tensor, g: tf.Tensor, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # A sum of products, whose bits do not follow the number of threads as those of a product of matrices do.
        direction = tf.reduce_sum(tf.constant(metric) * g, 1)
        return theta - rate.at(step) * direction, slots

    return Optimizer(0, update)


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
