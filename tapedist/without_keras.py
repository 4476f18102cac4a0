"""TensorFlow without Keras, for commands: nothing here uses it, and it takes as long to import as TensorFlow itself."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

# What `import tensorflow` imports of Keras "so that anything that needs to happen at load time will trigger", and goes
# on without where that fails.
_EAGER = ("keras.src", "tf_keras.src")


@contextlib.contextmanager
def keras_left_out() -> Iterator[None]:
    """Inside, Keras cannot be imported, so that TensorFlow imports itself alone; after it, `tf.keras` is as ever.

    For a process whose TensorFlow is ours: a program that imports tapedist finds TensorFlow as it always is.
    """
    left_out = [name for name in _EAGER if name not in sys.modules]
    sys.modules.update(dict.fromkeys(left_out))  # type: ignore[arg-type]  # None is Python's word for "not to be had".
    try:
        yield
    finally:
        for name in left_out:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


def is_left_out() -> bool:
    """Whether an `import tensorflow` would be without Keras."""
    return "keras.src" in sys.modules and sys.modules["keras.src"] is None
