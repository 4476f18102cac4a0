"""Update rules on flat float64 vectors.

Legend: `P` parameters, `s` slots (extra vectors that a rule keeps). A rule is a pure function, so the same compiled
update runs on every topology. The rules follow Keras' definitions, so results compare with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.config import TrainConfig

# (parameters [P], slots [s, P], gradient [P], step, *constants) -> (parameters [P], slots [s, P]); all float64, and
# `step` counts from 1.
Rule = Callable[..., tuple[tf.Tensor, tf.Tensor]]


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
    """An update rule and its constants.

    Attributes:
        num_slots: `s`.
        rule: a function of the module's, so that runs of other constants are served by one compiled program.
        constants: numbers or float64 arrays, its last arguments.
        told: whether they are tensors to the compiled program, so that one serves all values of them, rather than
            compiled in. Where a rule adds two products, the compiler multiplies and adds one of them without rounding
            in between, and which one depends on what is a constant: such rules would have other bits.
    """

    num_slots: int
    rule: Rule
    constants: tuple[Any, ...] = ()
    told: bool = False

    def update(
        self, theta: tf.Tensor, slots: tf.Tensor, g: tf.Tensor, step: tf.Tensor, constants: Sequence[Any] | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One update, by its own constants or those of another run."""
        return self.rule(theta, slots, g, step, *(self.constants if constants is None else constants))


def sgd(learning_rate: float) -> Optimizer:
    """`theta <- theta - learning_rate * g`."""
    return Optimizer(0, _sgd, (learning_rate,), told=True)


def _sgd(theta: tf.Tensor, slots: tf.Tensor, g: tf.Tensor, step: tf.Tensor, rate: Any) -> tuple[tf.Tensor, tf.Tensor]:
    return theta - rate * g, slots


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


def metric_sgd(rate: Rate, metric: np.ndarray) -> Optimizer:
    """`theta <- theta - rate * metric g`: gradient descent in the metric of a matrix, such as an inverse Hessian.

    Args:
        rate: over the steps.
        metric: float64 `[P, P]`, symmetric.
    """
    return Optimizer(0, _metric_sgd, (rate.first, rate.hold, rate.curvature, metric), told=True)


def _metric_sgd(
    theta: tf.Tensor,
    slots: tf.Tensor,
    g: tf.Tensor,
    step: tf.Tensor,
    first: Any,
    hold: Any,
    curvature: Any,
    metric: Any,
) -> tuple[tf.Tensor, tf.Tensor]:
    behind = tf.maximum(step - hold, tf.zeros_like(step))
    rate = tf.ones_like(step) / (tf.ones_like(step) / first + curvature * behind)
    # A sum of products, whose bits do not follow the number of threads as those of a product of matrices do.
    return theta - rate * tf.reduce_sum(metric * g, 1), slots


def momentum(learning_rate: float, mu: float, *, nesterov: bool) -> Optimizer:
    """Heavy ball (Polyak 1964) or Nesterov's momentum, in the form of Sutskever et al. (2013).

    `v <- mu * v - learning_rate * g`, then `theta <- theta + v`, or with Nesterov
    `theta <- theta + mu * v - learning_rate * g`.
    """

    return Optimizer(1, _nesterov if nesterov else _momentum, (learning_rate, mu))


def _momentum(
    theta: tf.Tensor, slots: tf.Tensor, g: tf.Tensor, step: tf.Tensor, rate: Any, mu: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    velocity = mu * slots[0] - rate * g
    return theta + velocity, velocity[tf.newaxis]


def _nesterov(
    theta: tf.Tensor, slots: tf.Tensor, g: tf.Tensor, step: tf.Tensor, rate: Any, mu: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    push = rate * g
    velocity = mu * slots[0] - push
    return theta + (mu * velocity - push), velocity[tf.newaxis]


def adam(learning_rate: float, beta_1: float, beta_2: float, epsilon: float) -> Optimizer:
    """Adam (Kingma and Ba 2015), in the efficient form at the end of their section 2.

    `theta <- theta - learning_rate * sqrt(1 - beta_2**t) / (1 - beta_1**t) * m / (sqrt(v) + epsilon)`.
    """

    return Optimizer(2, _adam, (learning_rate, beta_1, beta_2, epsilon))


def _adam(
    theta: tf.Tensor,
    slots: tf.Tensor,
    g: tf.Tensor,
    step: tf.Tensor,
    rate: Any,
    beta_1: Any,
    beta_2: Any,
    epsilon: Any,
) -> tuple[tf.Tensor, tf.Tensor]:
    first = slots[0] + (g - slots[0]) * (1 - beta_1)
    second = slots[1] + (g * g - slots[1]) * (1 - beta_2)
    # Constants of the right type at once: a cast would take a Python float through float32.
    step_rate = rate * tf.sqrt(1 - tf.pow(tf.constant(beta_2, g.dtype), step))
    step_rate /= 1 - tf.pow(tf.constant(beta_1, g.dtype), step)
    return theta - step_rate * first / (tf.sqrt(second) + epsilon), tf.stack([first, second])


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
