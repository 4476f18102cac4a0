"""The generator: right bits, right transform, and numbers that behave like independent normals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic_oracle as oracle
import tensorflow as tf
from scipy import stats

from tapedist.data import generator

ROWS = 2**20


@tf.function(jit_compile=True, autograph=False)
def _words(rows, keys):
    words = tf.bitcast(rows, tf.uint32)
    return tf.stack(generator.threefry(keys[0], keys[1], words[:, 0], words[:, 1]))


@tf.function(jit_compile=True, autograph=False)
def _stacked(word0, word1, zero):
    return tf.stack(generator.box_muller(word0, word1, zero))


def _transformed(word0, word1):
    return _stacked(word0, word1, tf.constant(0))


def _bits(seed: int, rows: np.ndarray) -> np.ndarray:
    return _words(tf.constant(rows, tf.int64), tf.constant(generator.pair_keys(seed, 2)[0])).numpy()


def _normals(seed: int, rows: np.ndarray) -> np.ndarray:
    return _transformed(*_bits(seed, rows)).numpy()


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    """uint32 `[2, ROWS]`."""
    return _bits(0, np.arange(ROWS))


@pytest.fixture(scope="module")
def normals(words) -> np.ndarray:
    """float32 `[2, ROWS]`: feature and noise at d = 1."""
    return _transformed(*words).numpy()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Published with the authors' Random123 as known answers of threefry2x32, 13 rounds.
        ((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0xFD36D048, 0x2D17272C)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_threefry_gives_the_published_answers(counter, key, expected):
    arguments = [tf.constant([word], tf.uint32) for word in (*key, *counter)]
    assert tuple(int(word[0]) for word in generator.threefry(*arguments)) == expected


@pytest.mark.parametrize("first", [0, 2**31 - 50, 2**32 - 50, 2**33 + 7, 2**62 - 200])
def test_words_equal_the_oracle(first):
    rows = np.arange(first, first + 100, dtype=np.uint64)
    low, high = rows & np.uint64(2**32 - 1), rows >> np.uint64(32)
    expected = oracle.threefry13(tuple(generator.pair_keys(3, 2)[0]), low, high)
    assert np.array_equal(_bits(3, rows.astype(np.int64)), expected)


def test_normals_are_within_a_few_units_in_the_last_place(words, normals):
    expected = np.stack(oracle.normals_of(*words.astype(np.uint64)))
    zero = normals[0] == 0  # The uniform rounds to 1 in 3 rows of 10**8.
    assert zero.sum() <= 3
    error = np.abs(normals - expected) / np.spacing(np.abs(expected).astype(np.float32))
    assert error.max() < 6


def test_extreme_words_give_finite_normals_and_long_tails():
    extremes = np.array([0, 1, 2, 3, 127, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1], np.uint32)
    word0, word1 = (grid.ravel() for grid in np.meshgrid(extremes, extremes))
    result = _transformed(word0, word1).numpy()
    assert np.isfinite(result).all()
    assert np.abs(result).max() == pytest.approx(np.sqrt(2 * 32 * np.log(2)), rel=1e-6)
    expected = np.stack(oracle.normals_of(word0.astype(np.uint64), word1.astype(np.uint64)))
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-9)


def test_tails_are_right_where_samples_are_rare():
    """The radius over its rarest uniforms: what one normal in 10**5 to 10**9 is made of."""
    word0 = np.arange(0, 2**16, dtype=np.uint32)
    first, second = _transformed(word0, np.full_like(word0, 2**30)).numpy().astype(np.float64)  # 45 degrees.
    uniform = (word0 // 2 + 0.5) / 2**31
    np.testing.assert_allclose(np.hypot(first, second), np.sqrt(-2 * np.log(uniform)), rtol=3e-7)


@pytest.mark.parametrize("column", [0, 1])
def test_moments_are_those_of_a_normal(normals, column):
    z = normals[column].astype(np.float64)
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]:
        assert abs((z**power).mean() - expected) < 5 * np.sqrt(variance / ROWS), f"moment {power}"


@pytest.mark.parametrize("column", [0, 1])
def test_distribution_is_normal(normals, column):
    assert stats.kstest(normals[column], "norm").pvalue > 1e-4
    edges = stats.norm.ppf(np.linspace(0, 1, 257))
    assert stats.chisquare(np.histogram(normals[column], edges)[0]).pvalue > 1e-4


@pytest.mark.parametrize("sigma", [3.0, 4.0, 4.5])
def test_tail_counts(normals, sigma):
    expected = stats.norm.sf(sigma) * ROWS * 2
    for tail in (normals > sigma, normals < -sigma):
        count = tail.sum()
        assert stats.poisson.cdf(count, expected) > 1e-5
        assert stats.poisson.sf(count - 1, expected) > 1e-5


def test_feature_and_noise_are_independent(normals):
    ranks = [np.searchsorted(stats.norm.ppf(np.linspace(0, 1, 17)[1:-1]), z) for z in normals]
    table = np.bincount(ranks[0] * 16 + ranks[1], minlength=256)
    assert stats.chisquare(table).pvalue > 1e-4


@pytest.mark.parametrize("function", [np.asarray, np.abs, np.square], ids=["value", "size", "square"])
@pytest.mark.parametrize("lag", [0, 1, 2, 3, 4, 8, 64, 1024, 2**16])
def test_no_correlation_with_other_rows(normals, function, lag):
    first, second = function(normals[0]), function(normals[1])
    pairs = [(first, second)] if lag == 0 else [(a[lag:], b[:-lag]) for a in (first, second) for b in (first, second)]
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))


@pytest.mark.parametrize("other", [1, 2, 2**32, 2**63 - 1])
def test_no_correlation_with_other_seeds(normals, other):
    for a in normals:
        for b in _normals(other, np.arange(ROWS)):
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(ROWS)


def test_every_bit_is_fair_and_unlike_its_neighbours(words):
    for word in words:
        for bit in range(32):
            ones = (word >> np.uint32(bit)) & 1
            assert stats.binomtest(int(ones.sum()), ROWS).pvalue > 1e-6, f"bit {bit}"
            changes = int((ones[1:] ^ ones[:-1]).sum())
            assert stats.binomtest(changes, ROWS - 1).pvalue > 1e-6, f"bit {bit}, row to row"


def test_bytes_are_uniform_and_row_counters_avalanche(words):
    for byte in words.view(np.uint8).reshape(2, ROWS, 4).transpose(0, 2, 1).reshape(8, ROWS):
        assert stats.chisquare(np.bincount(byte, minlength=256)).pvalue > 1e-5
    rows = np.arange(4096)
    for bit in range(62):
        flipped = _bits(0, rows) ^ _bits(0, rows ^ (1 << bit))
        share = np.unpackbits(flipped.view(np.uint8)).mean()
        assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(4096 * 64), f"row bit {bit}"


def test_keys_do_not_depend_on_how_many_there_are_and_never_meet():
    assert np.array_equal(generator.pair_keys(5, 2), generator.pair_keys(5, 1000)[:1])
    assert generator.pair_keys(5, 3).shape == (2, 2)
    keys = np.concatenate([generator.pair_keys(seed, 200) for seed in range(50)])
    assert len(np.unique(keys, axis=0)) == len(keys)


def test_benchmark_prints_one_line_per_candidate():
    repo = Path(__file__).resolve().parents[2]
    command = [sys.executable, "scripts/bench/generation.py", "--quick", "--block_rows=4096"]
    environment = os.environ | {"PYTHONPATH": str(repo)}
    output = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, check=True).stdout
    results = [json.loads(line) for line in output.splitlines()]
    assert len({result["candidate"] for result in results}) == 6
    assert all(result["rows_per_sec_min"] > 0 for result in results)
