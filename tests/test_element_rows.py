"""What NumPy reads for an element is what the arithmetic of its plan says, whatever way it is read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tapedist.data import element_rows
from tapedist.data.blocks import BatchPlan, BlockPlan
from tapedist.data.element_rows import ElementRows
from tapedist.data.elements import (
    BlockOrder,
    ElementPlan,
    Layout,
    ShuffledRows,
    batch_elements,
    block_elements,
    epoch_order,
    shard_block_elements,
    shard_elements,
)
from tapedist.data.table_parquet import RowGroups
from tapedist.data.tables import TableSource, open_table

pytestmark = pytest.mark.usefixtures("all_cores")

N = 3001


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> TableSource:
    """Weighted rows, some of weight 0."""
    path = tmp_path_factory.mktemp("table") / "t.npz"
    draw = np.random.default_rng(0)
    np.savez(path, x=draw.normal(size=(N, 3)), y=draw.normal(size=N), w=draw.integers(0, 3, N))
    return open_table(str(path), test_fraction=0.1)


def _by_arithmetic(source: TableSource, plan: ElementPlan, element: int, replica: int) -> tuple[np.ndarray, ...]:
    """Row by row."""
    first, counts = plan.first_rows(element, replica)
    positions = first[..., np.newaxis] + np.arange(plan.shard_rows)
    real = np.arange(plan.shard_rows) < counts[..., np.newaxis]
    positions = np.minimum(positions, source.num_rows(plan.split) - 1)
    numbers = plan.row_numbers(element, positions) if plan.shuffled else positions
    columns = source.rows(plan.split, numbers.ravel())
    real = real.ravel() & (columns[2] > 0)
    return *(np.where(real.reshape(-1, *[1] * (c.ndim - 1)), c, 0) for c in columns), counts


def _plans(n: int, layout: Layout) -> Iterator[tuple[str, ElementPlan, int]]:
    """Names, plans and their numbers of elements: rows in order, batches shuffled, rows shuffled; blocks; shards."""
    for size, slots in ((96, 4), (1000, 2), (7, 50), (1, 300)):
        plan = BatchPlan(n, size, layout.num_shards)
        for shuffle in ("none", "batches", "rows"):
            rows = ShuffledRows(plan, 5, window=400) if shuffle == "rows" else None
            order = epoch_order(plan, shuffle=shuffle, seed=5)
            made = batch_elements(plan, layout, slots=slots, order=order, row_numbers=rows)
            yield f"{shuffle} {size}", made, -(-2 * plan.steps_per_epoch // slots)
    blocks = BlockPlan(n, 3, 4, layout.num_shards)
    order = BlockOrder.whole(blocks, layout)
    yield "blocks", block_elements(order, split="train"), order.turns
    yield "shards", shard_elements(blocks, layout, split="train", slots=2), 1
    yield "shards of a block", shard_block_elements(blocks, layout, split="train"), 1


@pytest.mark.parametrize("held", [0, 3])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_elements_hold_the_rows_of_their_plan(
    table: TableSource, replicas: int, held: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(element_rows, "windows_that_fit", lambda budget, row_bytes: held)
    for name, plan, elements in _plans(table.num_rows("train"), Layout(5, replicas)):
        read = ElementRows(table, plan, np.float64)
        wanted = itertools.product(range(elements), range(replicas))
        with ThreadPoolExecutor(4) as pool:
            for (element, replica), found in pool.map(lambda at: (at, read(*at)), wanted):  # noqa: B023
                wanted_columns = list(_by_arithmetic(table, plan, element, replica))
                wanted_columns[2] = np.ldexp(wanted_columns[2], -table.weight_exponent)  # As training takes them.
                for column, expected in zip(found, wanted_columns, strict=True):
                    np.testing.assert_array_equal(column, expected, err_msg=f"{name}: {element} on {replica}")
                assert found[-1].dtype == np.int32


def test_a_window_is_read_once_an_epoch(table: TableSource, monkeypatch: pytest.MonkeyPatch):
    plan = BatchPlan(table.num_rows("train"), 96, 5)
    order = epoch_order(plan, shuffle="rows", seed=5)
    made = batch_elements(plan, Layout(5, 1), slots=4, order=order, row_numbers=ShuffledRows(plan, 5, window=400))
    asked: list[Any] = []
    original = TableSource.read_into

    def noted(self: TableSource, out: Any, split: str, rows: Any, **settings: Any) -> None:
        asked.append(rows)
        original(self, out, split, rows, **settings)

    monkeypatch.setattr(TableSource, "read_into", noted)
    read = ElementRows(table, made, np.float32)
    for element in range(plan.steps_per_epoch // 4):
        read(element, 0)
    windows = [range(first, min(first + 400, plan.num_rows)) for first in range(0, plan.num_rows, 400)]
    assert sorted(asked, key=lambda rows: rows.start) == windows


def test_windows_decode_only_the_row_groups_that_they_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = pa.table({"x": np.arange(4000.0), "y": np.arange(4000.0)})
    pq.write_table(rows, tmp_path / "t.parquet", row_group_size=300)
    monkeypatch.setattr("tapedist.data.tables.WINDOW_ROWS", 400)  # Of which one is to fit into the budget.
    source = open_table(str(tmp_path / "t.parquet"), target="y", test_fraction=0.0, memory_budget=20_000)
    assert source.storage == "in place"
    decoded: list[int] = []
    original = RowGroups.load

    def noted(self: RowGroups, segment: int) -> list[np.ndarray]:
        decoded.append(segment)
        return original(self, segment)

    monkeypatch.setattr(RowGroups, "load", noted)
    plan = BatchPlan(4000, 100, 5)
    order = epoch_order(plan, shuffle="rows", seed=5)
    made = batch_elements(plan, Layout(5, 1), slots=1, order=order, row_numbers=ShuffledRows(plan, 5, window=400))
    read = ElementRows(source, made, np.float32)
    for element in range(plan.steps_per_epoch):
        read(element, 0)
    spanned = Counter(group for first in range(0, 4000, 400) for group in range(first // 300, (first + 399) // 300 + 1))
    assert Counter(decoded) <= spanned  # Fewer, where windows that share a group follow each other.


def test_a_window_that_cannot_be_read_is_asked_for_again(table: TableSource, monkeypatch: pytest.MonkeyPatch):
    plan = BatchPlan(table.num_rows("train"), 96, 5)
    order = epoch_order(plan, shuffle="rows", seed=5)
    made = batch_elements(plan, Layout(5, 1), slots=1, order=order, row_numbers=ShuffledRows(plan, 5))
    read = ElementRows(table, made, np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(TableSource, "read_into", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            read(0, 0)
    assert read(0, 0)[0].any()


def test_windows_are_held_where_they_fit():
    from tapedist.data.epoch_order import WINDOW_ROWS
    from tapedist.data.table_windows import windows_that_fit

    assert windows_that_fit(3 * WINDOW_ROWS * 36, 36) == 3
    assert windows_that_fit(3 * WINDOW_ROWS * 36 - 1, 36) == 0
    assert 5 <= windows_that_fit(2**40, 36) < 2**12
