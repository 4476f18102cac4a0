"""Counter-based normal numbers: normal `j` of row `i` is a function of `(seed, i, j)` and of nothing else.

Legend: `k` rows of a call, `C` normals (columns) per row, `P = ceil(C / 2)` pairs of columns.

One evaluation of Threefry-2x32 with 13 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011; 13 is the fewest with which its authors know of no statistical flaw) turns a 64-bit row number into
two 32-bit words, and Box and Muller's transform (1958) turns the words into two independent normals. Each pair of
columns has its own key.

Why this one. Rows with two normals per CPU second, side by side in a parallel `tf.data` map (one feature, blocks of
131,072 rows, medians; `scripts/bench/generation.py`), in units of TensorFlow's own Philox operation, 43 M/s there:

    Philox operation                                                  1
    Threefry, TensorFlow's log, cosine and sine                       0.8
    Threefry, the polynomials below                                   2.5
    the same, row numbers as 32-bit words, both normals as one array  6
    the same with Philox-2x32, 7 rounds                               6.5

* The transform, not the bits, is what costs. Short polynomials replace the library's log, sine and cosine. Taking the
  angle from a half turn and the sign from a bit that the radius leaves over needs no quadrants and no selects.
* A 64-bit value in the loop makes the compiler halve its vectors: row numbers come as pairs of 32-bit words.
* XLA puts two float arrays into two loops that each repeat the rounds: both normals leave as one complex number.
* Philox-2x32 is a little faster, but its key has 32 bits: too few for every pair of columns of every seed.

Every product that is added to something is pinned (see `pinned`): it is rounded before, with or without instructions
that would not. So a row's bits are the same on every machine, and those of the formulas in NumPy's float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.data.synthetic_identity import VERSION  # noqa: F401  (raised by any change that changes rows)

# No normal is larger: the greatest radius, of a first word of 0 or 1, times the greatest sine, 1 + 2**-23. All words
# were tried; a test tries those that matter.
MOST = float(np.float32(6.660437107086182) * np.float32(1 + 2.0**-23))
# What ranges of rows are made of: a number of few digits that is not below it, as `docs/arithmetic.md` has it.
BOUND = 6.6875
ROUNDS = 13
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = 0x1BD11BDA
_KEY_DOMAIN = 0x726F7773  # "rows": keeps these keys apart from other uses of the same seed.

# Minimax polynomials, lowest power first; relative errors 2e-7, 6e-9 and 4e-9, under half a unit of float32's last
# place once the square root has halved the first.
_LOG = (
    -1.442694902420044, 0.7213528156280518, -0.48092323541641235, 0.3602396249771118,
    -0.2870987057685852, 0.24887686967849731, -0.23404234647750854, 0.14581164717674255,
)  # -log2(1 + t) / t for 1 + t from sqrt(1/2) to sqrt(2)  # fmt: skip
_SIN = (1.5707963705062866, -0.645963728427887, 0.07968968152999878, -0.004673766437917948, 0.00015148513193707913)
_COS = (1.0, -0.23370060324668884, 0.01996905542910099, -0.0008941973210312426, 2.39127275563078e-05)
_SQRT_HALF_BITS = 0x3F3504F3


def pair_keys(seed: int, num_columns: int) -> np.ndarray:
    """Threefry keys, uint32 `[P, 2]`, of the pairs of columns; a pair's key does not depend on how many there are.

    Args:
        seed: any non-negative int.
        num_columns: `C`, at least 1.
    """
    pairs = -(-num_columns // 2)
    return np.random.SeedSequence((seed, _KEY_DOMAIN)).generate_state(2 * pairs, np.uint32).reshape(pairs, 2)


def threefry(key0: Any, key1: Any, word0: Any, word1: Any) -> tuple[Any, Any]:
    """Encrypts the 64-bit counters `(word0, word1)` under the keys; uint32 tensors of broadcastable shapes."""
    keys = (key0, key1, tf.bitwise.bitwise_xor(tf.bitwise.bitwise_xor(key0, key1), tf.constant(PARITY, tf.uint32)))
    word0, word1 = word0 + key0, word1 + key1
    for step in range(ROUNDS):
        word0 += word1
        word1 = tf.bitwise.bitwise_xor(word0, _rotate(word1, ROTATIONS[step % 8]))
        if step % 4 == 3:
            number = step // 4 + 1
            word0 += keys[number % 3]
            word1 += keys[(number + 1) % 3] + tf.constant(number, tf.uint32)
    return word0, word1


def pinned(product: Any, zero: Any) -> Any:
    """`product`, float32, but a compiler cannot fuse it with the addition behind it.

    Args:
        product: any tensor.
        zero: int32 0, an argument of the compiled function: a constant would be folded away.
    """
    return tf.bitcast(tf.bitwise.bitwise_xor(tf.bitcast(product, tf.int32), zero), tf.float32)


def box_muller(word0: Any, word1: Any, zero: Any) -> tuple[Any, Any]:
    """Two independent standard normals, float32, from two independent uniform words, uint32; `zero` as in `pinned`.

    The upper 31 bits of `word0` are the radius; its smallest uniform is 2**-32, so normals reach 6.6 standard
    deviations. Its lowest bit is the sign of the first normal, and `word1` is the angle within a half turn.
    """
    uniform = tf.cast(tf.bitcast(_shift_right(word0, 1), tf.int32), tf.float32) + 0.5  # Times 2**31.
    bits = tf.bitcast(uniform, tf.int32)
    exponent = _shift_right(bits - _SQRT_HALF_BITS, 23)
    t = tf.bitcast(bits - tf.bitwise.left_shift(exponent, 23), tf.float32) - 1.0
    minus_log2 = tf.cast(31 - exponent, tf.float32) + pinned(t * _polynomial(t, _LOG, zero), zero)
    radius = tf.sqrt(minus_log2 * np.float32(2 * np.log(2)))

    turn = tf.cast(tf.bitcast(word1, tf.int32), tf.float32) * np.float32(2**-31)
    square = turn * turn
    sine = turn * _polynomial(square, _SIN, zero)
    cosine = (1.0 - turn) * (1.0 + turn) * _polynomial(square, _COS, zero)
    sign = tf.bitwise.left_shift(word0, tf.constant(31, tf.uint32))
    signed = tf.bitwise.bitwise_xor(tf.bitcast(radius * cosine, tf.uint32), sign)
    return tf.bitcast(signed, tf.float32), radius * sine


def normal_pairs(low: Any, high: Any, keys: Any, zero: Any) -> tuple[Any, Any]:
    """Both normals of every pair of columns, to be traced into one compiled function.

    Args:
        low: uint32 `[k]`, the lower words of row numbers.
        high: uint32 `[k]`, the upper words.
        keys: uint32 `[P, 2]` from `pair_keys`; `k` may be several axes, each of which needs one more of `keys`.
        zero: as in `pinned`.

    Returns:
        Two float32 tensors `[P, k]`: columns 0, 2, 4, ... and columns 1, 3, 5, ... Combine them into one array before
        they leave the compiled function, or XLA computes the words twice.
    """
    return box_muller(*threefry(keys[:, 0:1], keys[:, 1:2], low, high), zero)


def _rotate(words: Any, bits: int) -> Any:
    left = tf.bitwise.left_shift(words, tf.constant(bits, tf.uint32))
    return tf.bitwise.bitwise_or(left, _shift_right(words, 32 - bits))


def _shift_right(values: Any, bits: int) -> Any:
    return tf.bitwise.right_shift(values, tf.constant(bits, values.dtype))


def _polynomial(t: Any, coefficients: tuple[float, ...], zero: Any) -> Any:
    """Horner's rule."""
    result = tf.constant(coefficients[-1], tf.float32)
    for coefficient in coefficients[-2::-1]:
        result = pinned(result * t, zero) + np.float32(coefficient)
    return result
