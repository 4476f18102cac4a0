"""Blocks in device memory as TensorFlow lists, one list per column: reading a block copies nothing."""

from __future__ import annotations

import dataclasses

import tapedist.numerics  # noqa: F401  (before TensorFlow)
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
    def cut(cls, rows: Rows, blocks: int) -> BlockList:
        """Cuts the rows of an element, `[blocks * S, ...]` per column, into its blocks."""
        pieces = [tf.reshape(column, [blocks, column.shape[0] // blocks, *column.shape[1:]]) for column in rows]
        handles = tuple(
            tf.raw_ops.TensorListFromTensor(tensor=piece, element_shape=tf.constant(list(piece.shape[1:]), tf.int32))
            for piece in pieces
        )
        return cls(handles, block_specs(rows, blocks))

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

    def extended(self, other: BlockList) -> BlockList:
        """This list with the blocks of `other` behind its own."""
        handles = tuple(
            tf.raw_ops.TensorListConcatLists(input_a=a, input_b=b, element_dtype=spec.dtype)
            for a, b, spec in zip(self.handles, other.handles, self.specs, strict=True)
        )
        return BlockList(handles, self.specs)


def block_specs(rows: Rows, blocks: int) -> tuple[tf.TensorSpec, ...]:
    """Shape and type of each column of one of the `blocks` blocks in `rows`."""
    return tuple(tf.TensorSpec([c.shape[0] // blocks, *c.shape[1:]], c.dtype) for c in rows)
