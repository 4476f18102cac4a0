"""The synthetic source: every row equals the oracle's, however and wherever it is asked for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import synthetic_oracle as oracle
import tensorflow as tf
from preforked import preforked_python

from tapedist.data import synthetic
from tapedist.data.synthetic import SyntheticSource
from tapedist.errors import InputError

TUTORIAL = {
    "n_samples": 10_000,
    "test_fraction": 0.2,
    "seed": 0,
    "m": (9.0,),
    "c": -2.0,
    "mean": 0.0,
    "std": 1.0,
    "noise_std": 1.0,
}


def _source(**changes) -> SyntheticSource:
    return SyntheticSource(**(TUTORIAL | changes))


def _take(source: SyntheticSource, split: str, rows) -> tuple[np.ndarray, np.ndarray]:
    x, y = source.take(split, tf.constant(rows, tf.int64))
    return x.numpy(), y.numpy()


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


@pytest.mark.parametrize(
    ("d", "changes"),
    [
        (1, {}),
        (1, {"seed": 2**63 - 1, "mean": 3.0, "std": 0.25, "noise_std": 0.0}),
        (2, {"seed": 7}),
        (3, {"mean": -1.0, "std": 2.0, "noise_std": 0.5}),
        (64, {"std": 0.125}),
    ],
)
def test_rows_equal_the_oracle(d, changes):
    source = _source(m=tuple(1.0 + j for j in range(d)), **changes)
    rows = np.arange(8000)
    x, y = _take(source, "train", rows)
    assert x.shape == (8000, d)
    assert y.shape == (8000,)
    assert x.dtype == y.dtype == np.float32
    settings = {name: getattr(source, name) for name in ("m", "c", "mean", "std", "noise_std")}
    expected_x, expected_y = oracle.linear_rows(source.seed, rows, **settings)
    np.testing.assert_allclose(x, expected_x, rtol=0, atol=2e-6 * source.std)
    # d roundings, each of a partial sum no larger than the largest one.
    largest = np.abs(expected_x * source.m).sum(axis=1) + abs(source.c) + source.noise_std
    assert (np.abs(y - expected_y) <= (d + 4) * 2**-23 * largest).all()


@pytest.mark.parametrize("d", [1, 2, 3, 64])
def test_rows_are_the_oracles_bits(d):
    source = _source(
        n_samples=2**40, m=tuple(0.7 + j for j in range(d)), c=-2.3, mean=0.3, std=3.1, noise_std=0.7, seed=4
    )
    settings = {name: getattr(source, name) for name in ("m", "c", "mean", "std", "noise_std")}
    first = 2**32 - 3000
    rows = np.arange(first, first + 6400)
    expected = oracle.linear_rows32(source.seed, rows, **settings)
    runs = tf.constant([first, first + 3200], tf.int64)
    for found in (_take(source, "train", rows), source.take_runs("train", runs, length=3200)):
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))

    def block(_):
        return source.take_runs("train", runs, length=3200)

    for found in tf.data.Dataset.range(1).map(block):
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_test_split_is_the_last_rows():
    whole, source = _source(test_fraction=0.0), _source()
    assert (source.num_rows("train"), source.num_rows("test")) == (8000, 2000)
    for array, expected in zip(
        _take(source, "test", np.arange(2000)), _take(whole, "train", np.arange(8000, 10_000)), strict=True
    ):
        assert np.array_equal(array, expected)


def test_a_row_does_not_depend_on_how_many_there_are():
    for array, expected in zip(
        _take(_source(), "train", np.arange(100)), _take(_source(n_samples=2**50), "train", np.arange(100)), strict=True
    ):
        assert np.array_equal(array, expected)


@pytest.mark.parametrize("d", [1, 3])
def test_rows_do_not_depend_on_grouping(d):
    source = _source(n_samples=2**40, m=(9.0,) * d, mean=0.5, std=3.0)
    first = 2**33 - 1000
    whole = _take(source, "train", np.arange(first, first + 33_000))
    for size in [*range(1, 18), 63, 64, 65, 96, 127, 1000, 4097, 32_768]:
        part = _take(source, "train", np.arange(first + 101, first + 101 + size))
        assert all(np.array_equal(a, b[101 : 101 + size]) for a, b in zip(part, whole, strict=True)), size
    order = np.random.default_rng(0).permutation(33_000)
    shuffled = _take(source, "train", first + order)
    assert all(np.array_equal(a, b[order]) for a, b in zip(shuffled, whole, strict=True))


@pytest.mark.parametrize(("d", "length"), [(1, 16_448), (1, 64), (1, 48), (3, 64), (3, 8192)])
def test_runs_hold_the_rows_of_their_numbers(d, length):
    source = _source(n_samples=2**40, m=(9.0,) * d, mean=0.5, std=3.0)
    runs = max(2, 33_000 // length)
    # One in front of a multiple of 2**32, so that the number's upper word changes within it.
    first = np.random.default_rng(d).integers(0, 2**39, runs)
    first[-1] = 2**33 - length // 2
    numbers = (first[:, np.newaxis] + np.arange(length)).ravel()
    for split, offset in (("train", 0), ("test", source.num_rows("train"))):
        found = source.take_runs(split, tf.constant(first - offset), length=length)
        expected = _take(source, split, numbers - offset)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        x, y = source.take_tiles(split, tf.constant(first - offset), length=length, tile_rows=length // 4)
        assert np.array_equal(x, expected[0].reshape(4 * runs, length // 4, d).swapaxes(1, 2))
        assert np.array_equal(y, expected[1])


@pytest.mark.parametrize("threads", [1, 8])
def test_rows_are_the_same_inside_tf_data_and_functions(threads):
    source = _source(n_samples=10**6)
    expected = _take(source, "train", np.arange(64_000))
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads

    def block(number):
        return source.take("train", number * 1000 + tf.range(1000, dtype=tf.int64))

    blocks = tf.data.Dataset.range(64).map(block, num_parallel_calls=threads).with_options(options)
    x, y = zip(*blocks.as_numpy_iterator(), strict=True)
    assert np.array_equal(np.concatenate(x), expected[0])
    assert np.array_equal(np.concatenate(y), expected[1])
    traced = tf.function(lambda rows: source.take("train", rows))(tf.range(64_000, dtype=tf.int64))
    assert all(np.array_equal(a, b) for a, b in zip(traced, expected, strict=True))


_DIGEST_PROGRAM = """
import sys
import tapedist.runtime_flags, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
tf.config.threading.set_inter_op_parallelism_threads(int(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
import test_synthetic
print(test_synthetic._digest(*test_synthetic._take(test_synthetic._source(n_samples=10**6), "train", range(100_000))))
"""


@pytest.mark.parametrize("threads", ["1", "8"])
def test_rows_do_not_depend_on_the_thread_count(threads, request):
    here = str(request.path.parent)
    found = subprocess.run(
        [*preforked_python(), "-c", _DIGEST_PROGRAM, threads, here], capture_output=True, text=True, check=True
    )
    assert found.stdout.split()[-1] == _digest(*_take(_source(n_samples=10**6), "train", np.arange(100_000)))


@pytest.mark.parametrize(
    "flag",
    [
        *(f"--xla_cpu_max_isa={name}" for name in ("SSE4_2", "AVX", "AVX2", "AVX512")),
        "--xla_cpu_prefer_vector_width=512",
    ],
)
def test_rows_do_not_depend_on_the_instructions_of_the_machine(flag, request):
    here = str(request.path.parent)
    found = subprocess.run(
        [sys.executable, "-c", _DIGEST_PROGRAM, "2", here],
        capture_output=True, text=True, check=True,
        env={**os.environ, "XLA_FLAGS": flag, "PYTHONPATH": os.path.dirname(here)},
    )  # fmt: skip
    settings = {name: TUTORIAL[name] for name in ("m", "c", "mean", "std", "noise_std")}
    assert found.stdout.split()[-1] == _digest(*oracle.linear_rows32(0, np.arange(100_000), **settings))


def test_row_numbers_beyond_32_bits():
    source = _source(n_samples=2**62 - 1, test_fraction=0.25)
    last = source.num_rows("train") - 1
    for split, row in [("train", 2**33 + 5), ("train", last), ("test", 0), ("test", source.num_rows("test") - 1)]:
        x, y = _take(source, split, [row])
        number = row + (source.num_rows("train") if split == "test" else 0)
        expected_x, expected_y = oracle.linear_rows(0, np.array([number]), m=(9.0,), c=-2.0, mean=0, std=1, noise_std=1)
        np.testing.assert_allclose(x, expected_x, rtol=1e-6)
        np.testing.assert_allclose(y, expected_y, rtol=1e-5)
    low, high = _take(source, "train", [5]), _take(source, "train", [2**32 + 5])
    assert not np.array_equal(low, high)


def test_least_squares_finds_the_truth():
    source = _source(n_samples=250_000, m=(9.0, -1.0), noise_std=0.5)
    x, y = _take(source, "train", np.arange(200_000))
    found = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]).astype(np.float64), y, rcond=None)[0]
    weights, bias = source.truth
    np.testing.assert_allclose(found, [*weights, bias], atol=5 * 0.5 / np.sqrt(200_000))


def test_names():
    source = _source()
    assert (source.feature_names, source.target_name, source.weighted) == (("x",), "y", False)
    wide = _source(m=(1.0, 2.0, 3.0))
    assert wide.num_features == 3
    assert wide.feature_names == ("x0", "x1", "x2")
    assert wide.truth == ((1.0, 2.0, 3.0), -2.0)


def test_fingerprint_names_the_rows(monkeypatch):
    assert _source().fingerprint() == _source().fingerprint()
    changes = {
        "n_samples": 9999,
        "test_fraction": 0.1,
        "seed": 1,
        "m": (8.0,),
        "c": 0.0,
        "mean": 1.0,
        "std": 2.0,
        "noise_std": 0.0,
    }
    others = [_source(**{name: value}).fingerprint() for name, value in changes.items()]
    assert len({_source().fingerprint(), *others}) == 1 + len(changes)
    before = _source().fingerprint()
    monkeypatch.setattr(synthetic.generator, "VERSION", synthetic.generator.VERSION + 1)
    assert _source().fingerprint() != before


def test_unknown_split_is_an_error():
    with pytest.raises(ValueError):
        _source().num_rows("validation")


def test_all_numbers_beyond_float32_are_named():
    with pytest.raises(InputError) as caught:
        _source(m=(1.0, 1e39), noise_std=4e38, c=float("nan"))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "--m=1e+39",
        "--c=nan",
        "--noise_std=4e+38",
    ]


def test_one_compilation_serves_every_source():
    _take(_source(), "train", np.arange(640))
    traces = synthetic._columns.experimental_get_tracing_count(), synthetic._assemble.experimental_get_tracing_count()
    for seed in range(3):
        _take(_source(seed=seed, m=(float(seed),), mean=1.0), "train", np.arange(640 - seed))
    assert traces == (
        synthetic._columns.experimental_get_tracing_count(),
        synthetic._assemble.experimental_get_tracing_count(),
    )


@pytest.mark.parametrize("d", [1, 3])
def test_few_rows_are_those_of_many(d):
    """Few are made once and read from memory, many are made where they are needed."""
    changes = {"m": tuple(9.0 - j for j in range(d)), "mean": 0.5, "std": 3.0}
    few, many = _source(n_samples=5000, **changes), _source(n_samples=10**6, **changes)
    assert few.reader() is not few
    assert many.reader() is many
    first = tf.constant([64, 3200], tf.int64)
    for found, wanted in (
        (few.take_runs("train", first, length=640), many.take_runs("train", first, length=640)),
        (
            few.take_tiles("train", first, length=640, tile_rows=128),
            many.take_tiles("train", first, length=640, tile_rows=128),
        ),
        (_take(few, "test", [999, 0, 5]), _take(many, "train", [4999, 4000, 4005])),
    ):
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    behind = few.take_runs("test", tf.constant([960], tf.int64), length=64)
    assert np.array_equal(behind[1][:40], _take(many, "train", np.arange(4960, 5000))[1])


@pytest.mark.parametrize("numbers", [range(7, 300), np.array([5, 3, 999])])
def test_few_rows_are_read_into_rows_and_tiles(numbers):
    source = _source(n_samples=5000, m=(1.0, 2.0, 3.0))
    reader, count = source.reader(), len(numbers)
    x, y = _take(source, "test", np.asarray(numbers))
    rows, targets, tiles = np.zeros([count, 3]), np.zeros(count), np.zeros([-(-count // 64), 3, 64], np.float32)
    reader.read_into([rows, targets], "test", numbers)
    assert np.array_equal(rows, x)
    assert np.array_equal(targets, y)
    reader.read_into([tiles, targets], "test", numbers)
    assert np.array_equal(np.moveaxis(tiles, 1, 2).reshape(-1, 3)[:count], x)
