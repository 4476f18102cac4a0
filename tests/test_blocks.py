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

from tapedist.data.blocks import BatchPlan, BlockPlan, replica_shards, split_sizes
from tapedist.data.epoch_order import WINDOW_ROWS, epoch_batches, epoch_rows, permuted

SEEDS = st.integers(0, 2**63 - 1)
PLANS = st.builds(
    BlockPlan,
    num_rows=st.integers(0, 2**20) | st.integers(2**31, 2**62),
    num_features=st.sampled_from([1, 2, 7, 8, 64, 4000]),
    itemsize=st.sampled_from([4, 8]),
    num_shards=st.sampled_from([1, 2, 3, 16, 100, 300]),
)


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
    ("replicas", "shards", "owned"),
    [(1, 16, [16]), (3, 16, [6, 6, 4]), (5, 16, [4, 4, 4, 4, 0]), (16, 16, [1] * 16), (2, 3, [2, 1]), (1, 1, [1])],
)
def test_replica_shards(replicas: int, shards: int, owned: list[int]):
    assert [len(replica_shards(r, replicas, shards)) for r in range(replicas)] == owned


@settings(deadline=None)
@given(shards=st.integers(1, 300), data=st.data())
def test_replicas_own_every_shard_once_in_order(shards: int, data: st.DataObject):
    replicas = data.draw(st.integers(1, shards))
    owned = [replica_shards(r, replicas, shards) for r in range(replicas)]
    assert list(itertools.chain(*owned)) == list(range(shards))
    assert len(owned[0]) == -(-shards // replicas)


@pytest.mark.parametrize(
    ("n", "d", "block_rows", "blocks", "rounds", "resident"),
    [
        (8000, 1, 512, 16, 1, True),  # The tutorial: one block a shard.
        (8006, 3, 512, 16, 1, True),
        (3, 1, 64, 1, 1, True),
        (0, 1, 64, 0, 0, True),
        (1_000_000, 1, 65536, 16, 1, False),
        (800_000_000, 1, 524288, 1526, 96, False),
        (1_000_000, 64, 8064, 125, 8, False),
    ],
)
def test_block_plans(n: int, d: int, block_rows: int, blocks: int, rounds: int, resident: bool):
    plan = BlockPlan(n, d, 4, 16)
    assert (plan.block_rows, plan.num_blocks, plan.rounds, plan.resident) == (block_rows, blocks, rounds, resident)


@settings(deadline=None)
@given(plan=PLANS, data=st.data())
def test_blocks_cover_the_rows_and_shards_the_blocks(plan: BlockPlan, data: st.DataObject):
    starts = [plan.shard_blocks(v).start for v in range(plan.num_shards)]
    stops = [plan.shard_blocks(v).stop for v in range(plan.num_shards)]
    assert [*starts, plan.num_blocks] == [0, *stops]
    assert max(map(len, map(plan.shard_blocks, range(plan.num_shards)))) == plan.rounds
    assert plan.block_rows == plan.tiles * plan.tile_rows
    assert plan.tile_rows % 64 == 0
    assert (plan.num_blocks - 1) * plan.block_rows < max(1, plan.num_rows) <= max(1, plan.num_blocks) * plan.block_rows
    if plan.num_blocks:
        block = data.draw(st.integers(0, plan.num_blocks - 1))
        assert plan.block_row_range(block).start == block * plan.block_rows
        if block + 1 < plan.num_blocks:
            assert plan.block_row_range(block).stop == plan.block_row_range(block + 1).start
        else:
            assert plan.block_row_range(block).stop == plan.num_rows


@settings(deadline=None)
@given(n=st.integers(0, 5000), shards=st.integers(1, 40))
def test_shards_of_a_resident_split_are_as_long_as_they_say(n: int, shards: int):
    plan = BlockPlan(n, 1, 4, shards)
    ranges = [plan.shard_row_range(shard) for shard in range(shards)]
    assert list(itertools.chain(*ranges)) == list(range(n))
    assert max(map(len, ranges)) <= plan.shard_rows
    assert plan.even == (n > 0 and all(len(rows) == plan.shard_rows for rows in ranges))


@settings(deadline=None)
@given(n=st.integers(0, 5000), shards=st.integers(1, 40), tile_bytes=st.sampled_from([256, 1024, 4096]))
def test_an_epoch_of_rounds_visits_every_row_once_in_order_of_shards(n: int, shards: int, tile_bytes: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tapedist.data.blocks._TILE_BYTES", tile_bytes)
        plan = BlockPlan(n, 1, 4, shards)
        seen = [list(plan.round_block(v, t)) for v in range(shards) for t in range(plan.rounds)]
        most = plan.block_rows
    assert list(itertools.chain(*seen)) == list(range(n))
    assert max(map(len, seen), default=0) <= most


@settings(deadline=None)
@given(n=st.integers(1, 10**6), batch=st.integers(1, 2**40), shards=st.integers(1, 64))
def test_batches_cover_an_epoch(n: int, batch: int, shards: int):
    plan = BatchPlan(n, batch, shards)
    numbers = {0, plan.steps_per_epoch // 2, plan.steps_per_epoch - 1}
    assert plan.batch_range(plan.steps_per_epoch - 1).stop == n
    for number in numbers:
        rows = plan.batch_range(number)
        assert rows.start == number * plan.batch_rows
        assert 1 <= len(rows) <= min(batch, n)
    assert (plan.shard_rows - 1) * shards < plan.batch_rows <= plan.shard_rows * shards
    lengths = {len(plan.batch_range(number)) for number in (0, plan.steps_per_epoch - 1)}
    assert plan.even == (lengths == {plan.shard_rows * shards})


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
    plan = BatchPlan(n, size, 16)
    for epoch in range(3):
        numbers = np.arange(plan.steps_per_epoch)
        if shuffle == "batches":
            numbers = epoch_batches(numbers, num_batches=len(numbers), seed=seed, epochs=epoch)
        rows = np.arange(n)
        if shuffle == "rows":
            rows = epoch_rows(rows, num_rows=n, seed=seed, epoch=epoch, window=300)
        for number in numbers:
            found = rows[plan.batch_range(int(number)).start : plan.batch_range(int(number)).stop]
            np.testing.assert_array_equal(found, next(wanted))


def test_orders_of_many_epochs_at_once_are_the_orders_of_each():
    places, epochs = np.tile(np.arange(9), 4), np.repeat(np.arange(4), 9)
    together = epoch_batches(places, num_batches=9, seed=5, epochs=epochs).reshape(4, 9)
    for epoch in range(4):
        alone = epoch_batches(np.arange(9), num_batches=9, seed=5, epochs=epoch)
        np.testing.assert_array_equal(together[epoch], alone)
