"""A model, a loss and rows of your own: `python examples/custom_module.py`."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

import tapedist


class Net(tf.Module):
    """Two layers; float32 `[k, 2]` in, one number per row out.

    The loss must be separable over rows, so a module treats each row by itself: no batch normalisation, no dropout.
    """

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)  # The start is part of the answer, so it is drawn from a fixed seed.
        self.hidden = tf.Variable(rng.normal(size=(2, 8)), dtype=tf.float32)
        self.shift = tf.Variable(tf.zeros([8]))
        self.out = tf.Variable(rng.normal(size=(8,)) / 3, dtype=tf.float32)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.tanh(x @ self.hidden + self.shift) * self.out, axis=1)


class Ripples:
    """Rows of y = sin(x0) * x1: any row by its number, as TensorFlow operations."""

    num_features = 2
    feature_names = ("x0", "x1")
    target_name = "y"
    weighted = False

    def num_rows(self, split: str) -> int:
        return {"train": 4000, "test": 1000}[split]

    def fingerprint(self) -> str:
        return "ripples-1"  # Names the rows; give them another name when they change, so that no old run is continued.

    def take(self, split: str, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        i = tf.cast(indices, tf.float32) + (0.5 if split == "test" else 0.0)
        x = tf.stack([tf.sin(i * 1.7) * 2, tf.cos(i * 0.9)], axis=1)
        return x, tf.sin(x[:, 0]) * x[:, 1]


def log_cosh(y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """A loss per row: quadratic near zero, linear far away."""
    r = y_hat - y
    return r + tf.math.softplus(-2.0 * r) - np.log(2.0)


config = tapedist.TrainConfig(mode="mini_batch", batch_size=256, num_epochs=30, optimizer="adam", learning_rate=0.01)
# `model` is called under the strategy's scope, where its variables belong; so it is the class, not an object of it.
result = tapedist.train(config, model=Net, loss=log_cosh, source=Ripples())

print(f"test loss: {result.test_loss:.5f}")
x, y = Ripples().take("test", tf.range(3, dtype=tf.int64))
for predicted, wanted in zip(result.predict(x.numpy()), y.numpy(), strict=True):
    print(f"predicted {predicted:.3f}, should be {wanted:.3f}")
print(f"digest: {result.digest}")
