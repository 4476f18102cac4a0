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

import atexit
import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.data.element_rows import ElementRows
from tapedist.data.layout import empty, write_tiles
from tapedist.data.orders import ElementPlan
from tapedist.data.ranges import LEAST, ROUNDS_UP
from tapedist.data.source import Source

_PREFETCH = 2
_PLACES_AT_ONCE = 8  # Elements for which one call of Python says where their rows are: a call takes 0.3 ms.

# What makes the element of a number and a replica of arguments of its own.
_Make = Callable[..., tuple[tuple[tf.Tensor, ...], tf.Tensor]]


class ElementStream(Iterator[Any]):
    """The elements of a dataset, one after the other.

    Args:
        dataset: a distributed dataset.
        stop: makes the dataset, which is a strategy's, end soon; None where its iterator may be destroyed at any time.
    """

    def __init__(self, dataset: Any, *, stop: Callable[[], object] | None = None):
        self._stop = stop
        self._iterator: Any = None  # What `__del__` finds if there is no making one.
        self._iterator = iter(dataset)
        _RUNNING.add(self)

    def __next__(self) -> Any:
        if self._iterator is None:
            raise StopIteration
        return next(self._iterator)

    @property
    def graph_iterator(self) -> Any:
        """The iterator that a `tf.function` takes elements from when it is given one; to be held for a call only."""
        return self._iterator

    def close(self) -> None:
        """Ends the pipeline, after the calls that are under way."""
        iterator, self._iterator = self._iterator, None
        if iterator is None or self._stop is None:
            return
        self._stop()
        # Not element by element of all workers, which they would have to wish for at the same time. What a source
        # raises has been heard by whoever asked for its elements, or was not asked for.
        for local in iterator._iterators:
            with contextlib.suppress(Exception):
                while any(left.has_value() for left in local.get_next_as_optional_list()):
                    pass

    def __del__(self) -> None:
        self.close()


