"""A pass goes round by round, can stop between rounds, and many passes share an iterator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tapedist.training.round_pass import RoundPass

ROUNDS, WIDTH = 5, 2


class OneReplica:
    """Two shards on one replica, without TensorFlow."""

    num_shards = WIDTH
    partial_width = 1

    def scattered(self, sums: np.ndarray) -> list[np.ndarray]:
        return list(sums)

    def gathered(self, sums: list[np.ndarray]) -> np.ndarray:
        return np.stack(sums)


class Elements:
    """Blocks that are their own numbers; counts the iterators that were asked for."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []

    def __call__(self, first: int, passes: int) -> Iterator[tuple[int, int]]:
        self.begun.append((first, passes))
        return ((number % (ROUNDS * WIDTH), 1) for number in range(first * WIDTH, passes * ROUNDS * WIDTH))


def _pass(elements: Elements, passes: int) -> RoundPass:
    replicas: Any = OneReplica()
    return RoundPass(replicas, rounds=ROUNDS, passes=passes, elements=elements)


def _add(total: np.ndarray, block: int, count: int) -> np.ndarray:
    return total + block * count


EXPECTED = [[0 + 2 + 4 + 6 + 8], [1 + 3 + 5 + 7 + 9]]


def test_many_passes_share_an_iterator():
    elements = Elements()
    passes = _pass(elements, 3)
    for _ in range(7):
        np.testing.assert_array_equal(passes.run(_add, interrupted=lambda: False), EXPECTED)
    assert elements.begun == [(0, 3), (0, 3), (0, 3)]


def test_stopped_between_rounds_and_taken_up_elsewhere():
    elements = Elements()
    first, second = _pass(elements, 2), _pass(elements, 2)
    assert first.run(_add, interrupted=lambda: True) is None
    second.restore(first.progress())
    for passes in (first, second, second):
        np.testing.assert_array_equal(passes.run(_add, interrupted=lambda: False), EXPECTED)
    assert elements.begun == [(0, 2), (1, 2)]
    assert not second.progress()
