"""The synthetic rows: normal `j` of row `i` is a function of `(seed, i, j)` alone, in float32.

Every operation is rounded on its own, products before they are added.

Legend: `k` rows, `C` normals of a row, in pairs.
"""

from __future__ import annotations

import numpy as np

from tapedist.reference.exact import SLACK
from tapedist.reference.rows import Ranges

LARGEST_NORMAL = 6.6875  # The radius ends at sqrt(64 * log(2)) = 6.6604, and no factor of it is above 1 + 2**-20.
KEY_DOMAIN = 0x726F7773
PARITY = 0x1BD11BDA
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
SQRT_HALF_BITS = 0x3F3504F3
# Lowest power first: -log2(1 + t) / t, sin(pi t / 2) / t and cos(pi t / 2) / (1 - t**2), the last two in t**2.
LOG = (
    -1.442694902420044, 0.7213528156280518, -0.48092323541641235, 0.3602396249771118,
    -0.2870987057685852, 0.24887686967849731, -0.23404234647750854, 0.14581164717674255,
)  # fmt: skip
SIN = (1.5707963705062866, -0.645963728427887, 0.07968968152999878, -0.004673766437917948, 0.00015148513193707913)
COS = (1.0, -0.23370060324668884, 0.01996905542910099, -0.0008941973210312426, 2.39127275563078e-05)


def threefry(key: np.ndarray, word0: np.ndarray, word1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 with 13 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011); all uint32."""
    keys = (key[0:1], key[1:2], key[0:1] ^ key[1:2] ^ np.uint32(PARITY))
    word0, word1 = word0 + keys[0], word1 + keys[1]
    for number in range(13):
        word0 = word0 + word1
        bits = ROTATIONS[number % 8]
        word1 = word0 ^ ((word1 << np.uint32(bits)) | (word1 >> np.uint32(32 - bits)))
        if number % 4 == 3:
            block = number // 4 + 1
            word0 = word0 + keys[block % 3]
            word1 = word1 + (keys[(block + 1) % 3] + np.uint32(block))
    return word0, word1


def polynomial(t: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """Horner's rule in float32."""
    result = np.full(t.shape, coefficients[-1], np.float32)
    for coefficient in coefficients[-2::-1]:
        result = result * t + np.float32(coefficient)
    return result


def box_muller(word0: np.ndarray, word1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two independent standard normals, float32, from two uniform words (Box and Muller 1958)."""
    one = np.float32(1.0)
    uniform = (word0 >> np.uint32(1)).astype(np.float32) + np.float32(0.5)  # Times 2**31.
    bits = uniform.view(np.int32)
    exponent = (bits - np.int32(SQRT_HALF_BITS)) >> np.int32(23)
    t = (bits - (exponent << np.int32(23))).view(np.float32) - one
    minus_log2 = (np.int32(31) - exponent).astype(np.float32) + t * polynomial(t, LOG)
    radius = np.sqrt(minus_log2 * np.float32(2 * np.log(2)))

    turn = word1.view(np.int32).astype(np.float32) * np.float32(2**-31)
    square = turn * turn
    sine = turn * polynomial(square, SIN)
    cosine = ((one - turn) * (one + turn)) * polynomial(square, COS)
    signed = (radius * cosine).view(np.uint32) ^ (word0 << np.uint32(31))
    return signed.view(np.float32), radius * sine


def normals(seed: int, rows: np.ndarray, columns: int) -> np.ndarray:
    """Standard normals, float32 `[k, C]`, of rows by their numbers, int64 `[k]`."""
    pairs = -(-columns // 2)
    keys = np.random.SeedSequence((seed, KEY_DOMAIN)).generate_state(2 * pairs, np.uint32).reshape(pairs, 2)
    numbers = np.asarray(rows).astype(np.uint64)
    low, high = (numbers & np.uint64(2**32 - 1)).astype(np.uint32), (numbers >> np.uint64(32)).astype(np.uint32)
    found = [z for key in keys for z in box_muller(*threefry(key, low, high))]
    return np.stack(found[:columns], axis=1)


def synthetic_rows(
    seed: int, rows: np.ndarray, *, m: tuple[float, ...], c: float, mean: float, std: float, noise_std: float
) -> tuple[np.ndarray, np.ndarray]:
    """`(x [k, d], y [k])`, float32: `x = std * z + mean`, and `y` summed from left to right, the noise last."""
    d = len(m)
    z = normals(seed, rows, d + 1)
    x = np.float32(std) * z[:, :d] + np.float32(mean)
    y = np.full(len(z), c, np.float32)
    for j in range(d):
        y = y + np.float32(m[j]) * x[:, j]
    return x, y + np.float32(noise_std) * z[:, d]


def synthetic_ranges(*, m: tuple[float, ...], c: float, mean: float, std: float, noise_std: float) -> Ranges:
    """Ranges that hold every synthetic row, of both splits, by the settings alone."""
    center, spread, bias, noise = (float(np.float32(v)) for v in (mean, std, c, noise_std))
    weights = [float(np.float32(v)) for v in m]
    radius = (abs(spread) * LARGEST_NORMAL) * SLACK + abs(center) * 2.0**-20
    middle, reach, size = bias, 0.0, abs(bias)
    for weight in weights:
        middle = middle + weight * center
        reach = reach + abs(weight) * radius
        size = size + abs(weight) * (abs(center) + radius)
    reach = reach + (abs(noise) * LARGEST_NORMAL) * SLACK
    size = size + abs(noise) * LARGEST_NORMAL
    reach = reach + size * ((len(weights) + 2) * 2.0**-20)
    low, high = [center - radius] * len(weights), [center + radius] * len(weights)
    return Ranges(np.array([*low, middle - reach]), np.array([*high, middle + reach]), None)