_RUNNING: weakref.WeakSet[ElementStream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for stream in list(_RUNNING):
        stream.close()


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

    source = source.reader()

    # Rewriting functions by autograph, which they do not need, would take half a second.
    @tf.autograph.experimental.do_not_convert
    def dataset_fn(context: tf.distribute.InputContext) -> tf.data.Dataset:
        local = context.num_replicas_in_sync // context.num_input_pipelines

        def at(i: int) -> tuple[int, int]:
            return elements[i // local], context.input_pipeline_id * local + i % local

        begin = _read_by_numpy if _suits_numpy(source, plan) else _made_by_tensorflow
        dataset, make = begin(source, plan, dtype, at, len(elements) * local)
        if going is not None:
            dataset = dataset.take_while(lambda *_: going.read_value())
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        options.deterministic = True
        options.autotune.enabled = False
        # There is nothing to rewrite, and trying to takes a copy of all that a source holds in memory.
        options.experimental_optimization.apply_default_optimizations = False
        return dataset.map(make, num_parallel_calls=parallel).prefetch(_PREFETCH).with_options(options)

    stop = None if going is None else lambda: going.assign(False)
    return ElementStream(strategy.distribute_datasets_from_function(dataset_fn), stop=stop)


def host_elements(
    source: Source, plan: ElementPlan, *, dtype: tf.DType, replicas: range
) -> Iterator[list[Callable[[], tuple[np.ndarray, ...]]]]:
    """Element after element, what makes it for each of `replicas` in the memory of the host: `(x, y[, w], counts)`.

    All of these may be called side by side.
    """
    source = source.reader()
    make = _on_host(source, plan, dtype)
    return ([functools.partial(make, element, replica) for replica in replicas] for element in itertools.count())


def _on_host(source: Source, plan: ElementPlan, dtype: tf.DType) -> Callable[[int, int], tuple[np.ndarray, ...]]:
    """`(element, replica) -> (x, y[, w], counts)`."""
    if source.read_by_numpy:
        return ElementRows(source, plan, dtype.as_numpy_dtype)

    @functools.partial(tf.function, autograph=False)
    def made(number: tf.Tensor, first: tf.Tensor, counts: tf.Tensor) -> tuple[tf.Tensor, ...]:
        rows, counts = _element(source, plan, dtype, number, first, counts)
        return *rows, counts

    def make(element: int, replica: int) -> tuple[np.ndarray, ...]:
        with tf.device("CPU:0"):
            numbers = (tf.constant(number, tf.int64) for number in (element, *plan.first_rows(element, replica)))
            return tuple(column.numpy() for column in made(*numbers))

    return make


def _suits_numpy(source: Source, plan: ElementPlan) -> bool:
    """Whether NumPy brings rows into the layout of a plan sooner than TensorFlow."""
    as_they_lie = plan.row_major or source.num_features == 1
    return source.read_by_numpy and not (source.held_by_tensorflow and (as_they_lie or plan.shuffled))


def _read_by_numpy(
    source: Source, plan: ElementPlan, dtype: tf.DType, at: Callable[[int], tuple[int, int]], count: int
) -> tuple[tf.data.Dataset, _Make]:
    """The numbers of `count` elements, and what makes each of its number `i`: that of the plan is `at(i)`."""
    read = ElementRows(source, plan, dtype.as_numpy_dtype)
    shapes = [plan.x_shape(source.num_features), *[plan.tiled_shape] * (1 + source.weighted), [plan.slots]]
    types = [*[dtype] * (2 + source.weighted), tf.int32]

    def make(i: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
        *rows, counts = _called(lambda i: read(*at(int(i))), [i], types, shapes)
        return tuple(rows), counts

    return tf.data.Dataset.range(count), make


def _made_by_tensorflow(
    source: Source, plan: ElementPlan, dtype: tf.DType, at: Callable[[int], tuple[int, int]], count: int
) -> tuple[tf.data.Dataset, _Make]:
    """As `_read_by_numpy`, but the number and the places of the rows of each; their arithmetic runs in NumPy."""

    def places(begin: np.int64) -> list[np.ndarray]:
        numbers = [at(i) for i in range(int(begin), min(int(begin) + _PLACES_AT_ONCE, count))]
        found = zip(*((number, *plan.first_rows(number, replica)) for number, replica in numbers), strict=True)
        return [np.array(column, np.int64) for column in found]

    def several(begin: tf.Tensor) -> tuple[tf.Tensor, ...]:
        shapes = [[None], [None, plan.slots], [None, plan.slots]]
        return tuple(_called(places, [begin], [tf.int64] * 3, shapes))

    def make(number: tf.Tensor, first: tf.Tensor, counts: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
        return _element(source, plan, dtype, number, first, counts)

    return tf.data.Dataset.range(0, count, _PLACES_AT_ONCE).map(several).prefetch(1).unbatch(), make


def _called(function: Callable[..., Any], arguments: list[tf.Tensor], types: Any, shapes: list[Any]) -> list[tf.Tensor]:
    """What a function of NumPy arrays returns, a list."""
    found = tf.numpy_function(function, arguments, types, stateful=False)
    for tensor, shape in zip(found, shapes, strict=True):
        tensor.set_shape(shape)
    return found


def _element(
    source: Source, plan: ElementPlan, dtype: tf.DType, number: tf.Tensor, first: tf.Tensor, counts: tf.Tensor
) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
    """One element as TensorFlow operations, by the place and count of each slot's rows."""
    rows = plan.slot_rows
    # Most elements are full: they need no mask.
    full = tf.reduce_all(counts == rows)
    if plan.shuffled:
        last = max(0, source.num_rows(plan.split) - 1)
        positions = tf.minimum(first[:, tf.newaxis] + tf.range(rows, dtype=tf.int64), last)
        shape = positions.shape
        numbers = _called(lambda *at: [plan.row_numbers(*at)], [number, positions], [tf.int64], [shape])[0]
        taken = source.take(plan.split, tf.reshape(numbers, [-1]))
    elif plan.row_major or source.num_features == 1:
        taken = source.take_runs(plan.split, first, length=rows)
    else:
        taken = source.take_tiles(plan.split, first, length=rows, tile_rows=plan.tile_rows)
    if exponent := source.weight_exponent:
        # In two steps: the whole factor may be a number that TensorFlow takes for 0.
        halves = (2.0 ** (-exponent // 2), 2.0 ** (-exponent - -exponent // 2))
        taken = (*taken[:2], tf.cast(taken[2], tf.float64) * halves[0] * halves[1])
    columns = tuple(_rounded(column, dtype, tiny=source.holds_tiny) for column in taken)
    columns = tf.cond(full, lambda: columns, lambda: _where(tf.reshape(tf.sequence_mask(counts, rows), [-1]), columns))
    if source.weighted:
        columns = _where(columns[2] > 0, columns)
    x, *rest = columns
    return (_tiles(x, plan), *(tf.reshape(column, plan.tiled_shape) for column in rest)), tf.cast(counts, tf.int32)


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
    shape = plan.x_shape(x.shape[1])
    if plan.row_major or x.shape[1] == 1:
        return tf.reshape(x, shape)

    def turned(rows: np.ndarray) -> list[np.ndarray]:
        found = empty(shape, rows.dtype)
        write_tiles(found, 0, rows.T)
        return [found]

    # Ten times as fast as TensorFlow's own transposition.
    return _called(turned, [x], [x.dtype], [shape])[0]
