"""The order of a sum is part of the answer."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import numpy as np
import pytest
from conftest import Finished

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.training import partials


def _terms(count: int) -> np.ndarray:
    """Numbers whose sum in float64 depends on the order."""
    random = np.random.Generator(np.random.Philox(count))
    return random.standard_normal((count, 3)) * 10.0 ** random.integers(-12, 12, (count, 1))


@pytest.mark.parametrize("count", [1, 2, 16, 64, 65, 100])
def test_a_fold_adds_in_shard_order(count: int):
    terms = _terms(count)
    np.testing.assert_array_equal(partials.fold(tf.constant(terms)), functools.reduce(operator.add, terms))


@pytest.mark.parametrize("count", [1, 2, 100])
def test_rounds_and_tiles_add_in_order(count: int):
    terms = _terms(count)
    wanted = functools.reduce(operator.add, terms)
    np.testing.assert_array_equal(partials.fold_rounds(tf.constant(terms), shape=[3]), wanted)
    tensor = tf.constant(terms)
    np.testing.assert_array_equal(partials.running_sum(lambda i: tensor[i], count=count, width=3), wanted)


@pytest.mark.parametrize("parallel", [1, 2, 8])
def test_blocks_stay_in_block_order_however_many_run_at_once(parallel: int):
    terms = tf.constant(_terms(20))
    found = partials.block_partials(lambda i: terms[i], num_blocks=20, width=3, parallel=parallel)
    np.testing.assert_array_equal(found, terms)


def test_a_lone_shard_must_be_padded():
    with pytest.raises(AssertionError, match="padded"):
        partials.shard_partials(lambda place: tf.zeros(3), first=tf.constant(0), num_shards=1, width=3)


_GATHER = """
import functools, sys
import numpy as np
import tapedist.numerics
import tensorflow as tf
from tapedist.cluster import strategies
from tapedist.training import partials
from tapedist.training.replicas import Replicas

strategies.split_cpu(3)
devices = tuple(f"CPU:{i}" for i in range(3))
sums = np.arange(32.0).reshape(16, 2) * 1.1
sums[3] = -0.0, 5e-324
sums[9] = np.nan, -np.inf
bits = sums.view(np.int64)
for without_nccl in (False, True):
    strategy = strategies._mirrored_on(devices, without_nccl=without_nccl)
    replicas = Replicas(strategy=strategy, num_shards=16, partial_width=2)
    per_replica = replicas.scattered(sums)
    np.testing.assert_array_equal(replicas.gathered(per_replica).view(np.int64), bits)
    gather = functools.partial(partials.gather, num_shards=16)
    everyones = tf.function(lambda value: replicas.on_replicas(gather, value))(per_replica)
    for found in strategy.experimental_local_results(everyones):
        np.testing.assert_array_equal(found.numpy().view(np.int64), bits)
print("same")
"""


def test_a_gather_keeps_every_bit_and_the_order(run_python: Callable[..., Finished]):
    """Also with `--collective=ring` for the GPUs of one process, here on logical CPUs."""
    done = run_python("-c", _GATHER, warm=True)
    assert done.out == "same\n", done.err
