"""Padding and rows of weight zero add nothing, whatever the loss makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from sample_sources import ArraySource

from tapedist.config import TrainConfig
from tapedist.data import orders
from tapedist.run.train import train

MODES: dict[str, dict[str, Any]] = {
    "resident": {"num_epochs": 40},
    "held": {"num_epochs": 40, "cache": "device"},
    "streamed": {"num_epochs": 40, "cache": "none"},
    "mini_batch": {"num_epochs": 4, "mode": "mini_batch", "batch_size": 300, "shuffle": "none"},
}


def relative(y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Undefined where the target is zero, as padding's is."""
    return tf.square((y_hat - y) / y)


def _rows(n: int = 3001) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(n, 2))
    return x, 3 + x @ [0.5, -0.25] + 0.1 * random.normal(size=n)


@pytest.fixture(params=MODES)
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if request.param in ("held", "streamed"):
        monkeypatch.setattr(orders, "RESIDENT_BYTES", 0)
    engine = {} if request.param == "mini_batch" else {"full_batch_engine": "stream"}
    return {
        "learning_rate": 0.1,
        "init": "zeros",
        "standardize": "false",
        "statistics": "false",
        **engine,
        **MODES[request.param],
    }


def test_an_own_loss_does_not_see_padding(settings: dict[str, Any]):
    x, y = _rows()
    result = train(TrainConfig(**settings), loss=relative, source=ArraySource(x, y, train=len(y)))
    assert np.isfinite(result.parameters).all()
    theta, steps = np.zeros(3), -(-len(y) // settings.get("batch_size", len(y))) * settings["num_epochs"]
    design = np.column_stack([x, np.ones(len(y))])
    for step in range(steps):
        size = settings.get("batch_size", len(y))
        first = step * size % (-(-len(y) // size) * size)
        part = slice(first, first + size)
        gradient = 2 * (design[part] @ theta - y[part]) / y[part] ** 2
        theta -= 0.1 * gradient @ design[part] / len(y[part])
    np.testing.assert_allclose(result.parameters, theta, rtol=2e-5)


@pytest.mark.parametrize("loss", [None, relative])
def test_rows_of_weight_zero_may_overflow(settings: dict[str, Any], loss: Any):
    """What stands in a row of weight zero changes no bit, even where its prediction and its loss are infinite."""
    x, y = _rows()
    w = np.random.default_rng(1).integers(0, 3, len(y)).astype(float)
    digests = set()
    for stray_x, stray_y in ((1.0, 1.0), (3e38, -3e38), (-2e38, 0.0)):
        strange = np.where((w > 0)[:, np.newaxis], x, stray_x), np.where(w > 0, y, stray_y)
        result = train(TrainConfig(**settings), loss=loss, source=ArraySource(*strange, w, train=len(y)))
        assert np.isfinite(result.parameters).all()
        digests.add(result.digest)
    assert len(digests) == 1
