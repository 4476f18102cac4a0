"""One pass over a split, block by block: what streamed epochs and the moments have in common.

Sums of blocks have no order, so the sums so far and which rows are not in them yet are all that a checkpoint needs to
go on halfway through a pass, on any number of replicas and with blocks of any size.

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
    """`(sums, blocks, visits, *arguments) -> sums` with the next `visits` blocks of each replica in them, as one graph.

    Args:
        replicas: where the blocks come from and the sums are.
        block_sums: `(*arguments, rows, count) -> sums` of one block; a compiled function.
        parallel: blocks of a replica under way at once.
    """

    def replica_turn(sums, rows, counts, *arguments):  # type: ignore[no-untyped-def]
        return sums + block_sums(*arguments, rows, counts[0])

    def loop(sums, blocks, visits, *arguments):  # type: ignore[no-untyped-def]
        def visit(i, taken, sums):  # type: ignore[no-untyped-def]
            # Turns overlap, and nothing else would make one take its block after the turn before it.
            with tf.control_dependencies([taken]):
                rows, counts = next(blocks)
            taken = tf.add_n([count[0] for count in replicas.strategy.experimental_local_results(counts)])
            return i + 1, taken, replicas.on_replicas(replica_turn, sums, rows, counts, *arguments)

        # As `run` returns them, which the loop must meet with: of a worker's lone replica, a plain tensor.
        sums = replicas.on_replicas(tf.identity, sums)
        # One more than are computed, whose block is being waited for.
        start, under_way = (tf.constant(0), tf.constant(0), sums), parallel + 1
        return tf.while_loop(lambda i, *_: i < visits, visit, start, parallel_iterations=under_way)[2]

    return tf.function(loop, autograph=False)


class BlockPass:
    """Sums of a pass that may be interrupted between blocks.

    Args:
        replicas: moves sums between the host and the replicas.
        zero: sums `[...]` before a row is in them.
        order: of the blocks of a pass, from its beginning.
        passes: passes that one iterator serves: what TensorFlow compiles for an iterator is never given back, so that
            one for each of many passes would eat up the memory.
        elements: `(order, passes) -> elements` of one block of each replica, to the end of so many passes, the first of
            which is what is left by `order`.
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
            interrupted: asked now and then, between a few turns; each call does at least these, so that asking too
                often stalls nothing.

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
        """Takes up what `progress` gave, on any topology."""
        if progress:
            whole = self._whole
            self._order = BlockOrder(progress["remaining"], whole.block_rows, whole.num_replicas)
            self._visit, self._iterator = 0, None
            self._sums = self._replicas.given_to_first(progress["sums"])
