"""The order of a sum is part of the answer."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest

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
