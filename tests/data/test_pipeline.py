"""The real input pipeline: each training row exactly once per epoch, in the order that seed and epoch choose."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished
from oracle import batches
from preforked import preforked_python
from topology import run_jobs

from tapedist.data.orders import ShuffledRows, batch_elements, block_elements, epoch_order, split_elements
from tapedist.data.source import Source

SEED = 9
REPLICAS = (0, 2, 3, 5)  # 0: the default strategy.
SHAPES = [(1003, 96), (496, 33), (3, 10)]  # (rows, batch size): ragged tails; one row in the last batch; few rows.
FORMS = ["tiled", "long tiles", "row-major", "table", "array"]
# (form, rows, batch size, replicas)
CASES = [
    *(("narrow", *shape, replicas) for shape, replicas in itertools.product(SHAPES, REPLICAS)),
    *((form, *SHAPES[0], replicas) for form, replicas in itertools.product(FORMS, (0, 3))),
]
HUGE = 2**40


@dataclasses.dataclass(frozen=True)
class Numbers(Source):
    """Every row holds its own number."""

    rows: int
    num_features: int = 1
    feature_names = ("x",)
    target_name = "y"
    weighted = False

    def num_rows(self, split: str) -> int:
        return self.rows

    def fingerprint(self) -> str:
        return str(self.rows)

    def take(self, split: str, indices: Any) -> tuple[Any, Any]:
        import tensorflow as tf

        numbers = tf.cast(indices, tf.float64)
        return numbers[:, tf.newaxis] + np.arange(self.num_features) / 8 + 0.25, numbers


def _source(form: str, n: int) -> Any:
    """Rows that hold their own numbers; those of tables and arrays weigh 1 each."""
    if form in ("table", "array"):
        from tapedist.data.array_source import ArraySource
        from tapedist.data.tables.table import open_table

        rows = {"x": np.arange(n)[:, np.newaxis] + np.arange(3) / 8 + 0.25, "y": np.arange(float(n)), "w": np.ones(n)}
        if form == "array":
            return ArraySource(**rows)
        with tempfile.TemporaryDirectory() as folder:
            np.savez(f"{folder}/t.npz", **rows)
            return open_table(f"{folder}/t.npz", test_fraction=0.0, memory_budget=2**40)
    return Numbers(n, 1 if form == "narrow" else 3)


def _visited(strategy: Any, source: Any, plan: Any, elements: range) -> list[list[int]]:
    """Row numbers of each slot, over all replicas, in their order; padding must be zero."""
    import tensorflow as tf

    from tapedist.data import pipeline

    slots = []
    for rows, counts in pipeline.distribute(strategy, source, plan, elements=elements, dtype=tf.float64, parallel=2):
        locals_ = [[part.numpy() for part in strategy.experimental_local_results(v)] for v in (*rows, counts)]
        assert all(part.shape == (plan.slots,) for part in locals_[-1])
        for slot in range(plan.slots):
            numbers: list[int] = []
            for x, *rest, count in zip(*locals_, strict=True):
                tiles = slice(slot * plan.tiles, (slot + 1) * plan.tiles)
                x = x[tiles] if plan.row_major else x[tiles].swapaxes(1, 2)
                assert x.shape == (plan.tiles, plan.tile_rows, source.num_features)
                x, y, *w = x.reshape(-1, source.num_features), *(column[tiles].ravel() for column in rest)
                real = count[slot]
                assert not any(column[real:].any() for column in (x, y, *w))
                assert (x[:real] == y[:real, np.newaxis] + np.arange(source.num_features) / 8 + 0.25).all()
                assert all((column[:real] == 0.5).all() for column in w)  # The largest is brought below 1.
                numbers += y[:real].astype(int).tolist()
            slots.append(numbers)
    return slots


def _main() -> None:
    """Prints what every pipeline visits, by name: JSON."""
    import tensorflow as tf

    from tapedist.data import orders

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * max(REPLICAS))
    found = {}
    for replicas in REPLICAS:
        devices = [f"CPU:{i}" for i in range(replicas)]
        strategy = tf.distribute.MirroredStrategy(devices) if replicas else tf.distribute.get_strategy()
        count = max(1, replicas)
        for form, n, size in (case[:3] for case in CASES if case[3] == replicas):
            source, plan, layout = _source(form, n), orders.BatchPlan(n, size), {"row_major": form == "row-major"}
            elements = range(-(-3 * plan.steps_per_epoch // 4))
            tile_rows = 40 if form in ("long tiles", "row-major") else 16
            for shuffle in ("rows", "batches", "none"):
                element = batch_elements(
                    plan, count, slots=4, order=epoch_order(plan, shuffle=shuffle, seed=SEED),
                    row_numbers=ShuffledRows(plan, SEED) if shuffle == "rows" else None,
                    tiles=orders.share_tiles(plan.batch_rows, count, tile_rows), tile_rows=tile_rows, **layout,
                )  # fmt: skip
                found[f"{shuffle} {form} {n} {size}/{replicas}"] = _visited(strategy, source, element, elements)
            whole = orders.BlockOrder.whole(n, 126, count)
            tiles = orders.share_tiles(126, 1, tile_rows)
            element = block_elements(whole, whole, split="train", tiles=tiles, tile_rows=tile_rows, **layout)
            found[f"blocks {form} {n}/{replicas}"] = _visited(strategy, source, element, range(whole.visits))
            tiles = orders.share_tiles(n, count, tile_rows)
            element = split_elements(n, count, split="train", tiles=tiles, tile_rows=tile_rows, **layout)
            found[f"split {form} {n}/{replicas}"] = _visited(strategy, source, element, range(1))
        plan, source = orders.BatchPlan(HUGE + 5, 1024), Numbers(HUGE + 5)
        element = batch_elements(
            plan, count, slots=2, order=epoch_order(plan, shuffle="none", seed=1), tiles=1, tile_rows=1024
        )
        last = plan.steps_per_epoch // 2
        found[f"huge/{replicas}"] = _visited(strategy, source, element, range(last, last + 1))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def visited() -> dict[str, list[list[int]]]:
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests)])
    finished = subprocess.run(
        [*preforked_python(), __file__], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("shuffle", ["rows", "batches", "none"])
@pytest.mark.parametrize(("form", "n", "size", "replicas"), CASES)
def test_batches_hold_each_row_once_an_epoch_in_the_oracles_order(
    visited: dict[str, list[list[int]]], shuffle: str, form: str, n: int, size: int, replicas: int
):
    found = visited[f"{shuffle} {form} {n} {size}/{replicas}"]
    per_epoch = -(-n // min(size, n))
    for epoch in range(3):
        rows = list(itertools.chain(*found[epoch * per_epoch : (epoch + 1) * per_epoch]))
        assert sorted(rows) == list(range(n)), f"epoch {epoch}"
    wanted = batches(n, size, shuffle=shuffle, seed=SEED)
    for step, rows in enumerate(found):
        assert rows == next(wanted).tolist(), f"step {step}"


@pytest.mark.parametrize("kind", ["blocks", "split"])
@pytest.mark.parametrize(("form", "n", "size", "replicas"), CASES)
def test_a_pass_holds_each_row_once(
    visited: dict[str, list[list[int]]], kind: str, form: str, n: int, size: int, replicas: int
):
    assert sorted(itertools.chain(*visited[f"{kind} {form} {n}/{replicas}"])) == list(range(n))


@pytest.mark.parametrize("replicas", REPLICAS)
def test_rows_beyond_32_bits_are_found(visited: dict[str, list[list[int]]], replicas: int):
    last, beyond = visited[f"huge/{replicas}"]
    assert last == list(range(HUGE, HUGE + 5))
    assert beyond == list(range(1024))  # The next epoch.


def test_padding_stays_in_range():
    """A source is never asked for a row that it does not have."""
    import tensorflow as tf

    from tapedist.data import orders

    asked: list[np.ndarray] = []

    class Strict(Numbers):
        def take(self, split: str, indices: Any) -> tuple[Any, Any]:
            def note(rows: np.ndarray) -> np.ndarray:
                asked.append(rows)
                return rows

            return super().take(split, tf.ensure_shape(tf.numpy_function(note, [indices], tf.int64), indices.shape))

    plan = orders.BatchPlan(11, 4)
    for shuffle in ("rows", "none"):
        element = batch_elements(
            plan, 1, slots=2, order=epoch_order(plan, shuffle=shuffle, seed=1),
            row_numbers=ShuffledRows(plan, 1) if shuffle == "rows" else None, tiles=1, tile_rows=4,
        )  # fmt: skip
        _visited(tf.distribute.get_strategy(), Strict(11), element, range(3))
    whole = orders.BlockOrder.whole(11, 4, 1)
    block = block_elements(whole, whole, split="train", tiles=2, tile_rows=3)
    _visited(tf.distribute.get_strategy(), Strict(11), block, range(6))
    rows = np.concatenate(asked)
    assert rows.min() >= 0
    assert rows.max() <= 10


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize("d", [1, 3])
def test_a_source_that_makes_runs_gives_the_rows_of_their_numbers(d: int, row_major: bool):
    """The short cut that a source may have for runs of rows, in the middle and at the end of a split."""
    import tensorflow as tf

    from tapedist.data import orders, pipeline
    from tapedist.data.synthetic import SyntheticSource

    made = SyntheticSource(
        n_samples=70_001, test_fraction=0.0, seed=1, m=(9.0,) * d, c=-2.0, mean=0.0, std=1.0, noise_std=1.0
    )

    class Listed(Source):
        """The same rows, by their numbers alone."""

        num_features, weighted, num_rows, take = made.num_features, False, made.num_rows, made.take

    plan = orders.BatchPlan(made.num_rows("train"), 1024)
    element = batch_elements(
        plan,
        1,
        slots=24,
        order=epoch_order(plan, shuffle="batches", seed=1),
        tiles=2,
        tile_rows=512,
        row_major=row_major,
    )
    strategy = tf.distribute.get_strategy()
    one, other = (
        list(pipeline.distribute(strategy, source, element, elements=range(3), dtype=tf.float32, parallel=2))
        for source in (made, Listed())
    )
    for found, expected in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True):
        assert np.array_equal(found, expected)


_LEAVES_AT_ONCE = """
import time
import numpy as np
import tapedist.runtime_flags
import tensorflow as tf
from tapedist.data import pipeline
from tapedist.data.source import Source
from tapedist.data.orders import BatchPlan, batch_elements, epoch_order

