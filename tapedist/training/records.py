"""What the steps of a compiled loop leave for the log, one row each, carried through the loop.

A list that XLA turns into an array which each step updates in place. A scatter would do the same with three kernels
more, to check its bounds.
"""

from __future__ import annotations

import tensorflow as tf


def empty(steps: int, *, width: int) -> tf.Tensor:
    """Records of up to `steps` steps, float64 `[width]` each."""
    return tf.raw_ops.TensorListReserve(element_shape=[width], num_elements=steps, element_dtype=tf.float64)


def with_row(records: tf.Tensor, step: tf.Tensor, record: tf.Tensor) -> tf.Tensor:
    """`records` with `record` `[width]` at `step`."""
    return tf.raw_ops.TensorListSetItem(input_handle=records, index=step, item=record)


def stacked(records: tf.Tensor, steps: int, *, width: int) -> tf.Tensor:
    """All records as one float64 tensor `[steps, width]`; those never set are zeros."""
    return tf.raw_ops.TensorListStack(
        input_handle=records, element_shape=[width], element_dtype=tf.float64, num_elements=steps
    )
