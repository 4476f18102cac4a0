"""Update rules on flat float64 vectors.

Legend: `P` parameters, `s` slots (extra vectors that a rule keeps). A rule is a pure function whose every rounded
product, quotient and root is pinned, so that it has the same bits on every machine. The rules follow Keras'
definitions, so results compare with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.config import TrainConfig
from tapedist.training.exact import flushed, folded, pin
from tapedist.training.schedule import Rate

# (parameters [P], slots [s, P], gradient [P], number, *constants) -> (parameters [P], slots [s, P]); all float64, and
# the number of the update counts from 1.
Rule = Callable[..., tuple[tf.Tensor, tf.Tensor]]

# The names of each rule's constants in the specification.
CONSTANTS = {
    "sgd": ("rate",),
    "momentum": ("rate", "momentum"),
    "nesterov": ("rate", "momentum"),
    "adam": ("rate", "beta_1", "beta_2", "epsilon"),
    "metric": ("rate", "hold", "curvature", "metric"),
}
_TINY = 2.0**-900  # Smaller slots are 0, because some machines flush denormal numbers to 0 and others do not.


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
    """An update rule and its constants.

    Attributes:
        name: of the rule; those in `CONSTANTS` are specified.
        rule: a function of the module's, so that runs of other constants are served by one compiled program.
        first_slots: values of the slots before the first update, one for each of the `s`.
        constants: numbers or float64 arrays, its last arguments; tensors to the compiled program.
    """

    name: str
    rule: Rule
    first_slots: tuple[float, ...] = ()
    constants: tuple[Any, ...] = ()

    @property
    def num_slots(self) -> int:
        return len(self.first_slots)

    def fresh_slots(self, num_parameters: int) -> np.ndarray:
        """The slots before the first update, float64 `[s * P]`."""
        return np.repeat(np.array(self.first_slots, np.float64), num_parameters)


def sgd(learning_rate: float) -> Optimizer:
    """`theta <- theta - learning_rate * g`."""
    return Optimizer("sgd", _sgd, (), (learning_rate,))


def _sgd(theta: tf.Tensor, slots: tf.Tensor, g: tf.Tensor, number: tf.Tensor, rate: Any) -> tuple[tf.Tensor, tf.Tensor]:
    return theta - pin(rate * g), slots


def metric_sgd(rate: Rate, metric: np.ndarray) -> Optimizer:
    """`theta <- theta - rate * metric g`: gradient descent in the metric of a matrix, such as an inverse Hessian.

    Args:
        rate: over the steps.
        metric: float64 `[P, P]`, symmetric.
    """
    return Optimizer("metric", _metric_sgd, (), (rate.first, rate.hold, rate.curvature, metric))


def _metric_sgd(
    theta: tf.Tensor,
    slots: tf.Tensor,
    g: tf.Tensor,
    number: tf.Tensor,
    first: Any,
    hold: Any,
    curvature: Any,
    metric: Any,
) -> tuple[tf.Tensor, tf.Tensor]:
    # Each quotient is pinned by itself, because XLA rewrites a quotient of quotients.
    behind = tf.maximum(number - hold, tf.zeros_like(number))
    one = tf.ones_like(number)
    rate = pin(one / (pin(one / first) + pin(curvature * behind)))
    return theta - pin(rate * folded(pin(metric * g[:, tf.newaxis]))), slots


def momentum(learning_rate: float, mu: float, *, nesterov: bool) -> Optimizer:
    """Heavy ball (Polyak 1964) or Nesterov's momentum, in the form of Sutskever et al. (2013).

    `v <- mu * v - learning_rate * g`, then `theta <- theta + v`, or with Nesterov
    `theta <- theta + mu * v - learning_rate * g`.
    """

    return Optimizer(
        "nesterov" if nesterov else "momentum", _nesterov if nesterov else _momentum, (0.0,), (learning_rate, mu)
    )


def _momentum(
    theta: tf.Tensor, slots: tf.Tensor, g: tf.Tensor, number: tf.Tensor, rate: Any, mu: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    velocity = flushed(pin(mu * slots[0]) - pin(rate * g), _TINY)
    return theta + velocity, velocity[tf.newaxis]


def _nesterov(
    theta: tf.Tensor, slots: tf.Tensor, g: tf.Tensor, number: tf.Tensor, rate: Any, mu: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    # Once: both sums take the same rounded product.
    push = pin(rate * g)
    velocity = flushed(pin(mu * slots[0]) - push, _TINY)
    return theta + (pin(mu * velocity) - push), velocity[tf.newaxis]


def adam(learning_rate: float, beta_1: float, beta_2: float, epsilon: float) -> Optimizer:
    """Adam (Kingma and Ba 2015), in the efficient form at the end of their section 2.

    `theta <- theta - learning_rate * sqrt(1 - beta_2**t) / (1 - beta_1**t) * m / (sqrt(v) + epsilon)`; the powers of
    the betas are slots, because libraries differ in the last bit of a power.
    """

    return Optimizer("adam", _adam, (0.0, 0.0, 1.0, 1.0), (learning_rate, beta_1, beta_2, epsilon))


def _adam(
    theta: tf.Tensor,
    slots: tf.Tensor,
    g: tf.Tensor,
    number: tf.Tensor,
    rate: Any,
    beta_1: Any,
    beta_2: Any,
    epsilon: Any,
) -> tuple[tf.Tensor, tf.Tensor]:
    # Keras' form of the moving averages: `m + (g - m) * (1 - b1)`, not `b1 * m + (1 - b1) * g`.
    one = tf.ones_like(number)
    first = flushed(slots[0] + pin((g - slots[0]) * (one - beta_1)), _TINY)
    second = flushed(slots[1] + pin((pin(g * g) - slots[1]) * (one - beta_2)), _TINY)
    power_1, power_2 = flushed(pin(slots[2] * beta_1), _TINY), flushed(pin(slots[3] * beta_2), _TINY)
    pace = pin(pin(rate * pin(tf.sqrt(one - power_2))) / (one - power_1))
    move = pin(pin(pace * first) / (pin(tf.sqrt(second)) + epsilon))
    return theta - move, tf.stack([first, second, power_1, power_2])


def from_config(config: TrainConfig, *, auto_rate: float | None = None) -> Optimizer:
    """The rule that `--optimizer` names.

    Args:
        config: the run's settings.
        auto_rate: the rate that `--learning_rate=auto` found.
    """
    rate = auto_rate if isinstance(config.learning_rate, str) else config.learning_rate
    assert rate is not None, "--learning_rate=auto must be settled before"
    if config.optimizer == "sgd":
        return sgd(rate)
    if config.optimizer == "adam":
        return adam(rate, config.adam_beta_1, config.adam_beta_2, config.adam_epsilon)
    return momentum(rate, config.momentum, nesterov=config.optimizer == "nesterov")
