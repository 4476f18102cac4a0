"""What a program around a training has set in TensorFlow and NumPy, which would change its numbers or break it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tapedist import process
from tapedist.errors import InputError
from tapedist.runtime_flags import flags_in_use


def check() -> None:
    """Refuses what would give another digest, hang or crash.

    Raises:
        InputError: naming the switch and how to turn it off.
    """
    process.check_fork()
    flags_in_use()
    if not tf.executing_eagerly():
        raise InputError(
            "train: was called where TensorFlow makes a graph (in a tf.function, a Dataset.map or "
            "tf.Graph().as_default(), or after disable_eager_execution()); call it outside, with eager execution on"
        )
    if tf.config.functions_run_eagerly():
        raise InputError(
            "tf.config.run_functions_eagerly(True): gives other numbers, because nothing is compiled; call "
            "tf.config.run_functions_eagerly(False) before"
        )
    if tf.distribute.has_strategy():
        name = type(tf.distribute.get_strategy()).__name__
        raise InputError(
            f"{name}.scope(): train makes a strategy of its own; call it outside the scope, with strategy=... or "
            "num_virtual_devices=... in its config"
        )
    if _checks_numerics():
        raise InputError(
            "tf.debugging.enable_check_numerics(): adds operations that cannot be compiled; call "
            "tf.debugging.disable_check_numerics() before"
        )


def _checks_numerics() -> bool:
    try:
        from tensorflow.python.debug.lib import check_numerics_callback

        return getattr(check_numerics_callback._state, "check_numerics_callback", None) is not None
    except (ImportError, AttributeError):  # Another version; its error says what was turned on.
        return False


@contextlib.contextmanager
def left_aside() -> Iterator[None]:
    """What is set for the code of this thread has no effect inside: a device scope, and NumPy's treatment of errors."""
    with tf.device(None), np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"):
        yield
