"""A fitted linear model as a SavedModel: `serving_default` takes raw rows and gives raw predictions.

The sums are those of `prediction.predict_rows`, term by term in the same order, so a prediction has the same bits there
and here, in batches of any size.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import tensorflow as tf

from tapedist.errors import InputError
from tapedist.process import check_fork
from tapedist.storage.files import OWN_PREFIX, POSIX, storage_error
from tapedist.storage.model_file import FittedModel


class ServedModel(tf.Module):
    """The module of the SavedModel.

    Args:
        model: the fitted model.
    """

    def __init__(self, model: FittedModel):
        super().__init__()
        self.weights = tf.Variable(model.weights, trainable=False, name="weights")
        self.bias = tf.Variable(model.bias, trainable=False, dtype=tf.float64, name="bias")  # For readers only.
        self.center = tf.Variable(model.center, trainable=False, name="center")
        self.bias_at_center = tf.Variable(
            model.bias_at_center, trainable=False, dtype=tf.float64, name="bias_at_center"
        )
        self._count = len(model.weights)

    def predict(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        """`{"prediction": [k]}` for rows `[k, d]`, both float64 in raw units.

        Raises:
            tf.errors.InvalidArgumentError: when it runs, for rows of another width or rank.
        """
        # A saved signature only documents its shape: TensorFlow does not check it. Where a converter removes this
        # check, the subtraction of whole rows still fails for another width.
        columns = tf.transpose(tf.ensure_shape(x, [None, self._count]) - self.center)
        weights = tf.convert_to_tensor(self.weights)
        # A loop keeps the order of the sum: grappler may merge a chain of additions into one `AddN`, with other bits.
        _, total = tf.while_loop(
            lambda j, _: j < self._count,
            lambda j, total: (j + 1, total + columns[j] * weights[j]),
            (tf.constant(1), columns[0] * weights[0]),
        )
        return {"prediction": total + self.bias_at_center}


def export_model(model: FittedModel, directory: Path) -> Path:
    """Saves `model` as the next numbered version below `directory`.

    Args:
        model: the fitted model.
        directory: made if it is missing; earlier versions stay.

    Returns:
        The new version's folder.

    Raises:
        InputError: if `directory` exists and is no folder, or in a fork of a process that has used TensorFlow.
        StorageError: if it cannot be written; no partial version is left.
    """
    check_fork()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{str(directory)!r}: is no folder; remove it")
    temporary = directory / f"{OWN_PREFIX}-{os.getpid()}"
    try:
        directory.mkdir(exist_ok=True)
        _save(model, temporary)
        return _placed(temporary, directory)
    except OSError as error:
        raise storage_error("write", directory, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save(model: FittedModel, directory: Path) -> None:
    served = ServedModel(model)
    rows = tf.TensorSpec([None, len(model.weights)], tf.float64, name="x")
    signature = tf.function(served.predict, input_signature=[rows], autograph=False)
    tf.saved_model.save(served, str(directory), signatures={"serving_default": signature})


def _placed(temporary: Path, directory: Path) -> Path:
    """Renames a complete version to the next free number; other processes may do the same at the same time."""
    while True:
        numbers = [int(path.name) for path in directory.iterdir() if path.name.isdecimal()]
        target = directory / str(max(numbers, default=0) + 1)
        try:
            # Fails if another process has taken the number since: a folder that is not empty is never replaced.
            POSIX.rename(temporary, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue
        POSIX.sync_directory(directory)
        return target
