"""Steps over more rows than one program should hold: every block is one call of one compiled sum.

A call's shape is the block's, on any topology, so its bits are too; and calls run side by side on all cores. A
replica goes through its shards one after the other (`pipeline.BlockOrder`).

Legend: `P` parameters, `V` shards, `u` shards of one replica, `S` rows of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.training import partials as fixed_order
from tapedist.training.block_list import BlockList, Rows
from tapedist.training.block_turns import BlockTurns
from tapedist.training.steps import CallResult, StepPrograms, slice_rows

Specs = tuple[tf.TensorSpec, ...]


class BlockSteps(StepPrograms):
    """Full-batch steps, from blocks in device memory or from blocks that stream past.

    Args:
        tile_rows: rows that one loop trip inside a block sums.
        parallel: blocks summed side by side on a replica.
        **programs: see `StepPrograms`.
    """

    def __init__(self, *, tile_rows: int, parallel: int, **programs: Any):
        super().__init__(**programs)
        self._tile_rows = tile_rows
        self._parallel = parallel
        self.trace_once(tile_rows, parallel)

    @functools.cached_property
    def _block_sum(self) -> Any:
        def block_sum(masters: tf.Tensor, rows: Rows, count: tf.Tensor) -> tf.Tensor:
            tile_rows = self._tile_rows
            tiles = rows[1].shape[0] // tile_rows
            if tiles == 1:
                return self.rows_sum(masters, rows, count)

            def tile_sum(tile: tf.Tensor) -> tf.Tensor:
                first = tile * tile_rows
                piece = tuple(slice_rows(column, first, tile_rows) for column in rows)
                return self.rows_sum(masters, piece, tf.clip_by_value(count - first, 0, tile_rows))

            return fixed_order.running_sum(tile_sum, count=tiles, width=self.partial_width)

        return tf.function(block_sum, jit_compile=True, autograph=False)

    def _block_partials(self, state: tf.Tensor, blocks: BlockList, counts: tf.Tensor) -> tf.Tensor:
        """Partials `[blocks, width]` of a replica's blocks; `counts` is int32 `[blocks]`."""
        masters = state[: self.num_parameters]
        block_sum = self._block_sum
        return fixed_order.block_partials(
            lambda block: block_sum(masters, blocks.rows(block), counts[block]),
            num_blocks=tf.shape(counts)[0],
            width=self.partial_width,
            parallel=self._parallel,
        )

    # Blocks in device memory. A cache for each object: one of the class would keep them all.

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
            elements: iterable of per-replica `(rows, counts [1, 1])` of one block, shard after shard and as many of
                each; at least one.
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
        def stack(*counts):  # type: ignore[no-untyped-def]
            return tf.reshape(tf.concat(counts, 0), [self.replica_width, -1])

        return tf.function(lambda *counts: self.on_replicas(stack, *counts), autograph=False)

    def _held_loop_program(self, specs: Specs) -> Any:
        def replica_step(state, handles, counts, step, settings):  # type: ignore[no-untyped-def]
            flat = self._block_partials(state, BlockList(handles, specs), tf.reshape(counts, [-1]))
            shards = counts.shape[0]
            by_round = tf.transpose(tf.reshape(flat, [shards, -1, self.partial_width]), [1, 0, 2])
            sums = fixed_order.fold_rounds(by_round, shape=[shards, self.partial_width])
            return self.gather_and_apply(state, sums, step, settings)

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

    # Blocks that stream past.

    @functools.cached_property
    def _turns(self) -> BlockTurns:
        return BlockTurns(self, block_sum=self._block_sum, merge=tf.add, parallel=self._parallel)

    @functools.cached_property
    def _finish(self) -> Any:
        def finish(state, sums, step, settings):  # type: ignore[no-untyped-def]
            return self.repeat(
                lambda i, state: self.on_replicas(self.gather_and_apply, state, sums, step, settings),
                state,
                tf.constant(1),
            )

        return tf.function(finish, autograph=False)

    def add_blocks(self, state: np.ndarray, sums: Any, blocks: Any, places: list[int]) -> Any:
        """The shards' sums on each replica, plus the next blocks' partials at the parameters in `state`."""
        return self._traced._turns(sums, blocks, places, tf.constant(state[: self.num_parameters]))

    def finish(self, state: np.ndarray, sums: Any, *, step: int, limit: float) -> CallResult:
        """The update that an epoch's `sums` make, per-replica `[ceil(V / R), width]`."""
        return self.result(
            *self._traced._finish(
                tf.constant(state), sums, tf.constant(step, tf.int64), tf.constant(self.settings(limit))
            )
        )


@dataclasses.dataclass(frozen=True)
class HeldBlocks:
    """An epoch's blocks on the replicas.

    Attributes:
        handles: per-replica block lists, one per column, shard after shard.
        specs: shape and type of each column's blocks.
        counts: per-replica int32 `[u, rounds]`.
    """

    handles: Any
    specs: Specs
    counts: Any
