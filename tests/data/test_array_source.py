"""Rows in memory are the rows of their arrays, whatever way they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import tapedist
import tapedist.runtime_flags
from tapedist.data.array_source import ArraySource
from tapedist.data.standardize import StandardizedSource, StandardUnits
from tapedist.errors import InputError
from tapedist.sklearn import TapeRegressor

N, D = 203, 3
DRAW = np.random.default_rng(4)
X, Y, W = DRAW.normal(size=(N, D)), DRAW.normal(size=N), DRAW.integers(0, 3, N).astype(float)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("first", "length"), [([0], 64), ([130], 64), ([150], 64), ([0, 64, 128], 64), ([200, 3], 5), (range(0, 200, 2), 2)]
)
def test_runs_are_the_rows_that_they_name(first: list[int], length: int, weighted: bool):
    source = ArraySource(X, Y, W if weighted else None)
    take = tf.function(lambda first: source.take_runs("train", first, length=length), autograph=False)
    found = take(tf.constant(list(first), tf.int64))
    rows = (np.array(first)[:, np.newaxis] + np.arange(length)).ravel()
    inside = rows < N  # What lies behind is for nobody.
    for column, wanted in zip(found, source.rows("train", rows[inside]), strict=True):
        assert len(column) == len(rows)
        np.testing.assert_array_equal(column.numpy()[inside], wanted)


def test_standard_units_of_runs_are_those_of_rows():
    units = StandardUnits.of(ArraySource(X, Y), fit_intercept=True)
    source = units.rows(ArraySource(X, Y))
    assert isinstance(source, StandardizedSource)
    runs = source.take_runs("train", tf.constant([7, 90], tf.int64), length=20)
    rows = source.take("train", tf.constant([*range(7, 27), *range(90, 110)], tf.int64))
    for a, b in zip(runs, rows, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("d", [1, 3, 40])
def test_what_numpy_writes_is_what_tensorflow_takes(d: int, dtype: str):
    """In raw and standard units, as rows and as tiles, by range and by number."""
    raw = ArraySource(np.tile(X, [1, 14])[:, :d].astype(dtype), Y.astype(dtype), W, test_rows=10)
    source: Any
    for source in (raw, StandardUnits.of(raw, fit_intercept=True).rows(raw)):
        for rows in (range(30, 190), np.arange(160) * 7 % 190):
            x, y, w = (column.numpy() for column in source.take("train", tf.constant([*rows], tf.int64)))
            tiled, flat, target, weight = np.empty([10, d, 16]), np.empty([160, d]), np.empty(160), np.empty(160)
            source.read_into((tiled, target, weight), "train", rows)
            source.read_into((flat, target, weight), "train", rows)
            np.testing.assert_array_equal(flat, x)
            np.testing.assert_array_equal(tiled.swapaxes(1, 2).reshape(160, d), x)
            np.testing.assert_array_equal(target, y)
            np.testing.assert_array_equal(weight, np.ldexp(w, -raw.weight_exponent))


def test_arrays_are_not_written_into_graphs():
    """Where they would be copied with every change, and must not exceed 2 GiB."""
    source = ArraySource(np.zeros([200_000, 4]), np.zeros(200_000))
    for take in (
        lambda first: source.take("train", first),
        lambda first: source.take_runs("train", first, length=512),
    ):
        graph = tf.function(take, autograph=False).get_concrete_function(tf.TensorSpec([2], tf.int64)).graph
        assert graph.as_graph_def().ByteSize() < 100_000


def test_the_last_rows_are_for_testing():
    source = ArraySource(X, Y, W, test_rows=53)
    assert (source.num_rows("train"), source.num_rows("test")) == (150, 53)
    numbers = tf.range(53, dtype=tf.int64)
    runs = source.take_runs("test", tf.constant([0], tf.int64), length=53)
    for found in (source.rows("test", range(53)), source.take("test", numbers), runs):
        for column, wanted in zip(found, (X, Y, W), strict=True):
            np.testing.assert_array_equal(column, wanted[150:])


@pytest.mark.parametrize(
    ("arrays", "settings", "said"),
    [
        ((X, Y[1:]), {}, r"arrays of shapes \[203, 3\], \[202\]: must be"),
        ((Y, Y), {}, "must be"),
        ((X[:, :0], Y), {}, "n and d at least 1"),
        ((X[:0], Y[:0]), {}, "n and d at least 1"),
        ((X, Y), {"feature_names": ["a"]}, "1 names for 3 columns"),
        ((X, Y), {"test_rows": N}, "test_rows=203: must be from 0 to 202"),
        ((X, Y.astype(complex)), {}, "y: holds complex128"),
        ((np.where(X > 2, np.nan, X), Y), {}, "x: holds numbers that are not finite"),
        ((X, Y, -W), {}, "w: holds a negative weight"),
    ],
)
def test_bad_arrays_are_refused(arrays: tuple[np.ndarray, ...], settings: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        ArraySource(*arrays, **settings)


def test_lists_integers_and_huge_numbers_are_taken():
    source = ArraySource([[1, 2], [3, 4]], [1, 0])
    assert [column.dtype for column in source.rows("train", range(2))] == [np.float64] * 2
    ArraySource(X, np.full(N, 1.7e308))


def test_one_fingerprint_whatever_the_type():
    x = X.astype(np.float32)
    assert ArraySource(x, Y).fingerprint() == ArraySource(x.astype(np.float64), Y).fingerprint()
    others = [ArraySource(X, Y, W), ArraySource(X, Y, test_rows=3), ArraySource(X + 1, Y)]
    assert len({source.fingerprint() for source in (ArraySource(X, Y), *others)}) == 4


def test_in_blocks_and_whole():
    """A split of many blocks, the last one of which is not full."""
    x = DRAW.normal(size=(140_003, 8))
    y = x @ np.arange(8) + 1
    model = TapeRegressor(num_epochs=200, config={"full_batch_engine": "moments"}).fit(x, y)
    np.testing.assert_allclose(model.coef_, np.arange(8), atol=1e-9)


def test_the_promise_for_own_arrays(tmp_path: Path):
    """One digest, in memory or streamed, and a test split."""
    x = DRAW.normal(size=(3001, 3))
    source = tapedist.ArraySource(x, x @ [1.0, 2.0, 3.0] + 4, test_rows=500)
    results = [
        tapedist.train(
            tapedist.TrainConfig(
                mode="mini_batch", batch_size=96, learning_rate=0.1, num_epochs=9, cache=cache, statistics="false",
                plots=False, run_dir=str(tmp_path / cache),
            ),
            source=source,
        )
        for cache in ("device", "none")
    ]  # fmt: skip
    assert results[0].digest == results[1].digest
    np.testing.assert_allclose(results[0].parameters, [1, 2, 3, 4], rtol=1e-3)
    assert results[0].test_loss == pytest.approx(results[1].test_loss)


@pytest.mark.parametrize(("weights", "split"), [([0, 0, 0, 1], "training"), ([1, 1, 1, 0], "test")])
def test_rows_that_all_weigh_nothing(weights: list[int], split: str):
    with pytest.raises(InputError, match=f"w: all {split} rows weigh 0"):
        ArraySource(np.ones((4, 1)), np.ones(4), np.array(weights), test_rows=1)
