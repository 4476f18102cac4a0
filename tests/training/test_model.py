"""The linear model predicts and is differentiated as NumPy says, in every form that its number of features chooses."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tapedist.training.model import LinearModel

ROWS = 257


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("d", [1, 2, 7, 8, 12, 13, 55, 56, 64, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 2e-5)])
def test_predictions_and_gradients(d: int, fit_intercept: bool, dtype: str, tolerance: float) -> None:
    random = np.random.default_rng(d)
    x, upstream = random.standard_normal((ROWS, d)), random.standard_normal(ROWS)
    model = LinearModel(d, fit_intercept=fit_intercept)
    masters = random.standard_normal(model.num_parameters)

    @tf.function(jit_compile=True, autograph=False)
    def both(masters: tf.Tensor, x: tf.Tensor, upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            forward, targets = model.bind(masters, x.dtype)
            tape.watch(targets)
            y_hat = forward(x)
        gradients = tape.gradient(y_hat, targets, output_gradients=upstream)
        return y_hat, tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], 0)

    y_hat, gradient = both(tf.constant(masters), tf.constant(x, dtype), tf.constant(upstream, dtype))
    columns = np.column_stack([x, np.ones(ROWS)]) if fit_intercept else x
    np.testing.assert_allclose(y_hat, columns @ masters, rtol=0, atol=tolerance * np.sqrt(d) * 10)
    np.testing.assert_allclose(gradient, columns.T @ upstream, rtol=0, atol=tolerance * np.sqrt(ROWS) * 10)