class Slow(Source):
    num_features, weighted, read_by_numpy = 1, False, True
    def num_rows(self, split): return 1000
    def read_into(self, out, split, rows):
        time.sleep(0.1)
        out[0][:], out[1][:] = 0, 0

plan = BatchPlan(1000, 10)
order = epoch_order(plan, shuffle="none", seed=0)
element = batch_elements(plan, 1, slots=1, order=order, tiles=1, tile_rows=10)
stream = pipeline.distribute(
    tf.distribute.get_strategy(), Slow(), element, elements=range(1000), dtype=tf.float32, parallel=8
)
next(stream)
print("left")
"""


def test_python_ends_while_rows_are_being_read(run_python: Any):
    """Calls from threads of TensorFlow never return once the interpreter has begun to end."""
    done = run_python("-c", _LEAVES_AT_ONCE, timeout=60)
    assert (done.code, done.out) == (0, "left\n")


def test_a_stream_ends_before_it_is_dropped():
    """TensorFlow crashes if what feeds several devices is destroyed while it waits for rows."""
    config = {
        "mode": "mini_batch", "n_samples": 3_000_000, "num_features": 7, "batch_size": 150_000, "num_epochs": 1,
        "cache": "none", "test_fraction": 0.0, "statistics": "false", "learning_rate": 0.01,
    }  # fmt: skip
    found = run_jobs({str(visit): {"config": config} for visit in range(5)}, replicas=2)
    assert len({outcome["digest"] for outcome in found.values()}) == 1


_DROPS = """
import tapedist.runtime_flags
import tensorflow as tf
from tapedist.data import pipeline
from tapedist.data.orders import BlockOrder, block_elements
from tapedist.data.synthetic import SyntheticSource

