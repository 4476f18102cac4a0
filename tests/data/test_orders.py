"""Which row goes where: tables, and properties of every plan (cover, disjoint, fixed sizes)."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import batches, permutation

from tapedist.data import orders
from tapedist.data.orders import (
    BatchPlan,
    BlockOrder,
    BlockPlan,
    block_elements,
    product_tile_rows,
    share_tiles,
    split_elements,
    split_sizes,
)
from tapedist.data.permutations import WINDOW_ROWS, epoch_batches, epoch_rows, permuted

SEEDS = st.integers(0, 2**63 - 1)
FEATURES = st.sampled_from([1, 2, 3, 7, 8, 64, 1000, 4000])
REPLICAS = st.integers(1, 12)
TILE_ROWS = st.sampled_from([1, 16, 48, 128, 1000])


@pytest.mark.parametrize(
    ("n", "fraction", "sizes"),
    [
        (10_000, 0.2, (8000, 2000)),
        (10_007, 0.2, (8006, 2001)),
        (100, 0.29, (71, 29)),
        (3, 0.99, (1, 2)),
        (1, 0.9, (1, 0)),
        (5, 0.0, (5, 0)),
        (2**62 - 1, 0.5, (2**61, 2**61 - 1)),
    ],
)
def test_split_sizes(n: int, fraction: float, sizes: tuple[int, int]):
    assert split_sizes(n, fraction) == sizes


@settings(deadline=None)
@given(n=st.integers(1, 2**62 - 1), fraction=st.floats(0, 1, exclude_max=True))
@example(n=2**53 + 3, fraction=math.nextafter(1, 0))
@example(n=2**62 - 1, fraction=0.2)
def test_a_split_covers_the_rows_and_leaves_some_to_train(n: int, fraction: float):
    train, test = split_sizes(n, fraction)
    assert train >= 1
    assert test == math.floor(n * Fraction(repr(fraction)))
    assert train + test == n


@pytest.mark.parametrize(
    ("n", "d", "itemsize", "tile_rows", "tiles", "resident"),
    [
        (8000, 1, 4, 16, 500, True),  # The tutorial.
        (3, 1, 4, 16, 1, True),
        (0, 1, 4, 16, 1, True),
        (1_000_000, 1, 4, 16, 2**15, False),
        (1_000_000, 1, 4, 1024, 2**9, False),
        (1_000_000, 2, 8, 16, 2**13, False),
        (1_000_000, 3, 4, 1024, 170, False),
        (1_000_000, 8, 4, 16, 2**12, False),
        (1_000_000, 64, 4, 128, 64, False),
        (200_000, 4000, 4, 16, 8, False),
        (200_000, 4000, 4, 64, 2, False),
        (200_000, 40_000, 4, 16, 1, False),
    ],
)
def test_block_plans(n: int, d: int, itemsize: int, tile_rows: int, tiles: int, resident: bool):
    plan = BlockPlan(n, d, itemsize, tile_rows)
    assert (plan.tiles, plan.resident) == (tiles, resident)


@settings(deadline=None)
@given(
    n=st.integers(0, 2**20) | st.integers(2**31, 2**62), d=FEATURES, itemsize=st.sampled_from([4, 8]), size=TILE_ROWS
)
def test_blocks_are_no_larger_than_they_need_to_be(n: int, d: int, itemsize: int, size: int):
    plan = BlockPlan(n, d, itemsize, size)
    assert plan.block_rows == plan.tiles * size
    assert plan.block_rows < max(1, n) + size
    assert n <= plan.num_blocks * plan.block_rows < n + plan.block_rows
    assert plan.block_rows <= orders.MOST_BLOCK_ROWS
    assert plan.tiles == 1 or plan.block_rows * d * itemsize <= orders.BLOCK_BYTES


@settings(deadline=None)
@given(rows=st.integers(0, 10**7), replicas=REPLICAS, size=TILE_ROWS)
def test_tiles_hold_a_share_and_little_more(rows: int, replicas: int, size: int):
    tiles = share_tiles(rows, replicas, size)
    assert tiles >= 1
    assert (tiles - 1) * size * replicas < max(1, rows) <= tiles * size * replicas


@settings(deadline=None)
@given(rows=st.integers(0, 10**4) | st.integers(0, 2**62), d=FEATURES)
def test_tiles_for_products_are_large_where_there_are_rows(rows: int, d: int):
    size = product_tile_rows(rows, d)
    assert size % orders.TILE_ROWS == 0
    if rows > orders.MOST_PRODUCT_ROWS:
        assert size.bit_count() == 1
        assert orders.LEAST_PRODUCT_ROWS <= size <= orders.MOST_PRODUCT_ROWS
        assert size == orders.LEAST_PRODUCT_ROWS or size * d * 8 < 2 * orders.PRODUCT_BYTES
    assert size <= product_tile_rows(2**62, d)
    assert size < max(1, rows) + orders.TILE_ROWS


@st.composite
def _orders(draw: st.DrawFn) -> BlockOrder:
    ends = sorted(draw(st.sets(st.integers(0, 2000), max_size=12)))
    ranges = np.array(ends[: len(ends) // 2 * 2], np.int64).reshape(-1, 2)
    return BlockOrder(ranges, draw(st.integers(1, 300)), draw(REPLICAS))


def _rows(ranges: np.ndarray) -> list[int]:
    return [row for first, end in ranges.tolist() for row in range(first, end)]


def _visited(order: BlockOrder, visits: int) -> list[list[int]]:
    """Row numbers of each replica in their order."""
    return [
        list(itertools.chain(*(order.block(visit, replica) for visit in range(visits))))
        for replica in range(order.num_replicas)
    ]


@settings(deadline=None)
@given(order=_orders())
def test_a_pass_visits_every_row_once_in_their_order(order: BlockOrder):
    wanted = _rows(order.remaining)
    assert order.rows == len(wanted)
    assert list(itertools.chain(*_visited(order, order.visits))) == wanted
    taken = [[len(order.block(visit, r)) for visit in range(order.visits + 2)] for r in range(order.num_replicas)]
    assert max(map(max, taken)) <= order.block_rows
    counts = [sum(map(bool, blocks)) for blocks in taken]
    assert max(counts) == order.visits
    assert max(counts) - min(counts) <= 1
    assert order.after(order.visits).shape == (0, 2)


@settings(deadline=None)
@given(
    order=_orders(),
    visits=st.integers(0, 30),
    replicas=REPLICAS,
    block_rows=st.integers(1, 300),
    more=st.integers(0, 9),
)
def test_a_pass_goes_on_anywhere(order: BlockOrder, visits: int, replicas: int, block_rows: int, more: int):
    left = order.after(visits)
    visited = list(itertools.chain(*_visited(order, visits)))
    assert sorted(visited + _rows(left)) == _rows(order.remaining)
    assert (left[:, 0] < left[:, 1]).all()
    assert (left[1:, 0] > left[:-1, 1]).all()  # Merged.
    following = BlockOrder(left, block_rows, replicas)
    visited += itertools.chain(*_visited(following, more))
    assert sorted(visited + _rows(following.after(more))) == _rows(order.remaining)


def test_a_pass_over_2_to_the_62_rows_is_arithmetic():
    n = 2**62 - 1
    order = BlockOrder.whole(n, 2**18, 7)
    assert order.rows == n
    assert order.visits == -(-(2**44) // 7)
    assert order.block(order.visits - 1, 6).stop == n
    assert order.after(order.visits - 1).shape == (7 - (-(2**44) % 7), 2)
    assert BlockOrder(order.after(10**6), 2**10, 3).rows == n - 7 * 10**6 * 2**18


@settings(deadline=None)
@given(n=st.integers(1, 3000), block_rows=st.integers(1, 300), replicas=REPLICAS, begun=st.integers(0, 20))
def test_elements_go_on_with_whole_passes(n: int, block_rows: int, replicas: int, begun: int):
    whole = BlockOrder.whole(n, block_rows, replicas)
    order = BlockOrder(whole.after(begun), block_rows, replicas)
    plan = block_elements(order, whole, split="train", tiles=1, tile_rows=block_rows)

    def rows(elements: range) -> list[int]:
        found = [plan.first_rows(element, replica) for element in elements for replica in range(replicas)]
        assert all(first.shape == counts.shape == (1,) for first, counts in found)
        return sorted(row for first, counts in found for row in range(int(first[0]), int(first[0] + counts[0])))

    assert rows(range(order.visits)) == _rows(order.remaining)
    for epoch in range(2):
        first = order.visits + epoch * whole.visits
        assert rows(range(first, first + whole.visits)) == list(range(n))


@settings(deadline=None)
@given(n=st.integers(0, 5000), replicas=REPLICAS, size=TILE_ROWS)
def test_replicas_share_a_resident_split(n: int, replicas: int, size: int):
    plan = split_elements(n, replicas, split="test", tiles=share_tiles(n, replicas, size), tile_rows=size)
    shares = [plan.first_rows(0, replica) for replica in range(replicas)]
    assert [row for first, counts in shares for row in range(int(first[0]), int(first[0] + counts[0]))] == list(
        range(n)
    )


@settings(deadline=None)
@given(n=st.integers(1, 10**6), batch=st.integers(1, 2**40))
def test_batches_cover_an_epoch(n: int, batch: int):
    plan = BatchPlan(n, batch)
    last = plan.steps_per_epoch - 1
    first, middle, rest = plan.rows_of(np.array([0, last // 2, last])).tolist()
    assert last * plan.batch_rows + rest == n
    assert 1 <= rest <= middle == first == plan.batch_rows == min(batch, n)


@settings(deadline=None)
@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_permutations_are_permutations(size: int, seed: int, epoch: int):
    assert sorted(permuted(np.arange(size), size, seed, epoch)) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(2**31, 2**62), seed=SEEDS, data=st.data())
def test_huge_permutations_stay_in_range_and_apart(size: int, seed: int, data: st.DataObject):
    values = data.draw(st.sets(st.integers(0, size - 1), min_size=2, max_size=50))
    images = permuted(np.array(sorted(values)), size, seed)
    assert images.min() >= 0
    assert images.max() < size
    assert len(set(images.tolist())) == len(values)


def test_every_order_of_a_few_comes_up():
    orders = [tuple(permuted(np.arange(4), 4, 7, epoch)) for epoch in range(1000)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert min(counts) > 10  # 42 are expected of each.


def test_a_permutation_depends_on_the_whole_key():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**62, 0), (0, 0, 0), (0, 0, 2)]
    orders = {tuple(permuted(np.arange(100), 100, *key)) for key in keys}
    assert len(orders) == len(keys)


def test_the_order_of_rows_is_pinned():
    """Orders are part of the answer: the same ones come from integers of another kind."""
    for size, *key in [(1, 0), (2, 3, 1), (84, 0, 2, 2), (1000, 2**63 - 1, 2**40, 1, 17)]:
        assert permuted(np.arange(size), size, *key).tolist() == permutation(size, *key)


@settings(deadline=None)
@given(
    n=st.integers(1, 700), window=st.integers(1, 300), seed=SEEDS, epoch=st.integers(0, 5), picked=st.integers(0, 10**9)
)
def test_rows_are_shuffled_within_windows(n: int, window: int, seed: int, epoch: int, picked: int):
    order = epoch_rows(np.arange(n), num_rows=n, seed=seed, epoch=epoch, window=window)
    assert sorted(order) == list(range(n))
    assert len(list(itertools.groupby(order // window))) == -(-n // window)  # One window after the other.
    position = np.array([picked % n])
    assert epoch_rows(position, num_rows=n, seed=seed, epoch=epoch, window=window) == order[position]


def test_a_split_of_many_windows_is_shuffled_by_arithmetic():
    n = WINDOW_ROWS * 2**20
    rows = epoch_rows(np.array([0, 1, n - 1]), num_rows=n, seed=1, epoch=3)
    assert len({*rows.tolist()}) == 3
    assert rows[0] // WINDOW_ROWS == rows[1] // WINDOW_ROWS
    with pytest.raises(ValueError, match="use --shuffle=batches"):
        epoch_rows(np.array([0]), num_rows=n + 1, seed=1, epoch=3)


@pytest.mark.parametrize("shuffle", ["rows", "batches", "none"])
def test_the_oracle_and_the_plan_agree_on_batches(shuffle: str):
    n, size, seed = 1003, 96, 11
    wanted = batches(n, size, shuffle=shuffle, seed=seed, window=300)
    plan = BatchPlan(n, size)
    for epoch in range(3):
        numbers = np.arange(plan.steps_per_epoch)
        if shuffle == "batches":
            numbers = epoch_batches(numbers, num_batches=len(numbers), seed=seed, epochs=epoch)
        rows = np.arange(n)
        if shuffle == "rows":
            rows = epoch_rows(rows, num_rows=n, seed=seed, epoch=epoch, window=300)
        for number in numbers:
            np.testing.assert_array_equal(rows[number * size : (number + 1) * size], next(wanted))


def test_orders_of_many_epochs_at_once_are_the_orders_of_each():
    places, epochs = np.tile(np.arange(9), 4), np.repeat(np.arange(4), 9)
    together = epoch_batches(places, num_batches=9, seed=5, epochs=epochs).reshape(4, 9)
    for epoch in range(4):
        alone = epoch_batches(np.arange(9), num_batches=9, seed=5, epochs=epoch)
        np.testing.assert_array_equal(together[epoch], alone)
