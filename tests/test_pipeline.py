"""The real input pipeline: each training row exactly once per epoch, in the order that seed and epoch choose."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
from typing import Any

import numpy as np
import pytest
from oracle import batches
from topology import run_jobs
from warm import warm_python

SEED = 9
REPLICAS = (0, 2, 3, 5)  # 0: the default strategy.
# (rows, batch size, V): a ragged tail; V that no R divides and one row in the last batch; fewer rows than shards.
SHAPES = [(1003, 96, 16), (496, 33, 7), (3, 10, 5)]
HUGE = 2**40


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Every row holds its own number."""

    rows: int
    num_features = 1
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
        return numbers[:, tf.newaxis] + 0.25, numbers


def _visited(strategy: Any, source: Numbers, plan: Any, elements: range) -> list[list[int]]:
    """Row numbers of each slot, over all replicas and shards, in their order; padding must be zero."""
    import tensorflow as tf

    from tapedist.data import pipeline

    slots = []
    for rows, counts in pipeline.distribute(strategy, source, plan, elements=elements, dtype=tf.float64, parallel=2):
        locals_ = [[part.numpy() for part in strategy.experimental_local_results(v)] for v in (*rows, counts)]
        for slot in range(plan.slots):
            numbers: list[int] = []
            for x, y, count in zip(*locals_, strict=True):
                x, y = (column.reshape(plan.slots, plan.width, plan.shard_rows)[slot] for column in (x, y))
                for shard in range(plan.width):
                    real = count[slot, shard]
                    assert not x[shard, real:].any()
                    assert not y[shard, real:].any()
                    assert (x[shard, :real] == y[shard, :real] + 0.25).all()
                    numbers += y[shard, :real].astype(int).tolist()
            slots.append(numbers)
    return slots


