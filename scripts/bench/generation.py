"""Candidates for making synthetic rows, side by side, as the input pipeline uses them: blocks in a parallel map.

    python scripts/bench/generation.py [--quick] [--block_rows=131072] [--features=1]

One JSON line per candidate: the median, least and greatest rows per second over the repeats (which take turns, so that
a busy machine slows all alike), and the median of rows per second of CPU time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tapedist.data import generator
from tapedist.data.synthetic import SyntheticSource

Candidate = Callable[[tf.Tensor], tuple[tf.Tensor, ...]]
_KEY = tuple(int(word) for word in generator.pair_keys(0, 2)[0])


def _compiled(function: Candidate) -> Candidate:
    return tf.function(function, jit_compile=True, autograph=False)


def _line(z0: tf.Tensor, z1: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return z0, 9.0 * z0 - 2.0 + z1


def _split(rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.cast(rows, tf.uint32), tf.cast(tf.bitwise.right_shift(rows, tf.constant(32, tf.int64)), tf.uint32)


def _threefry(word0: tf.Tensor, word1: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return generator.threefry(tf.constant(_KEY[0], tf.uint32), tf.constant(_KEY[1], tf.uint32), word0, word1)


def _words(rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return _threefry(*_split(rows))


def philox_op(rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """TensorFlow's own stateless normals, keyed by the block's first row."""
    z = tf.random.stateless_normal([2, rows.shape[0]], tf.stack([tf.constant(0, tf.int64), rows[0]]), alg="philox")
    return _line(z[0], z[1])


@_compiled
def threefry_library_transform(rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Box and Muller with TensorFlow's log, cosine and sine."""
    word0, word1 = _words(rows)
    uniform = tf.cast(tf.bitcast(tf.bitwise.right_shift(word0, tf.constant(8, tf.uint32)), tf.int32), tf.float32) + 0.5
    radius = tf.sqrt(-2.0 * tf.math.log(uniform * np.float32(2**-24)))
    angle = tf.cast(tf.bitcast(word1, tf.int32), tf.float32) * np.float32(np.pi * 2**-31)
    return _line(radius * tf.cos(angle), radius * tf.sin(angle))


@_compiled
def threefry_int64_two_outputs(rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The package's transform, without what keeps its vectors wide and its words from being computed again."""
    zero = tf.cast(
        tf.bitwise.right_shift(rows[0], tf.constant(62, tf.int64)), tf.int32
    )  # Which the compiler does not know.
    return _line(*generator.box_muller(*_words(rows), zero))


def _one_array(generate: Candidate) -> Candidate:
    """The package's transform and layout for one feature, with any generator of two words."""

    @_compiled
    def columns(words: tf.Tensor, zero: tf.Tensor) -> tf.Tensor:
        return tf.complex(*_line(*generator.box_muller(*generate(words[:, 0], words[:, 1]), zero)))

    def candidate(rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
        both = columns(tf.bitcast(rows, tf.uint32), tf.constant(0))
        return tf.math.real(both), tf.math.imag(both)

    return candidate


def _philox(word0: tf.Tensor, word1: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Philox-2x32 with 7 rounds (Salmon et al. 2011). Its key has 32 bits."""
    for step in range(7):
        key = tf.constant((_KEY[0] + step * 0x9E3779B9) % 2**32, tf.uint32)
        product = tf.cast(word0, tf.uint64) * tf.constant(0xD256D193, tf.uint64)
        high = tf.cast(tf.bitwise.right_shift(product, tf.constant(32, tf.uint64)), tf.uint32)
        word0, word1 = tf.bitwise.bitwise_xor(tf.bitwise.bitwise_xor(high, key), word1), tf.cast(product, tf.uint32)
    return word0, word1


def _tapedist(features: int) -> Candidate:
    source = SyntheticSource(
        n_samples=2**62 - 1, test_fraction=0.0, seed=0, m=(9.0,) * features, c=-2.0, mean=0.0, std=1.0, noise_std=1.0
    )
    return lambda rows: source.take("train", rows)


def _seconds(candidate: Candidate, block_rows: int, blocks: int) -> tuple[float, float]:
    """Wall and CPU seconds of `blocks` blocks, without tracing and compiling."""

    def block(number: tf.Tensor) -> list[tf.Tensor]:
        rows = number * block_rows + tf.range(block_rows, dtype=tf.int64)
        return [tf.reshape(array, [-1])[-1] for array in candidate(rows)]

    dataset = tf.data.Dataset.range(blocks).map(block, num_parallel_calls=tf.data.AUTOTUNE).batch(blocks)
    iterator = iter(dataset)
    wall, cpu = time.perf_counter(), time.process_time()
    next(iterator)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short repeat of each")
    parser.add_argument("--block_rows", type=int, default=131_072)
    parser.add_argument("--features", type=int, default=1, help="above 1, only tapedist is measured")
    arguments = parser.parse_args()
    repeats, seconds = (1, 0.05) if arguments.quick else (9, 0.5)

    candidates: dict[str, Candidate] = {}
    if arguments.features == 1:
        candidates = {
            "philox_op": philox_op,
            "philox_one_array": _one_array(_philox),
            "threefry_one_array": _one_array(_threefry),
            "threefry_library_transform": threefry_library_transform,
            "threefry_int64_two_outputs": threefry_int64_two_outputs,
        }
    candidates["tapedist"] = _tapedist(arguments.features)

    blocks = {}
    for name, candidate in candidates.items():
        _seconds(candidate, arguments.block_rows, 4)  # Compiles.
        wall, _ = _seconds(candidate, arguments.block_rows, 16)
        blocks[name] = max(16, int(16 * seconds / wall))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            times[name].append(_seconds(candidate, arguments.block_rows, blocks[name]))
    for name, measured in times.items():
        rows = arguments.block_rows * blocks[name]
        rates = [rows / wall for wall, _ in measured]
        result = {
            "benchmark": "generation",
            "candidate": name,
            "features": arguments.features,
            "block_rows": arguments.block_rows,
            "rows_per_sec": round(statistics.median(rates)),
            "rows_per_sec_min": round(min(rates)),
            "rows_per_sec_max": round(max(rates)),
            "rows_per_cpu_sec": round(statistics.median(rows / cpu for _, cpu in measured)),
            "repeats": repeats,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
