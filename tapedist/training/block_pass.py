"""One pass over a split, block by block, for streamed epochs and for moments.

Sums of blocks have no order, so a checkpoint in the middle of a pass needs only the sums so far and the ranges of rows
that are not in them. The pass can then be resumed on any number of replicas and with blocks of any size.

Legend: `R` replicas, `K` sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.data.orders import BlockOrder
from tapedist.training.replicas import Replicas

_VISITS_PER_CALL = 16


def block_loop(replicas: Replicas, block_sums: Callable[..., tf.Tensor], *, parallel: int) -> Any:
    """A graph function `(sums, blocks, visits, *arguments) -> sums` that adds the next `visits` blocks of each replica.

    Args:
        replicas: of the blocks and sums.
        block_sums: `(*arguments, rows, count) -> sums` of one block; a compiled function.
        parallel: blocks that a replica sums at the same time.
    """

    def replica_turn(sums, rows, counts, *arguments):  # type: ignore[no-untyped-def]
        return sums + block_sums(*arguments, rows, counts[0])

    def loop(sums, blocks, visits, *arguments):  # type: ignore[no-untyped-def]
        def visit(i, taken, sums):  # type: ignore[no-untyped-def]
            # Iterations of `tf.while_loop` overlap, and nothing else makes `next` of one wait for `next` of the
            # iteration before.
            with tf.control_dependencies([taken]):
                rows, counts = next(blocks)
            taken = tf.add_n([count[0] for count in replicas.strategy.experimental_local_results(counts)])
            return i + 1, taken, replicas.on_replicas(replica_turn, sums, rows, counts, *arguments)

        # The loop's variable must have one structure: `run` gives a plain tensor for a worker's lone replica, where the
        # host may have handed over a per-replica value.
        sums = replicas.on_replicas(tf.identity, sums)
        # One iteration more than there are cores waits for its block.
        start, under_way = (tf.constant(0), tf.constant(0), sums), parallel + 1
        return tf.while_loop(lambda i, *_: i < visits, visit, start, parallel_iterations=under_way)[2]

    return tf.function(loop, autograph=False)


class BlockPass:
    """Sums of a pass that may be interrupted between blocks.

    Args:
        replicas: moves sums between the host and the replicas.
        zero: sums `[...]` of no rows.
        order: of the blocks of a pass, from its beginning.
        passes: passes that one iterator serves. TensorFlow never frees the program of an iterator, so that an iterator
            for each of many passes would exhaust the memory.
        elements: `(order, passes) -> elements` of one block of each replica, to the end of so many passes; the first
            pass is over the blocks of `order`.
    """

    def __init__(
        self,
        replicas: Replicas,
        *,
        zero: np.ndarray,
        order: BlockOrder,
        passes: int,
        elements: Callable[[BlockOrder, int], Any],
    ):
        self._replicas = replicas
        self._zero = zero
        self._whole = self._order = order
        self._passes = self._passes_left = passes
        self._elements = elements
        self._visit = 0
        self._sums: Any = None
        self._iterator: Any = None

    def run(self, add: Callable[[Any, Any, int], Any], *, interrupted: Callable[[], bool]) -> Any:
        """Goes to the end of the pass and starts over with the next call.

        Args:
            add: `(sums, elements, visits) -> sums` with the next so many blocks of each replica in them.
            interrupted: called every few blocks; each call of `run` adds blocks before it asks, so that a caller that
                interrupts every call makes progress all the same.

        Returns:
            Each replica's sums, or None if interrupted.
        """
        if self._sums is None:
            self._sums = self._replicas.given_to_first(self._zero)
        if self._iterator is None:
            self._iterator = self._elements(self._left(), self._passes)
            self._passes_left = self._passes
        first = self._visit
        while self._visit < self._order.visits:
            if self._visit > first and interrupted():
                return None
            # The same number on all processes, because `interrupted` is a collective.
            visits = min(_VISITS_PER_CALL, self._order.visits - self._visit)
            self._sums = add(self._sums, self._iterator, visits)
            self._visit += visits
        sums = self._sums
        self._order, self._visit, self._sums, self._passes_left = self._whole, 0, None, self._passes_left - 1
        if not self._passes_left:
            self._iterator = None
        return sums

    def _left(self) -> BlockOrder:
        order = self._order
        return BlockOrder(order.after(self._visit), order.block_rows, order.num_replicas)

    def progress(self) -> dict[str, np.ndarray]:
        """The sums so far, and the rows that are not in them as int64 `[k, 2]` ranges; empty between passes."""
        if self._sums is None:
            return {}
        return {"remaining": self._order.after(self._visit), "sums": self._replicas.added(self._sums)}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Restores what `progress` returned, on any topology."""
        if progress:
            whole = self._whole
            self._order = BlockOrder(progress["remaining"], whole.block_rows, whole.num_replicas)
            self._visit, self._iterator = 0, None
            # Sums have no order, so that it does not matter which replica holds those of the rows before.
            self._sums = self._replicas.given_to_first(progress["sums"])
