"""A pass can stop between blocks and go on elsewhere, and many passes share an iterator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest

from tapedist.data.blocks import BlockPlan
from tapedist.data.pipeline import BlockOrder, Layout
from tapedist.training.block_pass import BlockPass

# Rows so wide that a block has 64 of them: 45 blocks, 6 or 7 a shard.
PLAN = BlockPlan(num_rows=64 * 45 - 7, num_features=2**16, itemsize=4, num_shards=7)
# What each shard sums up to: the numbers of its blocks plus one, in decimal places by the order in which they were met.
EXPECTED = [[functools.reduce(lambda total, block: total * 50 + block + 1, PLAN.shard_blocks(v), 0)] for v in range(7)]


class Replicas:
    """`R` replicas without TensorFlow: a per-replica value is a list."""

    num_shards = PLAN.num_shards
    partial_width = 1

    def __init__(self, layout: Layout):
        self.layout = layout
        self.replica_width = layout.replica_width

    def scattered(self, sums: np.ndarray) -> list[np.ndarray]:
        padded = np.zeros([self.layout.replica_width * self.layout.num_replicas])
        padded[: len(sums)] = sums[:, 0]
        return list(padded.reshape(self.layout.num_replicas, -1))

    def gathered(self, sums: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(sums)[: self.num_shards, np.newaxis]


class Stream(Iterator[Any]):
    """An `ElementStream` without TensorFlow."""

    def __init__(self, elements: Iterator[Any]):
        self.graph_iterator = elements

    def __next__(self) -> Any:
        return next(self.graph_iterator)


class Elements:
    """Blocks that are their own numbers; notes the iterators that were asked for."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.passes: list[int] = []

    def __call__(self, order: BlockOrder, passes: int) -> Stream:
        self.passes.append(passes)
        return Stream(self._blocks(order, passes))

    def _blocks(self, order: BlockOrder, passes: int) -> Iterator[tuple[list[range], None]]:
        for _ in range(passes):
            for turn in range(order.turns):
                yield [order.block(turn, replica) for replica in range(self.layout.num_replicas)], None
            order = BlockOrder.whole(order.plan, order.layout)


def _pass(replicas: int, *, passes: int = 1) -> tuple[BlockPass, Elements]:
    layout = Layout(PLAN.num_shards, replicas)
    elements, hosts = Elements(layout), cast(Any, Replicas(layout))
    return BlockPass(hosts, order=BlockOrder.whole(PLAN, layout), passes=passes, elements=cast(Any, elements)), elements


def _add(sums: list[np.ndarray], blocks: Iterator[Any], places: list[int]) -> list[np.ndarray]:
    sums = [replica.copy() for replica in sums]
    for place in places:
        for replica, block in zip(sums, next(blocks)[0], strict=True):
            if len(block):
                replica[place] = replica[place] * 50 + block.start // PLAN.block_rows + 1
    return sums


def _interrupted_at(call: int) -> Callable[[], bool]:
    calls = iter(range(10**6))
    return lambda: next(calls) == call


def _sums(found: BlockPass, replicas: int) -> np.ndarray | None:
    sums = found.run(_add, interrupted=lambda: False)
    return None if sums is None else Replicas(Layout(PLAN.num_shards, replicas)).gathered(sums)


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_many_passes_share_an_iterator(replicas: int):
    found, elements = _pass(replicas, passes=3)
    for _ in range(7):
        np.testing.assert_array_equal(_sums(found, replicas), EXPECTED)
    assert elements.passes == [3, 3, 3]
    assert not found.progress()


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("second", [1, 2, 3, 7])
@pytest.mark.parametrize("first", [1, 2, 3, 7])
def test_stopped_halfway_and_taken_up_on_other_replicas(first: int, second: int, call: int):
    begun, _ = _pass(first)
    assert begun.run(_add, interrupted=_interrupted_at(call)) is None
    for replicas, other in ((first, begun), (second, _pass(second)[0])):
        other.restore(begun.progress())
        np.testing.assert_array_equal(_sums(other, replicas), EXPECTED)
        np.testing.assert_array_equal(_sums(other, replicas), EXPECTED)


def test_one_replica_reads_the_rows_in_their_order():
    order = BlockOrder.whole(PLAN, Layout(PLAN.num_shards, 1))
    rows = [row for turn in range(order.turns) for row in order.block(turn, 0)]
    assert rows == list(range(PLAN.num_rows))
