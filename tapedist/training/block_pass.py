"""One pass over a split, block by block: what streamed epochs and the moments have in common.

Each shard's blocks are added in their order, whoever adds them and whatever is added in between; so the sums and how
many blocks of each shard are in them are all that a checkpoint needs to go on halfway through a pass, also on another
number of replicas.

Legend: `V` virtual shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tapedist.data.element_stream import ElementStream
from tapedist.data.pipeline import BlockOrder
from tapedist.training.replicas import Replicas


class BlockPass:
    """Sums of a pass that may be interrupted between blocks.

    Args:
        replicas: moves sums between the host and the replicas.
        order: of the blocks of a pass, from its beginning.
        passes: passes that one iterator serves: what TensorFlow compiles for an iterator is never given back, so that
            one for each of many passes would eat up the memory.
        elements: `(order, passes) -> per-replica (rows, counts)` of one block each, to the end of so many passes, the
            first of which is what is left by `order`.
    """

    def __init__(
        self,
        replicas: Replicas,
        *,
        order: BlockOrder,
        passes: int,
        elements: Callable[[BlockOrder, int], ElementStream],
    ):
        self._replicas = replicas
        self._whole = self._order = order
        self._passes = self._passes_left = passes
        self._elements = elements
        self._turn = 0
        self._sums: Any = None
        self._iterator: ElementStream | None = None

    def run(self, add: Callable[[Any, Iterator[Any], list[int]], Any], *, interrupted: Callable[[], bool]) -> Any:
        """Goes to the end of the pass and starts over with the next call.

        Args:
            add: `(the shards' sums, blocks, places) -> their sums with one more block for each of places`, per replica;
                it takes that many elements from the iterator `blocks`.
            interrupted: asked now and then, after as many turns as a replica has shards; each call does at least these,
                so that asking too often stalls nothing.

        Returns:
            The shards' sums as `Replicas.scattered` lays them out, or None if interrupted.
        """
        if self._sums is None:
            self._sums = self._replicas.scattered(np.zeros([self._replicas.num_shards, self._replicas.partial_width]))
        if self._iterator is None:
            self._iterator = self._elements(self._order.after(self._turn), self._passes)
            self._passes_left = self._passes
        first, every = self._turn, self._replicas.replica_width
        while self._turn < self._order.turns:
            if self._turn > first and interrupted():
                return None
            turns = range(self._turn, min(self._turn + every, self._order.turns))
            self._sums = add(self._sums, self._iterator.graph_iterator, [self._order.place(turn)[0] for turn in turns])
            self._turn = turns.stop
        sums = self._sums
        self._order, self._turn, self._sums, self._passes_left = self._whole, 0, None, self._passes_left - 1
        if not self._passes_left:
            self._iterator = None
        return sums

    def progress(self) -> dict[str, np.ndarray]:
        """Blocks of each shard that are done, int64 `[V]`, and the sums so far `[V, width]`; empty between passes."""
        done = self._order.after(self._turn).done
        return {"blocks": done, "sums": self._replicas.gathered(self._sums)} if done.any() else {}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Takes up what `progress` gave, on any topology; sums of another version's width are made anew."""
        if progress and progress["sums"].shape[1] == self._replicas.partial_width:
            whole = self._whole
            self._order, self._turn = BlockOrder(whole.plan, whole.layout, progress["blocks"]), 0
            self._sums = self._replicas.scattered(progress["sums"])
            self._iterator = None