def _main() -> None:
    """Prints what every pipeline visits, by name: JSON."""
    import tapedist.numerics  # noqa: F401  (before TensorFlow)
    import tensorflow as tf

    from tapedist.data import blocks, pipeline

    blocks._TILE_BYTES, blocks._MAX_TILES = 512, 2
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * max(REPLICAS))
    found = {}
    for replicas in REPLICAS:
        devices = [f"CPU:{i}" for i in range(replicas)]
        strategy = tf.distribute.MirroredStrategy(devices) if replicas else tf.distribute.get_strategy()
        for n, size, shards in SHAPES:
            if replicas > shards:
                continue
            layout, source = pipeline.Layout(shards, max(1, replicas)), Numbers(n)
            plan = blocks.BatchPlan(n, size, shards)
            elements = range(-(-3 * plan.steps_per_epoch // 4))
            for shuffle in ("rows", "batches", "none"):
                element = pipeline.batch_elements(
                    plan, layout, slots=4, order=pipeline.epoch_order(plan, shuffle=shuffle, seed=SEED),
                    row_numbers=pipeline.shuffled_rows(plan, seed=SEED) if shuffle == "rows" else None,
                )  # fmt: skip
                found[f"{shuffle} {n} {size} {shards}/{replicas}"] = _visited(strategy, source, element, elements)
            whole = blocks.BlockPlan(n, 1, 8, shards)
            order = pipeline.BlockOrder.whole(whole, layout)
            element, elements = pipeline.block_elements(order, split="train"), range(order.turns)
            found[f"blocks {n} {size} {shards}/{replicas}"] = _visited(strategy, source, element, elements)
        plan, source = blocks.BatchPlan(HUGE + 5, 1024, 16), Numbers(HUGE + 5)
        element = pipeline.batch_elements(
            plan,
            pipeline.Layout(16, max(1, replicas)),
            slots=2,
            order=pipeline.epoch_order(plan, shuffle="none", seed=1),
        )
        last = plan.steps_per_epoch // 2
        found[f"huge/{replicas}"] = _visited(strategy, source, element, range(last, last + 1))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def visited() -> dict[str, list[list[int]]]:
    tests = os.path.dirname(__file__)
    path = os.pathsep.join([os.path.dirname(tests), tests])
    finished = subprocess.run(
        [*warm_python(), __file__], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


def _cases(kind: str) -> list[Any]:
    return [
        pytest.param(n, size, shards, replicas, id=f"{kind}-{n}-{size}-{shards}-on-{replicas or 'default'}")
        for (n, size, shards), replicas in itertools.product(SHAPES, REPLICAS)
        if replicas <= shards
    ]


@pytest.mark.parametrize("shuffle", ["rows", "batches", "none"])
@pytest.mark.parametrize(("n", "size", "shards", "replicas"), _cases("batches"))
def test_batches_hold_each_row_once_an_epoch_in_the_oracles_order(
    visited: dict[str, list[list[int]]], shuffle: str, n: int, size: int, shards: int, replicas: int
):
    found = visited[f"{shuffle} {n} {size} {shards}/{replicas}"]
    per_epoch = -(-n // min(size, n))
    for epoch in range(3):
        rows = list(itertools.chain(*found[epoch * per_epoch : (epoch + 1) * per_epoch]))
        assert sorted(rows) == list(range(n)), f"epoch {epoch}"
    wanted = batches(n, size, shuffle=shuffle, seed=SEED)
    for step, rows in enumerate(found):
        assert rows == next(wanted).tolist(), f"step {step}"


@pytest.mark.parametrize(("n", "size", "shards", "replicas"), _cases("blocks"))
def test_blocks_hold_each_row_once(visited: dict[str, list[list[int]]], n: int, size: int, shards: int, replicas: int):
    found = visited[f"blocks {n} {size} {shards}/{replicas}"]
    assert sorted(itertools.chain(*found)) == list(range(n))


@pytest.mark.parametrize("replicas", REPLICAS)
def test_rows_beyond_32_bits_are_found(visited: dict[str, list[list[int]]], replicas: int):
    last, beyond = visited[f"huge/{replicas}"]
    assert last == list(range(HUGE, HUGE + 5))
    assert beyond == list(range(1024))  # The next epoch.


def test_padding_stays_in_range():
    """A source is never asked for a row that it does not have."""
    import tapedist.numerics  # noqa: F401  (before TensorFlow)
    import tensorflow as tf

    from tapedist.data import blocks, pipeline

    asked: list[np.ndarray] = []

    class Strict(Numbers):
        def take(self, split: str, indices: Any) -> tuple[Any, Any]:
            def note(rows: np.ndarray) -> np.ndarray:
                asked.append(rows)
                return rows

            return super().take(split, tf.ensure_shape(tf.numpy_function(note, [indices], tf.int64), indices.shape))

    plan = blocks.BatchPlan(11, 4, 16)
    layout = pipeline.Layout(16, 1)
    for shuffle in ("rows", "none"):
        element = pipeline.batch_elements(
            plan, layout, slots=2, order=pipeline.epoch_order(plan, shuffle=shuffle, seed=1),
            row_numbers=pipeline.shuffled_rows(plan, seed=1) if shuffle == "rows" else None,
        )  # fmt: skip
        _visited(tf.distribute.get_strategy(), Strict(11), element, range(3))
    order = pipeline.BlockOrder.whole(blocks.BlockPlan(11, 1, 4, 16), layout)
    block = pipeline.block_elements(order, split="train")
    _visited(tf.distribute.get_strategy(), Strict(11), block, range(16))
    rows = np.concatenate(asked)
    assert rows.min() >= 0
    assert rows.max() <= 10


def test_a_source_that_makes_runs_gives_the_rows_of_their_numbers():
    """The short cut that a source may have for runs of rows, in the middle and at the end of a split."""
    import tapedist.numerics  # noqa: F401  (before TensorFlow)
    import tensorflow as tf

    from tapedist.data import blocks, pipeline
    from tapedist.data.synthetic import SyntheticSource

    made = SyntheticSource(
        n_samples=70_001, test_fraction=0.0, seed=1, m=(9.0,), c=-2.0, mean=0.0, std=1.0, noise_std=1.0
    )

    class Listed:
        """The same rows, by their numbers alone."""

        weighted, num_rows, take = False, made.num_rows, made.take

    plan, layout = blocks.BatchPlan(made.num_rows("train"), 1024, 16), pipeline.Layout(16, 1)
    element = pipeline.batch_elements(
        plan, layout, slots=24, order=pipeline.epoch_order(plan, shuffle="batches", seed=1)
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
import tapedist.numerics
import tensorflow as tf
from tapedist.data import blocks, pipeline

class Slow:
    num_features, weighted = 1, False
    def num_rows(self, split): return 1000
    def read_into(self, out, split, rows):
        time.sleep(0.1)
        out[0][:], out[1][:] = 0, 0

plan, layout = blocks.BatchPlan(1000, 10, 2), pipeline.Layout(2, 1)
element = pipeline.batch_elements(plan, layout, slots=1, order=pipeline.epoch_order(plan, shuffle="none", seed=0))
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


if __name__ == "__main__":
    _main()


def test_a_stream_ends_before_it_is_dropped():
    """TensorFlow crashes if what feeds several devices is destroyed while it waits for rows."""
    config = {
        "mode": "mini_batch", "n_samples": 3_000_000, "num_features": 7, "batch_size": 150_000, "num_epochs": 1,
        "cache": "none", "test_fraction": 0.0, "statistics": "false", "learning_rate": 0.01,
    }  # fmt: skip
    found = run_jobs({str(turn): {"config": config} for turn in range(5)}, replicas=2)
    assert len({outcome["digest"] for outcome in found.values()}) == 1
