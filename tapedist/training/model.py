"""The interface of a model, a linear model, and an adapter for any `tf.Module`.

Legend: `k` rows, `d` features, `P` parameters. The parameters live outside the model as one flat float64 vector of
masters; a model is bound to a compute-type copy of them inside the compiled step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tapedist.errors import InputError

Forward = Callable[[tf.Tensor], tf.Tensor]

# Up to so many features a sum of products, which XLA fuses with what surrounds it, beats its product of a matrix and a
# vector.
_SUMMED_FEATURES = 7
# From here on a sum of products predicts as fast or faster again; its gradient would be a sum over columns, a quarter
# as fast as a product.
_LONG_FEATURES = 56


class Model(Protocol):
    """The interface of a model for the training step.

    Attributes:
        name: different for models of other kinds or shapes; the same in every process.
        num_parameters: `P`.
        penalized: float64 `[P]`, 1 where the L2 penalty applies, 0 elsewhere.
        pure: whether `bind` touches no variable, so that whole training loops may become one XLA program: the linear
            model alone.
        key: equal for models that can share traces; None if this one must not share any.
    """

    name: str
    num_parameters: int
    penalized: np.ndarray
    pure: bool
    key: Hashable | None

    def bind(self, masters: tf.Tensor, dtype: tf.DType) -> tuple[Forward, Sequence[Any]]:
        """Binds the model to its parameters.

        Args:
            masters: float64 `[P]`.
            dtype: the compute type.

        Returns:
            `(forward, targets)`: `forward(x [k, d]) -> y_hat [k]`, and the tensors or variables that together hold
            the parameters in the order of `masters`, which a tape can differentiate by.
        """


class LinearModel:
    """`y_hat = x . weights + bias`; masters are the weights, then the bias if there is one."""

    name = "LinearModel"
    pure = True

    def __init__(self, num_features: int, *, fit_intercept: bool = True):
        self.num_features = num_features
        self.fit_intercept = fit_intercept
        self.key = (num_features, fit_intercept)
        self.num_parameters = num_features + fit_intercept
        self.penalized = np.ones(self.num_parameters)
        if fit_intercept:
            self.penalized[-1] = 0.0

    def initial_parameters(self, *, init: str, seed: int) -> np.ndarray:
        """float64 `[P]`: standard normal from `seed`, drawn on the host, or zeros."""
        if init == "zeros":
            return np.zeros(self.num_parameters)
        return np.random.Generator(np.random.Philox(seed)).standard_normal(self.num_parameters)

    def bind(self, masters: tf.Tensor, dtype: tf.DType) -> tuple[Forward, Sequence[tf.Tensor]]:
        values = tf.cast(masters, dtype)
        d = self.num_features
        # One feature needs no product of matrices: XLA fuses a scalar times a vector with the rest of the step.
        weights = values[0] if d == 1 else values[:d]
        targets = [weights, values[d]] if self.fit_intercept else [weights]

        def forward(x: tf.Tensor) -> tf.Tensor:
            if d == 1:
                y_hat = tf.squeeze(x, 1) * weights
            elif d <= _SUMMED_FEATURES:
                y_hat = tf.reduce_sum(x * weights, 1)
            elif d < _LONG_FEATURES:
                y_hat = tf.linalg.matvec(x, weights)
            else:
                y_hat = _long_product(x, weights)
            return y_hat + targets[1] if self.fit_intercept else y_hat

        return forward, targets


@tf.custom_gradient
def _long_product(x: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], Any]]:
    """`x . weights` as sums, with the gradient by `weights` as a product; rows are never differentiated by."""

    def gradient(upstream: tf.Tensor) -> tuple[None, tf.Tensor]:
        return None, tf.linalg.matvec(x, upstream, transpose_a=True)

    return tf.reduce_sum(x * weights, 1), gradient


class ModuleModel:
    """Any `tf.Module` that maps `[k, d]` to `[k]` row by row.

    Its trainable variables are assigned from the masters inside the compiled step. Build it under the strategy's scope.

    Args:
        module: the module; called with a tensor `[k, d]`, it returns `[k]`.
        num_features: `d`; the module is called once on zeros `[1, d]` to create and count its variables.

    Raises:
        InputError: if the module has no trainable variable.
    """

    pure = False
    key = None  # A trace is bound to the variables of its module.

    def __init__(self, module: Any, *, num_features: int, dtype: tf.DType):
        module(tf.zeros([1, num_features], dtype))
        self.module = module
        self.variables = list(self.module.trainable_variables)
        if not self.variables:
            raise InputError(f"model={type(module).__name__}: must have trainable variables; found none")
        self.name = f"{type(module).__qualname__}{[tuple(v.shape) for v in self.variables]}"
        self._sizes = [math.prod(v.shape) for v in self.variables]
        self.num_parameters = sum(self._sizes)
        # The penalty is for matrices: vectors are biases, which have none in the linear model either.
        self.penalized = np.concatenate(
            [np.full(size, float(v.shape.rank >= 2)) for v, size in zip(self.variables, self._sizes, strict=True)]
        )

    def initial_parameters(self) -> np.ndarray:
        """float64 `[P]`: the values that the module was built with."""
        return np.concatenate([np.ravel(v.numpy()).astype(np.float64) for v in self.variables])

    def assign(self, parameters: np.ndarray) -> None:
        """Assigns `parameters`, float64 `[P]`, to the module's variables."""
        pieces = np.split(parameters, np.cumsum(self._sizes)[:-1])
        for variable, piece in zip(self.variables, pieces, strict=True):
            variable.assign(piece.reshape(variable.shape).astype(variable.dtype.as_numpy_dtype))

    def bind(self, masters: tf.Tensor, dtype: tf.DType) -> tuple[Forward, Sequence[tf.Variable]]:
        pieces = tf.split(masters, self._sizes)
        for variable, piece in zip(self.variables, pieces, strict=True):
            _on_this_replica(variable).assign(tf.cast(tf.reshape(piece, variable.shape), variable.dtype))
        return self.module, self.variables


def _on_this_replica(variable: tf.Variable) -> tf.Variable:
    """The running replica's copy of a mirrored variable: to assign all copies at once would need a reduction."""
    context = tf.distribute.get_replica_context()
    copies = context.strategy.experimental_local_results(variable) if context else (variable,)
    if len(copies) == 1:
        return copies[0]
    index = context.replica_id_in_sync_group
    # Modulo, because a process has the copies of its local replicas, and the index counts those of all processes.
    return copies[int(tf.get_static_value(index) if tf.is_tensor(index) else index) % len(copies)]
