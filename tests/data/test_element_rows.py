"""What NumPy reads for an element is what the arithmetic of its plan says, whatever way it is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapedist.data.array_source import ArraySource
from tapedist.data.element_rows import ElementRows
from tapedist.data.orders import (
    BatchPlan,
    BlockOrder,
    ElementPlan,
    ShuffledRows,
    batch_elements,
    block_elements,
    epoch_order,
    share_tiles,
    split_elements,
)
from tapedist.data.tables.table import TableSource, open_table

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
    positions = first[:, np.newaxis] + np.arange(plan.slot_rows)
    real = (np.arange(plan.slot_rows) < counts[:, np.newaxis]).ravel()
    positions = np.minimum(positions, source.num_rows(plan.split) - 1)
    numbers = plan.row_numbers(element, positions) if plan.shuffled else positions
    x, y, *w = source.rows(plan.split, numbers.ravel())
    real &= w[0] > 0 if w else True
    tiles = np.where(real[:, np.newaxis], x, 0).reshape(plan.slots * plan.tiles, plan.tile_rows, -1)
    columns = [
        np.where(real, c, 0).reshape(-1, plan.tile_rows)
        for c in (y, *(np.ldexp(c, -source.weight_exponent) for c in w))
    ]
    return tiles if plan.row_major else tiles.swapaxes(1, 2), *columns, counts


def _plans(n: int, replicas: int, **form: Any) -> Iterator[tuple[str, ElementPlan, int]]:
    """Names, plans and their numbers of elements: rows in order, batches shuffled, rows shuffled; blocks; a split."""
    for size, slots, tile_rows in ((96, 4, 16), (96, 4, 40), (1000, 2, 64), (1000, 2, 16), (7, 50, 16), (1, 300, 16)):
        plan = BatchPlan(n, size)
        tiles = share_tiles(size, replicas, tile_rows)
        for shuffle in ("none", "batches", "rows"):
            rows = ShuffledRows(plan, 5, window=400) if shuffle == "rows" else None
            order = epoch_order(plan, shuffle=shuffle, seed=5)
            made = batch_elements(
                plan, replicas, slots=slots, order=order, row_numbers=rows, tiles=tiles, tile_rows=tile_rows, **form
            )
            yield f"{shuffle} {size} in tiles of {tile_rows}", made, -(-2 * plan.steps_per_epoch // slots)
    for tiles, tile_rows in ((1, 700), (5, 128), (44, 16)):
        order = BlockOrder.whole(n, tiles * tile_rows, replicas)
        blocks = block_elements(order, order, split="train", tiles=tiles, tile_rows=tile_rows, **form)
        yield f"blocks of {tiles} tiles", blocks, order.visits
        tiles = share_tiles(n, replicas, tile_rows)
        split = split_elements(n, replicas, split="train", tiles=tiles, tile_rows=tile_rows, **form)
        yield f"split in tiles of {tile_rows}", split, 1


@pytest.fixture(scope="module")
def tables(table: TableSource, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("table") / "t.npz"
    draw = np.random.default_rng(1)
    np.savez(path, x=draw.normal(size=(N, 1)), y=draw.normal(size=N))
    arrays = ArraySource(draw.normal(size=(N, 3)), draw.normal(size=N), draw.integers(0, 3, N), test_rows=300)
    return {"weighted": table, "of one column": open_table(str(path), test_fraction=0.1), "arrays": arrays}


@pytest.mark.parametrize("name", ["weighted", "of one column", "arrays"])
@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize("replicas", [1, 3])
def test_elements_hold_the_rows_of_their_plan(tables: dict[str, Any], name: str, replicas: int, row_major: bool):
    table = tables[name]
    for name, plan, elements in _plans(table.num_rows("train"), replicas, row_major=row_major):
        read = ElementRows(table, plan, np.float64)
        wanted = itertools.product(range(elements), range(replicas))
        with ThreadPoolExecutor(4) as pool:
            for (element, replica), found in pool.map(lambda at: (at, read(*at)), wanted):  # noqa: B023
                expected = _by_arithmetic(table, plan, element, replica)
                for column, values in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(column, values, err_msg=f"{name}: {element} on {replica}")
                assert found[-1].dtype == np.int32


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize(("dtype", "least"), [("float32", 2.0**-126), ("float64", 2.0**-250)])
def test_what_is_too_small_is_0(tmp_path: Path, dtype: str, least: float, row_major: bool):
    """After rounding: what rounds up to the least number stays, and a row goes where its weight goes."""
    below = least * (1 - 2.0**-25)
    small = np.array([least, -least, below, -below, least / 2, -least / 4, 0.0, 1.0, least * (1 - 2.0**-23), 5e-324])
    stays = 1 if dtype == "float32" else 0
    kept = np.array([least, -least, least * stays, -least * stays, 0, 0, 0, 1, 0, 0])
    path = tmp_path / "t.npz"
    np.savez(path, x=np.stack([small, small[::-1]], axis=1), y=small, w=np.roll(np.abs(small), 1))
    source = open_table(str(path), test_fraction=0.0, dtype=dtype)
    order = BlockOrder.whole(10, 10, 1)
    plan = block_elements(order, order, split="train", tiles=1, tile_rows=10, row_major=row_major)
    x, y, w, _ = ElementRows(source, plan, dtype)(0, 0)
    weights = np.roll(np.abs(kept), 1) / 2.0  # The largest weight is brought below 1.
    weights[weights < least] = 0
    np.testing.assert_array_equal(w, [weights])
    np.testing.assert_array_equal(y, [np.where(weights > 0, kept, 0)])
    x = x[0] if row_major else x[0].T
    np.testing.assert_array_equal(x, np.where(weights > 0, [kept, kept[::-1]], 0).T)


def test_the_windows_of_an_element_and_the_next_one_are_announced_once(table: TableSource):
    plan = BatchPlan(table.num_rows("train"), 96)
    order = epoch_order(plan, shuffle="rows", seed=5)
    made = batch_elements(
        plan, 1, slots=4, order=order, row_numbers=ShuffledRows(plan, 5, window=400), tiles=1, tile_rows=plan.batch_rows
    )
    announced: list[range] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableSource, "read_ahead", lambda self, split, rows: announced.append(rows))
        read = ElementRows(table, made, np.float32)
        for element in range(plan.steps_per_epoch // 4):
            read(element, 0)
            assert len(announced) <= element + 4
    windows = [range(first, min(first + 400, plan.num_rows)) for first in range(0, plan.num_rows, 400)]
    assert sorted(announced, key=lambda rows: rows.start) == windows


def test_rows_that_cannot_be_read_are_asked_for_again(table: TableSource, monkeypatch: pytest.MonkeyPatch):
    plan = BatchPlan(table.num_rows("train"), 96)
    order = epoch_order(plan, shuffle="rows", seed=5)
    made = batch_elements(
        plan, 1, slots=1, order=order, row_numbers=ShuffledRows(plan, 5), tiles=1, tile_rows=plan.batch_rows
    )
    read = ElementRows(table, made, np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(TableSource, "_taken", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            read(0, 0)
    assert read(0, 0)[0].any()
