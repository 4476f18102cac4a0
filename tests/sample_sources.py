"""Sources, modules and losses that tests train on: what a user might bring."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.data.source import Source


@dataclasses.dataclass(frozen=True)
class ArraySource(Source):
    """Rows in NumPy arrays; the first `train` of them are the training split."""

    x: np.ndarray
    y: np.ndarray
    w: np.ndarray | None = None
    train: int = 0

    target_name = "y"

    @property
    def num_features(self) -> int:
        return self.x.shape[1]

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(f"x{j}" for j in range(self.num_features))

    @property
    def weighted(self) -> bool:
        return self.w is not None

    def num_rows(self, split: str) -> int:
        return self.train if split == "train" else len(self.y) - self.train

    def fingerprint(self) -> str:
        columns = (c for c in (self.x, self.y, self.w) if c is not None)
        return hashlib.sha256(b"".join(np.ascontiguousarray(c).tobytes() for c in columns)).hexdigest()

    def take(self, split: str, indices: Any) -> tuple[Any, ...]:
        rows = indices + (self.train if split == "test" else 0)
        return tuple(tf.gather(column, rows) for column in (self.x, self.y, self.w) if column is not None)


def curve(
    rows: int = 3001, d: int = 3, *, weighted: bool = False, positive: bool = False, seed: int = 5
) -> ArraySource:
    """A target that bends, with noise; weights from 0 to 3 if `weighted`."""
    random = np.random.Generator(np.random.Philox(seed))
    x = random.standard_normal((rows, d))
    if positive:
        x = np.exp(x)
    y = np.tanh(x.sum(1)) + 0.3 * x[:, 0] + 0.1 * random.standard_normal(rows)
    w = random.integers(0, 4, rows).astype(float) if weighted else None
    return ArraySource(x, y, w, train=rows - rows // 7)


SOURCES = {"curve": curve(), "weighted": curve(weighted=True), "positive": curve(positive=True)}


class TwoLayers(tf.Module):
    """A small net with a hidden layer of tanh units."""

    def __init__(self, width: int = 8, seed: int = 1, num_features: int = 3):
        super().__init__()
        random = np.random.Generator(np.random.Philox(seed))
        self.hidden = tf.Variable(random.standard_normal((num_features, width)) / 2, dtype=tf.float32)
        self.offset = tf.Variable(np.zeros(width), dtype=tf.float32)
        self.out = tf.Variable(random.standard_normal((width, 1)) / 2, dtype=tf.float32)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return tf.squeeze(tf.tanh(x @ self.hidden + self.offset) @ self.out, 1)


class Logarithm(tf.Module):
    """Undefined at zero, where padding might lie."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = tf.Variable([0.1, 0.2, 0.3])

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return tf.linalg.matvec(tf.math.log(x), self.scale)


MODELS = {
    "two_layers": TwoLayers,
    "wide_layers": functools.partial(TwoLayers, width=64, num_features=64),
    "logarithm": Logarithm,
}


def quartic(y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """A loss that tapedist does not have: `r**2 + r**4 / 10`."""
    square = tf.square(y_hat - y)
    return square + square * square / 10
