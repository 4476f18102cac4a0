"""What every engine is made from, and how it comes by its rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.data import pipeline
from tapedist.data.blocks import BlockPlan, Source
from tapedist.data.element_stream import ElementStream
from tapedist.training.block_pass import BlockPass
from tapedist.training.replicas import Replicas, local_devices

_MOST_PASSES = 2**20  # Of one iterator: its elements are numbered in int64.


def memory_budget() -> int:
    """Bytes of rows that `--cache=auto` may hold: a quarter of the memory, which leaves room for the copies made on the
    way in."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What every engine needs.

    Attributes:
        source: the rows.
        programs: keyword arguments of `StepPrograms`.
        num_shards: `V`.
        cache: "auto", "device" or "none".
        fit_intercept: whether a linear model has a bias.
        budget: bytes of rows that may be held in memory; equal on all workers, which must choose the same form.
    """

    source: Source
    programs: Mapping[str, Any]
    num_shards: int
    cache: str
    fit_intercept: bool = True
    budget: int = dataclasses.field(default_factory=memory_budget)

    @property
    def strategy(self) -> tf.distribute.Strategy:
        return self.programs["strategy"]

    @property
    def dtype(self) -> tf.DType:
        return self.programs["dtype"]

    @property
    def layout(self) -> pipeline.Layout:
        return pipeline.Layout(self.num_shards, self.strategy.num_replicas_in_sync)

    @property
    def parallel(self) -> int:
        """Blocks under way at once on a replica: the cores, shared among the local replicas."""
        return max(1, len(os.sched_getaffinity(0)) // len(local_devices(self.strategy)))

    @property
    def row_programs(self) -> Mapping[str, Any]:
        """Keyword arguments of the `StepPrograms` that sum these rows."""
        return {**self.programs, "weighted": self.source.weighted}

    def row_bytes(self) -> int:
        return (self.source.num_features + 1 + self.source.weighted) * self.dtype.size

    def block_plan(self, split: str) -> BlockPlan:
        return BlockPlan(self.source.num_rows(split), self.source.num_features, self.dtype.size, self.num_shards)

    def elements(self, plan: pipeline.ElementPlan, elements: range) -> ElementStream:
        cores = len(os.sched_getaffinity(0))
        return pipeline.distribute(
            self.strategy, self.source, plan, elements=elements, dtype=self.dtype, parallel=cores
        )

    def block_pass(self, replicas: Replicas, plan: BlockPlan, *, split: str, passes: int) -> BlockPass:
        """Passes over the blocks of a split; `passes` is about how many there will be."""
        whole = pipeline.BlockOrder.whole(plan, self.layout)

        def elements(order: pipeline.BlockOrder, passes: int) -> ElementStream:
            turns = order.turns + (passes - 1) * whole.turns
            return self.elements(pipeline.block_elements(order, split=split), range(turns))

        return BlockPass(replicas, order=whole, passes=min(passes, _MOST_PASSES), elements=elements)
