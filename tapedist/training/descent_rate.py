"""A learning rate that changes with the steps."""

from __future__ import annotations

import dataclasses
import math


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
