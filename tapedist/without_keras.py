"""TensorFlow without Keras, for commands: none uses it, and it takes almost as long to import as all the rest."""

from __future__ import annotations

import contextlib
import importlib.abc
import sys
from collections.abc import Iterator
from typing import Any

# What TensorFlow imports at its end, for what Keras registers with it, and goes on without if it cannot.
_EAGER = ("keras.src", "tf_keras.src")


class _Refusal(importlib.abc.MetaPathFinder):
    """Finds no Keras while TensorFlow is being imported; afterwards it is there for whoever asks, as `tf.keras` too."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in _EAGER and "tensorflow" in sys.modules and not hasattr(sys.modules["tensorflow"], "__all__"):
            raise ModuleNotFoundError(f"{name} is left out", name=name)


_REFUSAL = _Refusal()


@contextlib.contextmanager
def keras_left_out() -> Iterator[None]:
    """An `import tensorflow` inside imports no Keras.

    For a process whose TensorFlow is ours: a program that imports tapedist finds TensorFlow as it always is.
    """
    sys.meta_path.insert(0, _REFUSAL)
    try:
        yield
    finally:
        sys.meta_path.remove(_REFUSAL)


def is_left_out() -> bool:
    """Whether an `import tensorflow` would be without Keras."""
    return _REFUSAL in sys.meta_path
