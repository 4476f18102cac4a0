"""Source + `InputContext` -> `tf.data` -> distributed rows.

Legend: `d` features, `T` rows of a tile. An element is what one replica computes on: its rows of some slots (a slot is
a batch, a block, or a small split), each slot in tiles of its own, and how many rows of each slot are real. They come
first; behind them are zeros:

    rows    (x [slots * tiles, d, T], y [slots * tiles, T][, w]), with x [slots * tiles, T, d] if the plan is row-major
    counts  int32 [slots]

A number that is too small after rounding is 0, and so is a whole row whose weight is. Which rows go where is arithmetic
on the element's number, so a pipeline can start anywhere; there is no position to save.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.data.blocks import BlockOrder, Source
from tapedist.data.element_rows import ElementRows
from tapedist.data.element_stream import ElementStream
from tapedist.data.elements import (
    ElementPlan,
    batch_elements,
    block_elements,
    epoch_order,
    shuffled_rows,
    split_elements,
)
from tapedist.data.table_gather import empty, write_tiles
from tapedist.data.tiny import LEAST, ROUNDS_UP

__all__ = [
    "BlockOrder", "ElementPlan", "batch_elements", "block_elements", "distribute", "epoch_order", "shuffled_rows",
    "split_elements",
]  # fmt: skip

_PREFETCH = 2


def distribute(
    strategy: tf.distribute.Strategy,
    source: Source,
    plan: ElementPlan,
    *,
    elements: range,
    dtype: tf.DType,
    parallel: int,
) -> ElementStream:
    """The elements numbered `elements`, one per replica and turn, of a distributed dataset.

    Each worker's input pipeline makes the elements of its own replicas only.
    """

    going = None
    if isinstance(strategy, (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)):
        with tf.device("CPU:0"):
            going = tf.Variable(True, trainable=False)

    reader = source if hasattr(source, "read_into") else getattr(source, "reader", lambda: None)()
    if reader is not None:
        make = _read_by_numpy(reader, plan, elements, dtype)
    else:

        def make(turn: tf.Tensor, replica: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
            return _element(source, plan, elements, turn, replica, dtype)

    def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
        local = context.num_replicas_in_sync // context.num_input_pipelines
        first = context.input_pipeline_id * local
        dataset = tf.data.Dataset.range(len(elements) * local)
        if going is not None:
            dataset = dataset.take_while(tf.autograph.experimental.do_not_convert(lambda _: going.read_value()))
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        options.deterministic = True
        options.autotune.enabled = False
        # There is nothing to rewrite, and trying to takes a copy of all that a source holds in memory.
        options.experimental_optimization.apply_default_optimizations = False

        # Rewriting the function by autograph, which it does not need, would take half a second.
        @tf.autograph.experimental.do_not_convert
        def element(i: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
            return make(i // local, first + i % local)

        dataset = dataset.map(element, num_parallel_calls=parallel)
        return dataset.prefetch(_PREFETCH).with_options(options)

    stop = None if going is None else lambda: going.assign(False)
    return ElementStream(strategy.distribute_datasets_from_function(dataset_fn), stop=stop)


def _read_by_numpy(source: Any, plan: ElementPlan, elements: range, dtype: tf.DType) -> Any:
    """`(turn, replica) -> element` of a source that NumPy reads."""
    read = ElementRows(source, plan, dtype.as_numpy_dtype)
    tiles = plan.slots * plan.tiles
    x = [tiles, *([plan.tile_rows, source.num_features] if plan.row_major else [source.num_features, plan.tile_rows])]
    shapes = [x, *[[tiles, plan.tile_rows]] * (1 + source.weighted), [plan.slots]]
    types = [*[dtype] * (2 + source.weighted), tf.int32]

    def rows(turn: np.int64, replica: np.int64) -> tuple[np.ndarray, ...]:
        return read(elements[int(turn)], int(replica))

    def element(turn: tf.Tensor, replica: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
        found = tf.numpy_function(rows, [turn, replica], types, stateful=False)
        for tensor, shape in zip(found, shapes, strict=True):
            tensor.set_shape(shape)
        return tuple(found[:-1]), found[-1]

    return element


def _element(
    source: Source, plan: ElementPlan, elements: range, turn: tf.Tensor, replica: tf.Tensor, dtype: tf.DType
) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
    """One element as TensorFlow operations; the integer arithmetic runs in NumPy."""
    rows, last = plan.slot_rows, max(0, source.num_rows(plan.split) - 1)

    def place(turn: np.int64, replica: np.int64) -> tuple[np.ndarray, np.ndarray]:
        first, counts = plan.first_rows(elements[int(turn)], int(replica))
        return first.astype(np.int64), counts.astype(np.int64)

    def numbers(turn: np.int64, positions: np.ndarray) -> np.ndarray:
        return plan.row_numbers(elements[int(turn)], positions).astype(np.int64)

    first, counts = tf.numpy_function(place, [turn, replica], [tf.int64, tf.int64])
    first.set_shape([plan.slots])
    counts.set_shape([plan.slots])
    # Most elements are full: they need neither a bound on their positions nor a mask.
    full = tf.reduce_all(counts == rows)
    if hasattr(source, "take_tiles") and not plan.shuffled and not plan.row_major:
        taken = source.take_tiles(plan.split, first, length=rows, tile_rows=plan.tile_rows)
    elif hasattr(source, "take_runs") and not plan.shuffled:
        taken = source.take_runs(plan.split, first, length=rows)
    else:
        positions = first[:, tf.newaxis] + tf.range(rows, dtype=tf.int64)
        positions = tf.cond(full, lambda: positions, lambda: tf.minimum(positions, last))
        if plan.shuffled:
            positions = tf.ensure_shape(tf.numpy_function(numbers, [turn, positions], tf.int64), positions.shape)
        taken = source.take(plan.split, tf.reshape(positions, [-1]))
    if exponent := getattr(source, "weight_exponent", 0):
        # In two steps: the whole factor may be a number that TensorFlow takes for 0.
        halves = (2.0 ** (-exponent // 2), 2.0 ** (-exponent - -exponent // 2))
        taken = (*taken[:2], tf.cast(taken[2], tf.float64) * halves[0] * halves[1])
    tiny = getattr(source, "holds_tiny", True)
    columns = tuple(_rounded(column, dtype, tiny=tiny) for column in taken)
    columns = tf.cond(full, lambda: columns, lambda: _where(tf.reshape(tf.sequence_mask(counts, rows), [-1]), columns))
    if source.weighted:
        columns = _where(columns[2] > 0, columns)
    x, *rest = columns
    tiled = [tf.reshape(column, [plan.slots * plan.tiles, plan.tile_rows]) for column in rest]
    return (_tiles(x, plan), *tiled), tf.cast(counts, tf.int32)


def _rounded(column: tf.Tensor, dtype: tf.DType, *, tiny: bool) -> tf.Tensor:
    """`tiny.flushed`, where there may be something to flush."""
    if not tiny:
        return tf.cast(column, dtype)
    least = LEAST[dtype.name]
    if column.dtype.size > dtype.size:
        size = tf.abs(column)
        small = tf.where(size < ROUNDS_UP, tf.zeros([], column.dtype), tf.sign(column) * least)
        column = tf.where(size < least, small, column)
    column = tf.cast(column, dtype)
    return tf.where(tf.abs(column) < least, tf.zeros([], dtype), column)


def _where(real: tf.Tensor, rows: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
    """`rows` with zeros where they are not real: zero times what overflows would not be zero."""
    # Features are rows `[k, d]` or tiles `[k / T, d, T]`.
    shapes = {1: [-1], 2: [-1, 1], 3: [-1, 1, rows[0].shape[-1]]}
    return tuple(
        tf.where(tf.reshape(real, shapes[column.shape.rank]), column, tf.zeros([], column.dtype)) for column in rows
    )


def _tiles(x: tf.Tensor, plan: ElementPlan) -> tf.Tensor:
    """Rows `[slots * tiles * T, d]`, unless they are tiles already, as the plan's tiles."""
    if x.shape.rank == 3:
        return x
    tiles, d = plan.slots * plan.tiles, x.shape[1]
    if plan.row_major or d == 1:
        return tf.reshape(x, [tiles, plan.tile_rows, d] if plan.row_major else [tiles, d, plan.tile_rows])

    def transposed(rows: np.ndarray) -> np.ndarray:
        found = empty((tiles, d, plan.tile_rows), rows.dtype)
        write_tiles(found, 0, rows.T)
        return found

    # Ten times as fast as TensorFlow's own transposition.
    return tf.ensure_shape(tf.numpy_function(transposed, [x], x.dtype, stateful=False), [tiles, d, plan.tile_rows])
