"""The rows of the suite that are whole processes, start and imports included."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from comparison import TAPEDIST, Contestant, Goal, Medians, Row

_TRAIN = (sys.executable, "-m", "tapedist", "train")


def processes(samples: int) -> tuple[Row, ...]:
    """The tutorial, `samples` rows, and where the seconds of a start go."""
    startup = Row(
        "startup", "where the tutorial's seconds go, one process", 1, "runs",
        (Contestant(TAPEDIST, "process", (sys.executable, "{here}/startup.py")),),
        rounds=3,
        single_calls=True,
    )  # fmt: skip
    return _tutorial(), _billion(samples), startup


def _tutorial() -> Row:
    over = Goal(
        "at most 1.2 s more than importing TensorFlow", (TAPEDIST, "import tensorflow"),
        lambda s, _: s[TAPEDIST] - s["import tensorflow"], lambda v: v <= 1.2, "s",
    )  # fmt: skip
    return Row(
        "tutorial_process", "whole `tapedist train` of the tutorial, no plots", 1, "runs",
        (
            Contestant(TAPEDIST, "process", (*_TRAIN, "--noplots")),
            Contestant("import tensorflow", "process", (sys.executable, "-c", "import tensorflow")),
        ),
        (over,),
        rounds=3,
        single_calls=True,
    )  # fmt: skip


def _billion(samples: int) -> Row:
    # Where a run with `--seed=0` starts: standard normal, drawn on the host.
    weight, bias = np.random.Generator(np.random.Philox(0)).standard_normal(2)
    expected = true_descent(3000, (float(weight), float(bias)))

    def peak(_: Medians, outcomes: Mapping[str, Any]) -> float:
        return float(outcomes[TAPEDIST]["peak_mib"])

    def error(_: Medians, outcomes: Mapping[str, Any]) -> float:
        found = outcomes[TAPEDIST]
        return max(abs(found["weight"] - expected[0]), abs(found["bias"] - expected[1]))

    return Row(
        "billion", f"--n_samples={samples} --num_epochs=3000, whole process", samples * 3000, "rows",
        (Contestant(TAPEDIST, "process", (*_TRAIN, f"--n_samples={samples}", "--noplots")),),
        (
            Goal("at most 40 s", (TAPEDIST,), lambda s, _: s[TAPEDIST], lambda v: v <= 40, "s"),
            Goal("at most 2 GiB of memory", (TAPEDIST,), peak, lambda v: v <= 2048, "MiB"),
            Goal("W and b within 1e-3 of descent on the true moments", (TAPEDIST,), error, lambda v: v <= 1e-3, "off"),
        ),
        rounds=1,
        single_calls=True,
    )  # fmt: skip


def true_descent(epochs: int, theta: tuple[float, float], rate: float = 0.001) -> tuple[float, float]:
    """Gradient descent in float64 on the true moments of the tutorial's line: E x = 0, E x^2 = 1, E xy = 9, E y = -2.

    Args:
        epochs: updates.
        theta: weight and bias before the first.
        rate: learning rate.
    """
    w, b = theta
    for _ in range(epochs):
        w, b = w - rate * 2 * (w - 9.0), b - rate * 2 * (b + 2.0)
    return w, b
