"""Steps over more rows than one program should hold: every block is one call of a compiled sum.

Calls run in parallel on all cores; they return integers, which add up in any order.

Legend: `P` parameters, `R` replicas, `K` sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.data.pipeline import ElementStream
from tapedist.training.block_pass import block_loop
from tapedist.training.steps import CallResult, RowPrograms

Specs = tuple[tf.TensorSpec, ...]
Rows = tuple[tf.Tensor, ...]


class BlockSteps(RowPrograms):
    """Full-batch steps, over blocks in device memory or streamed blocks.

    Args:
        **programs: see `RowPrograms`.
    """

    def __init__(self, **programs: Any):
        super().__init__(**programs)
        self.trace_once()

    # Blocks in device memory. A cache for each object: `functools.cache` on the method would keep every object alive.

    @functools.cached_property
    def _start(self) -> Any:
        return functools.cache(self._start_program)

    @functools.cached_property
    def _push(self) -> Any:
        return functools.cache(self._push_program)

    @functools.cached_property
    def _held_loop(self) -> Any:
        return functools.cache(self._held_loop_program)

    def hold(self, elements: Any) -> HeldBlocks:
        """Takes all blocks of an epoch into device memory.

        Args:
            elements: iterable of per-replica `(rows, counts [1])` of one block; at least one.
        """
        handles, counts, specs = None, [], None
        for rows, count in elements:
            if specs is None:
                local = [self.strategy.experimental_local_results(column)[0] for column in rows]
                specs = tuple(tf.TensorSpec(column.shape, column.dtype) for column in local)
                handles = self._traced._start(specs)()
            handles = self._traced._push(specs)(handles, rows)
            counts.append(count)
        return HeldBlocks(handles, specs or (), self._traced._stack(*counts))

    def _start_program(self, specs: Specs) -> Any:
        return tf.function(lambda: self.on_replicas(lambda: BlockList.empty(specs).handles), autograph=False)

    def _push_program(self, specs: Specs) -> Any:
        def push(handles, rows):  # type: ignore[no-untyped-def]
            return BlockList(handles, specs).with_block(rows).handles

        return tf.function(lambda handles, rows: self.on_replicas(push, handles, rows), autograph=False)

    @functools.cached_property
    def _stack(self) -> Any:
        return tf.function(lambda *counts: self.on_replicas(lambda *mine: tf.concat(mine, 0), *counts), autograph=False)

    # A list of blocks, because to join them to one tensor would copy them all.
    def _held_loop_program(self, specs: Specs) -> Any:
        def replica_step(state, handles, counts, step, settings):  # type: ignore[no-untyped-def]
            blocks, theta = BlockList(handles, specs), state[: self.num_parameters]

            def add_block(block, sums):  # type: ignore[no-untyped-def]
                return block + 1, sums + self.compiled_sums(theta, settings, blocks.rows(block), counts[block])

            # A graph loop around compiled calls: iterations depend on each other only by the addition of sums, so that
            # TensorFlow runs `parallel` of them at once.
            start = (tf.constant(0), self.row_sums.zero)
            sums = tf.while_loop(
                lambda block, _: block < tf.shape(counts)[0], add_block, start, parallel_iterations=self.parallel
            )[1]
            return self.add_and_apply(state, sums, step, settings)

        def loop(state, handles, counts, step, num_steps, settings):  # type: ignore[no-untyped-def]
            def one_step(i, state):  # type: ignore[no-untyped-def]
                return self.on_replicas(replica_step, state, handles, counts, step + tf.cast(i, tf.int64), settings)

            return self.repeat(one_step, state, num_steps)

        return tf.function(loop, autograph=False)

    def run(self, state: np.ndarray, held: HeldBlocks, *, step: int, num_steps: int, limit: float) -> CallResult:
        """`num_steps` updates over blocks in device memory; arguments as in `SlotSteps.run`."""
        return self.result(
            *self._traced._held_loop(held.specs)(
                tf.constant(state), held.handles, held.counts, tf.constant(step, tf.int64),
                tf.constant(num_steps), tf.constant(self.settings(limit)),
            )
        )  # fmt: skip

    def first_step(self, state: np.ndarray, rows: Any, counts: Any) -> tuple[CallResult, ...]:
        """One step over one block of each replica."""
        return (self.run(state, self.hold([(rows, counts)]), step=0, num_steps=1, limit=math.inf),)

    # Streamed blocks.

    @functools.cached_property
    def _block_loop(self) -> Any:
        return block_loop(self, self.compiled_sums, parallel=self.parallel)

    def adding_at(self, state: np.ndarray) -> Callable[[Any, ElementStream, int], Any]:
        """A function that adds blocks to sums at the parameters in `state`, for `BlockPass`."""
        arguments = (tf.constant(state[: self.num_parameters]), tf.constant(self.settings(0.0)))
        loop = self._traced._block_loop
        return lambda sums, blocks, visits: loop(sums, blocks.graph_iterator, tf.constant(visits), *arguments)

    @functools.cached_property
    def _finish(self) -> Any:
        def finish(state, sums, step, settings):  # type: ignore[no-untyped-def]
            return self.repeat(
                lambda i, state: self.on_replicas(self.add_and_apply, state, sums, step, settings),
                state,
                tf.constant(1),
            )

        return tf.function(finish, autograph=False)

    def finish(self, state: np.ndarray, sums: Any, *, step: int, limit: float) -> CallResult:
        """Applies the update of an epoch's per-replica `sums`."""
        return self.result(
            *self._traced._finish(
                tf.constant(state), sums, tf.constant(step, tf.int64), tf.constant(self.settings(limit))
            )
        )


@dataclasses.dataclass(frozen=True)
class HeldBlocks:
    """An epoch's blocks on the replicas.

    Attributes:
        handles: per-replica block lists, one per column.
        specs: shape and type of each column's blocks.
        counts: per-replica int32 `[blocks]`.
    """

    handles: Any
    specs: Specs
    counts: Any


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
