"""Some turns of a pass as one graph: blocks are taken in their order and summed side by side, on all cores.

A block's sum comes from one compiled call that starts from zero, so its bits depend neither on its neighbours nor on
what else runs; and each joins its shard's sum after the blocks before it.

Legend: `V` shards, `R` replicas, `width` numbers in a sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.training.replicas import Replicas


class BlockTurns:
    """Adds blocks to the sums of their shards.

    Args:
        replicas: where the blocks come from and the sums are.
        block_sum: `(*inputs, rows, count) -> sum [width]` of one block; a compiled function.
        merge: `(a shard's sum, a block's) -> their sum [width]`.
        parallel: blocks of a replica under way at once.
    """

    def __init__(
        self,
        replicas: Replicas,
        *,
        block_sum: Callable[..., tf.Tensor],
        merge: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        parallel: int,
    ):
        self._replicas = replicas
        self._block_sum = block_sum
        self._merge = merge
        self._parallel = parallel

    def __call__(self, sums: Any, blocks: Any, places: list[int], *inputs: tf.Tensor) -> Any:
        """One turn for each of `places`.

        Args:
            sums: per-replica float64 `[ceil(V / R), width]`.
            blocks: iterator over per-replica `(rows, counts [1, 1])` of one block.
            places: the shard, among each replica's own, that each turn's blocks belong to; at most `ceil(V / R)`.
            *inputs: what `block_sum` needs besides a block.

        Returns:
            `sums` with the blocks in them.
        """
        padded = np.zeros(self._replicas.replica_width, np.int32)
        padded[: len(places)] = places
        return self._loop(sums, blocks, tf.constant(padded), tf.constant(len(places)), *inputs)

    @functools.cached_property
    def _loop(self) -> Any:
        def replica_turn(sums, rows, counts, place, *inputs):  # type: ignore[no-untyped-def]
            merged = self._merge(sums[place], self._block_sum(*inputs, rows, counts[0, 0]))
            return tf.tensor_scatter_nd_update(sums, [[place]], merged[tf.newaxis])

        def loop(sums, blocks, places, turns, *inputs):  # type: ignore[no-untyped-def]
            def turn(i, taken, sums):  # type: ignore[no-untyped-def]
                # Turns overlap, and nothing else would make one take its block after the turn before it.
                with tf.control_dependencies([taken]):
                    rows, counts = next(blocks)
                taken = tf.add_n([count[0, 0] for count in self._replicas.strategy.experimental_local_results(counts)])
                sums = self._replicas.on_replicas(replica_turn, sums, rows, counts, places[i], *inputs)
                return i + 1, taken, sums

            # As `run` returns them, which the loop must meet with: of a worker's lone replica, a plain tensor.
            sums = self._replicas.on_replicas(tf.identity, sums)
            # One more than are computed, whose block is being waited for.
            start, under_way = (tf.constant(0), tf.constant(0), sums), self._parallel + 1
            return tf.while_loop(lambda i, *_: i < turns, turn, start, parallel_iterations=under_way)[2]

        return tf.function(loop, autograph=False)
