"""Blocks in device memory as TensorFlow lists, one list per column: reading a block copies nothing."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

Rows = tuple[tf.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class BlockList:
    """A replica's blocks.

    Attributes:
        handles: a variant tensor per column, the list of its blocks.
        specs: shape and type of each column's blocks.
    """

    handles: tuple[tf.Tensor, ...]
    specs: tuple[tf.TensorSpec, ...]

    @classmethod
    def empty(cls, specs: tuple[tf.TensorSpec, ...]) -> BlockList:
        """A list without blocks."""
        handles = tuple(
            tf.raw_ops.EmptyTensorList(
                element_shape=tf.constant(list(spec.shape), tf.int32),
                max_num_elements=tf.constant(-1),
                element_dtype=spec.dtype,
            )
            for spec in specs
        )
        return cls(handles, specs)

    def rows(self, block: tf.Tensor) -> Rows:
        """Block number `block`: `(x [S, d], y [S][, w [S]])`."""
        columns = (
            tf.raw_ops.TensorListGetItem(
                input_handle=handle,
                index=block,
                element_shape=tf.constant(list(spec.shape), tf.int32),
                element_dtype=spec.dtype,
            )
            for handle, spec in zip(self.handles, self.specs, strict=True)
        )
        return tuple(tf.ensure_shape(column, spec.shape) for column, spec in zip(columns, self.specs, strict=True))

    def with_block(self, rows: Rows) -> BlockList:
        """This list with one more block behind its own."""
        handles = tuple(
            tf.raw_ops.TensorListPushBack(input_handle=handle, tensor=column)
            for handle, column in zip(self.handles, rows, strict=True)
        )
        return BlockList(handles, self.specs)
