"""The common arguments of all engines, and their access to rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from tapedist.data import orders, pipeline
from tapedist.data.orders import BlockOrder, BlockPlan, ElementPlan, block_elements, split_elements
from tapedist.data.pipeline import ElementStream
from tapedist.data.ranges import Bounds
from tapedist.data.source import Source
from tapedist.errors import WrongAnswerError
from tapedist.training import exact
from tapedist.training.block_pass import BlockPass
from tapedist.training.linear_sums import LinearSums
from tapedist.training.replicas import Replicas, local_devices
from tapedist.training.steps import Problem
from tapedist.training.tape_sums import PlainSums

Made = TypeVar("Made")

_MOST_PASSES = 2**20  # Of one iterator: its elements are numbered in int64.
# Rows of a custom model are summed in about so many tiles.
_MODULE_TILES = 16
_MOST_MODULE_ROWS = 2048


def memory_budget() -> int:
    """Bytes of rows that `--cache=auto` may hold: a quarter of the memory, which leaves room for the copies made on the
    way in."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The common arguments of all engines.

    Attributes:
        source: the rows.
        strategy: of the replicas.
        problem: the step's computation.
        bounds: those of a split, "train" or "test".
        cache: "auto", "device" or "none".
        budget: bytes of rows that may be held in memory; equal on all workers, which must choose the same engine.
    """

    source: Source
    strategy: tf.distribute.Strategy
    problem: Problem
    bounds: Callable[[str], Bounds]
    cache: str
    budget: int = dataclasses.field(default_factory=memory_budget)

    @property
    def num_replicas(self) -> int:
        return self.strategy.num_replicas_in_sync

    @property
    def dtype(self) -> tf.DType:
        return self.problem.dtype

    @property
    def on_cpu(self) -> bool:
        """Returns whether the replicas here are CPUs."""
        return all("CPU" in device for device in local_devices(self.strategy))

    @property
    def parallel(self) -> int:
        """Blocks that a replica sums at the same time: the cores, divided by the local replicas."""
        # Not `os.cpu_count`, which ignores `taskset` and a scheduler's CPU sets.
        return max(1, len(os.sched_getaffinity(0)) // len(local_devices(self.strategy)))

    @property
    def row_bytes(self) -> int:
        return (self.source.num_features + 1 + self.source.weighted) * self.dtype.size

    def programs(self, split: str, *, even: bool = False) -> dict[str, Any]:
        """Keyword arguments of the `RowPrograms` that sum the rows of a split."""
        return {
            "strategy": self.strategy,
            "problem": self.problem,
            "bounds": self.bounds(split).largest(),
            "weighted": self.source.weighted,
            "even": even,
            "parallel": self.parallel,
        }

    def tile_rows(self, rows: int) -> int:
        """Rows of a tile, for a sum over `rows` rows."""
        if self.problem.row_sums_kind is LinearSums:
            return orders.TILE_ROWS
        if self.problem.row_sums_kind is PlainSums:
            return orders.product_tile_rows(rows, self.source.num_features)
        # The bits of a custom model's tile are the compiler's, so that its size must not depend on the replicas.
        return max(1, min(_MOST_MODULE_ROWS, -(-rows // _MODULE_TILES)))

    def tiles(self, rows: int, tile_rows: int = 0) -> dict[str, Any]:
        """The layout of a replica's share of `rows`, as keyword arguments of the pipeline's elements.

        Args:
            rows: of all replicas.
            tile_rows: of a tile, where it is not that of the problem's sums.
        """
        tile_rows = tile_rows or self.tile_rows(rows)
        tiles = orders.share_tiles(rows, self.num_replicas, tile_rows)
        # An int64 sums at most `MOST_ROWS` rows; more of them are summed in parts of equal size, as one tensor.
        parts = -(-tiles * tile_rows // exact.MOST_ROWS)
        return {"tiles": -(-tiles // parts) * parts, "tile_rows": tile_rows}

    def block_plan(self, split: str, tile_rows: int = 0) -> BlockPlan:
        rows = self.source.num_rows(split)
        return BlockPlan(rows, self.source.num_features, self.dtype.size, tile_rows or self.tile_rows(rows))

    def proven(self, make: Callable[[Setup], Made]) -> Made:
        """Returns `make(self)`, with plain sums if `fast` ones fail the known-answer test here."""
        try:
            return make(self)
        except WrongAnswerError:
            if self.problem.arithmetic != "fast":
                raise
        return make(dataclasses.replace(self, problem=dataclasses.replace(self.problem, arithmetic="plain")))

    def elements(self, plan: ElementPlan, elements: range) -> ElementStream:
        cores = len(os.sched_getaffinity(0))
        return pipeline.distribute(
            self.strategy, self.source, plan, elements=elements, dtype=self.dtype, parallel=cores
        )

    def split_at_hand(self, split: str, *, tile_rows: int = 0, row_major: bool | None = None) -> tuple[Any, Any]:
        """Per-replica `(rows, counts [1])` of a whole split.

        Args:
            split: "train" or "test".
            tile_rows: of a tile, where it is not that of the problem's sums.
            row_major: the same of its layout.
        """
        rows = self.source.num_rows(split)
        plan = split_elements(
            rows, self.num_replicas, split=split, **self.tiles(rows, tile_rows),
            row_major=self.problem.row_major if row_major is None else row_major,
        )  # fmt: skip
        return next(self.elements(plan, range(1)))

    def blocks(
        self, plan: BlockPlan, *, split: str, row_major: bool, on_host: range = range(0)
    ) -> tuple[BlockOrder, Callable[[BlockOrder, int], Any]]:
        """A pass over the blocks of a split, and a function `(order, passes) -> elements`.

        The first of the passes is over the blocks of `order`, the others over all.

        Args:
            plan: the sizes of the blocks.
            split: "train" or "test".
            row_major: whether tiles are `[T, d]`.
            on_host: the replicas whose elements come from `pipeline.host_elements`, if any.
        """
        whole = BlockOrder.whole(plan.num_rows, plan.block_rows, self.num_replicas)

        def elements(order: BlockOrder, passes: int) -> Any:
            # The first pass may be the rest of one that a checkpoint interrupted.
            visits = order.visits + (passes - 1) * whole.visits
            element = block_elements(
                order, whole, split=split, tiles=plan.tiles, tile_rows=plan.tile_rows, row_major=row_major
            )
            # For NumPy, without `tf.data`: a pass through a graph began 100 ms later, and its threads got in the way.
            if on_host:
                return pipeline.host_elements(self.source, element, dtype=self.dtype, replicas=on_host)
            return self.elements(element, range(visits))

        return whole, elements

    def block_pass(
        self,
        replicas: Replicas,
        plan: BlockPlan,
        *,
        zero: np.ndarray,
        passes: int,
        **blocks: Any,
    ) -> BlockPass:
        """Passes over the blocks of a split.

        Args:
            replicas: exchanges sums.
            plan: the sizes of the blocks.
            zero: sums of no rows.
            passes: the expected number of passes.
            **blocks: see `blocks`.
        """
        whole, elements = self.blocks(plan, **blocks)
        return BlockPass(replicas, zero=zero, order=whole, passes=min(passes, _MOST_PASSES), elements=elements)