strategy = tf.distribute.MultiWorkerMirroredStrategy()
rows = SyntheticSource(
    n_samples=3_000_000, test_fraction=0.0, seed=1, m=(1.0,) * 7, c=0.0, mean=0.0, std=1.0, noise_std=1.0
)
whole = BlockOrder.whole(3_000_000, 150_000, 1)
plan = block_elements(whole, whole, split="train", tiles=147, tile_rows=1024, row_major=False)
for _ in range(5):
    stream = pipeline.distribute(strategy, rows, plan, elements=range(20), dtype=tf.float32, parallel=2)
    next(stream)
    del stream
print("alive")
"""


def test_a_workers_stream_ends_before_it_is_dropped(run_python: Callable[..., Finished]):
    """Of a worker with one device too."""
    done = run_python("-c", _DROPS, warm=True)
    assert (done.code, done.out.splitlines()[-1:]) == (0, ["alive"]), done.err


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize(("given", "dtype"), [("float32", "float32"), ("float64", "float32"), ("float64", "float64")])
def test_what_is_too_small_is_0_as_where_numpy_reads(given: str, dtype: str, row_major: bool):
    import tensorflow as tf

    from tapedist.data import orders, pipeline
    from tapedist.data.ranges import LEAST, flushed

    least = LEAST[dtype]
    sizes = np.array([1, 1 - 2.0**-25, 1 - 2.0**-24, 1 - 2.0**-23, 0.5, 2.0**-20, 0, 2], given) * np.array(least, given)
    values = np.concatenate([sizes, -sizes])

    class Tiny(Source):
        num_features, weighted = 2, True

        def num_rows(self, split: str) -> int:
            return len(values)

        def take(self, split: str, indices: Any) -> tuple[Any, ...]:
            column = tf.gather(tf.constant(values), indices)
            return (
                tf.stack([column, column[::-1]], axis=1),
                column,
                tf.gather(tf.constant(np.roll(sizes, 3)), indices % 8),
            )

    whole = orders.BlockOrder.whole(16, 16, 1)
    plan = block_elements(whole, whole, split="train", tiles=1, tile_rows=16, row_major=row_major)
    stream = pipeline.distribute(
        tf.distribute.get_strategy(), Tiny(), plan, elements=range(1), dtype=tf.as_dtype(dtype), parallel=1
    )
    (x, y, w), _ = next(stream)
    weights = np.tile(flushed(np.roll(sizes, 3), dtype), 2)
    kept = flushed(values, dtype)
    np.testing.assert_array_equal(w[0], weights)
    np.testing.assert_array_equal(y[0], np.where(weights > 0, kept, 0))
    wanted = np.where(weights > 0, [kept, kept[::-1]], 0)
    np.testing.assert_array_equal(x[0], wanted.T if row_major else wanted)
    assert np.count_nonzero(kept) == (8 if dtype == "float32" else 4)


if __name__ == "__main__":
    _main()
