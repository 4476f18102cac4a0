"""One program for many steps, or sums and update apart: what one replica runs against what several run, bit for bit.

The bit matrix shows the same through whole processes, for few cases; here are those in which XLA once chose other
kernels: one slot only, no intercept, penalties, and rules that keep more than the parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.config import TrainConfig
from tapedist.training import losses, optimizers
from tapedist.training.model import LinearModel
from tapedist.training.slot_steps import LEAST_SLOTS, SlotSteps

V = 16
STEPS = 6
CASES: dict[str, dict[str, Any]] = {
    "d=1 nesterov l2": {"k": 189, "d": 1, "loss": losses.absolute, "l2": 0.1, "optimizer": "nesterov"},
    "d=1 sgd no intercept": {"k": 406, "d": 1, "loss": losses.huber(1.0), "l2": 0.1, "fit_intercept": False},
    "d=1 adam no intercept": {"k": 450, "d": 1, "l2": 0.1, "optimizer": "adam", "fit_intercept": False},
    "d=3 nesterov 3 slots": {"k": 257, "d": 3, "slots": 3, "optimizer": "nesterov", "fit_intercept": False},
    "d=2 float64 adam 3 slots": {"k": 204, "d": 2, "slots": 3, "optimizer": "adam", "dtype": "float64"},
    "d=17 in a loop": {"k": 40, "d": 17, "slots": 3, "optimizer": "momentum"},
    "d=1 even": {"k": 500, "d": 1, "even": True, "optimizer": "momentum"},
    "d=17 even, in a loop": {"k": 37, "d": 17, "slots": 3, "even": True},
}


def _steps(case: dict[str, Any]) -> SlotSteps:
    config = TrainConfig(optimizer=case.get("optimizer", "sgd"), learning_rate=0.01)
    return SlotSteps(
        strategy=tf.distribute.get_strategy(),
        model=LinearModel(case["d"], fit_intercept=case.get("fit_intercept", True)),
        loss=case.get("loss", losses.squared),
        optimizer=optimizers.from_config(config),
        num_shards=V,
        even=case.get("even", False),
        l2=case.get("l2", 0.0),
        dtype=tf.as_dtype(case.get("dtype", "float32")),
    )


def _data(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(x [slots, V, k, d], y [slots, V, k], counts [slots, V])`, the last slot ragged unless all are even."""
    rng = np.random.default_rng(1)
    slots, dtype = case.get("slots", LEAST_SLOTS), case.get("dtype", "float32")
    x = rng.normal(size=(slots, V, case["k"], case["d"])).astype(dtype)
    y = rng.normal(size=(slots, V, case["k"])).astype(dtype)
    counts = np.full((slots, V), case["k"], np.int32)
    if not case.get("even"):
        counts[-1] = np.sort(rng.integers(0, case["k"] + 1, size=V))[::-1]
    padding = np.arange(case["k"]) >= counts[..., np.newaxis]
    x[padding], y[padding] = 0, 0
    return x, y, counts


def _share(arrays: tuple[np.ndarray, ...], first: int, shards: int) -> tuple[Any, Any]:
    """`(rows, counts)` of a replica's shards, as `pipeline` lays them out: a lone one padded to two."""

    def padded(array: np.ndarray) -> np.ndarray:
        part = array[:, first : first + shards]
        widths = [(0, 0), (0, max(2, shards) - part.shape[1]), *[(0, 0)] * (array.ndim - 2)]
        return np.pad(part, widths)

    x, y, counts = (padded(array) for array in arrays)
    return (tf.constant(x.reshape(-1, x.shape[-1])), tf.constant(y.ravel())), tf.constant(counts)


@pytest.mark.parametrize("case", CASES)
def test_sums_and_update_apart_give_the_bits_of_one_program(case: str):
    steps, arrays = _steps(CASES[case]), _data(CASES[case])
    slots = np.arange(STEPS, dtype=np.int32) % arrays[2].shape[0]
    state = np.zeros(steps.num_parameters * (1 + steps.num_slots))
    state[: steps.num_parameters] = np.random.default_rng(2).normal(size=steps.num_parameters)
    whole = steps.run(state, *_share(arrays, 0, V), slots, step=0, limit=np.inf)
    partials = tf.function(steps._slot_partials, jit_compile=True, autograph=False)
    for shards in (8, 6, 1):  # Of 2, 3 and 16 replicas.
        shares = [_share(arrays, first, shards) for first in range(0, V, shards)]
        at, records = tf.constant(state), []
        for step, slot in enumerate(slots):
            found = [partials(at, *share, tf.constant(slot))[:shards] for share in shares]
            at, record, _ = steps._compiled_apply(
                at, tf.concat(found, 0)[:V], tf.constant(step, tf.int64), tf.constant(steps.settings(np.inf))
            )
            records.append(record.numpy())
        np.testing.assert_array_equal(np.array(records), whole.records)
        np.testing.assert_array_equal(at.numpy(), whole.state)


def test_one_compilation_whatever_the_slot():
    """A start of slices would be taken for a constant, and compiled anew for each value."""
    case = CASES["d=3 nesterov 3 slots"]
    steps, arrays = _steps(case), _data(case)
    partials = tf.function(steps._slot_partials, jit_compile=True, autograph=False)
    state, (rows, counts) = tf.zeros([2 * steps.num_parameters], tf.float64), _share(arrays, 0, V)
    texts = {
        partials.experimental_get_compiler_ir(state, rows, counts, tf.constant(slot))(stage="hlo") for slot in range(3)
    }
    assert len(texts) == 1


@pytest.mark.parametrize("d", [1, 17])
def test_what_is_not_compared_is_not_changed(d: int):
    case = {"k": 90, "d": d, "even": True}
    arrays = _data(case)
    states = [
        _steps({**case, "even": even}).run(
            np.ones(d + 1), *_share(arrays, 0, V), np.zeros(STEPS, np.int32), step=0, limit=np.inf
        ).state
        for even in (False, True)
    ]  # fmt: skip
    np.testing.assert_allclose(states[0], states[1], rtol=1e-6)
