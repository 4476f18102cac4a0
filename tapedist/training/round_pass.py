"""One pass over a split, round by round: what streamed epochs and the moments have in common.

After a whole round every shard has seen as many blocks, on any topology; so sums and a round number are all that a
checkpoint needs to go on halfway through a pass, also on another number of replicas.

Legend: `V` virtual shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tapedist.training.steps import Replicas


class RoundPass:
    """Sums of a pass that may be interrupted between rounds.

    Args:
        replicas: moves sums between the host and the replicas.
        rounds: rounds in the pass.
        passes: passes that one iterator serves: what TensorFlow compiles for an iterator is never given back, so that
            one for each of many passes would eat up the memory.
        elements: `(first round, passes) -> per-replica (rows, counts)` of one block each, from that round of the first
            pass to the end of the last.
    """

    def __init__(self, replicas: Replicas, *, rounds: int, passes: int, elements: Callable[[int, int], Iterable[Any]]):
        self._replicas = replicas
        self._rounds = rounds
        self._passes = self._passes_left = passes
        self._elements = elements
        self._round = 0
        self._sums: list[Any] = []
        self._iterator: Iterator[Any] | None = None

    def run(self, add: Callable[[Any, Any, Any], Any], *, interrupted: Callable[[], bool]) -> list[Any] | None:
        """Goes to the end of the pass and starts over with the next call.

        Args:
            add: `(a shard's sum, rows, counts) -> its sum with one more block`, per replica.
            interrupted: asked between rounds; each call does at least one, so that asking too often stalls nothing.

        Returns:
            The shards' sums as `Replicas.scattered` lays them out, or None if interrupted.
        """
        if not self._sums:
            self._sums = self._replicas.scattered(np.zeros([self._replicas.num_shards, self._replicas.partial_width]))
        if self._iterator is None:
            self._iterator = iter(self._elements(self._round, self._passes))
            self._passes_left = self._passes
        first = self._round
        while self._round < self._rounds:
            if self._round > first and interrupted():
                return None
            for place in range(len(self._sums)):
                self._sums[place] = add(self._sums[place], *next(self._iterator))
            self._round += 1
        sums = self._sums
        self._round, self._sums, self._passes_left = 0, [], self._passes_left - 1
        if not self._passes_left:
            self._iterator = None
        return sums

    def progress(self) -> dict[str, np.ndarray]:
        """The rounds done and the sums `[V, width]` so far; empty between passes."""
        if self._round == 0:
            return {}
        return {"round": np.array(self._round), "sums": self._replicas.gathered(self._sums)}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Takes up what `progress` gave, on any topology."""
        if progress:
            self._round = int(progress["round"])
            self._sums = self._replicas.scattered(progress["sums"])
            self._iterator = None
