"""The synthetic rows computed another way: NumPy, 64-bit integers, float64 functions, nothing of the package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MASK = np.uint64(0xFFFFFFFF)
_LOG = (
    -1.442694902420044, 0.7213528156280518, -0.48092323541641235, 0.3602396249771118,
    -0.2870987057685852, 0.24887686967849731, -0.23404234647750854, 0.14581164717674255,
)  # fmt: skip
_SIN = (1.5707963705062866, -0.645963728427887, 0.07968968152999878, -0.004673766437917948, 0.00015148513193707913)
_COS = (1.0, -0.23370060324668884, 0.01996905542910099, -0.0008941973210312426, 2.39127275563078e-05)


def threefry13(key: tuple[int, int], low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 with 13 rounds of uint64 arrays that hold 32-bit words."""
    k = [np.uint64(key[0]), np.uint64(key[1])]
    k.append(k[0] ^ k[1] ^ np.uint64(466688986))
    a, b = (low + k[0]) & _MASK, (high + k[1]) & _MASK
    for done, turn in enumerate([13, 15, 26, 6, 17, 29, 16, 24, 13, 15, 26, 6, 17], start=1):
        a = (a + b) & _MASK
        b = ((b << np.uint64(turn)) | (b >> np.uint64(32 - turn))) & _MASK
        b = b ^ a
        if done in (4, 8, 12):
            n = done // 4
            a = (a + k[n % 3]) & _MASK
            b = (b + k[(n + 1) % 3] + np.uint64(n)) & _MASK
    return a, b


def normals_of(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box and Muller in float64, from the two numbers that float32 holds: the uniform and the angle."""
    uniform = ((a >> np.uint64(1)).astype(np.float32) + np.float32(0.5)).astype(np.float64) / 2.0**31
    half_turn = b.astype(np.uint32).view(np.int32).astype(np.float32).astype(np.float64) / 2.0**31
    radius = np.sqrt(-2.0 * np.log(uniform))
    sign = np.where(a & np.uint64(1), -1.0, 1.0)
    # cos(pi v / 2) through the sine, which keeps its digits where the cosine vanishes.
    cosine = np.sin(np.pi / 2 * (1.0 - np.abs(half_turn)))
    return sign * radius * cosine, radius * np.sin(np.pi / 2 * half_turn)


def normals(seed: int, rows: np.ndarray, columns: int) -> np.ndarray:
    """Standard normals `[k, columns]`, float64, of the rows `[k]`."""
    rows = rows.astype(np.uint64)
    words = np.random.SeedSequence((seed, int.from_bytes(b"rows", "big"))).generate_state(columns + 1, np.uint32)
    result = np.empty((len(rows), columns + 1))
    for first in range(0, columns, 2):
        a, b = threefry13((words[first], words[first + 1]), rows & _MASK, rows >> np.uint64(32))
        result[:, first], result[:, first + 1] = normals_of(a, b)
    return result[:, :columns]


def linear_rows(
    seed: int, rows: np.ndarray, *, m: Sequence[float], c: float, mean: float, std: float, noise_std: float
) -> tuple[np.ndarray, np.ndarray]:
    """`(x, y)`, float64 `[k, d]` and `[k]`."""
    z = normals(seed, rows, len(m) + 1)
    x = mean + std * z[:, :-1]
    return x, x @ np.asarray(m) + c + noise_std * z[:, -1]


def _polynomial32(t: np.ndarray, coefficients: Sequence[float]) -> np.ndarray:
    result = np.full_like(t, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * t + np.float32(coefficient)
    return result


def normals32(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box and Muller by the published polynomials in float32, every operation rounded: the generator's own bits.

    Args:
        a: uint32 words of the radius and a sign.
        b: uint32 words of the angle.
    """
    f = np.float32
    uniform = (a >> np.uint32(1)).view(np.int32).astype(f) + f(0.5)
    bits = uniform.view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    t = (bits - (exponent << np.int32(23))).view(f) - f(1)
    minus_log2 = (np.int32(31) - exponent).astype(f) + t * _polynomial32(t, _LOG)
    radius = np.sqrt(minus_log2 * f(2 * np.log(2)))
    turn = b.view(np.int32).astype(f) * f(2.0**-31)
    square = turn * turn
    sine = turn * _polynomial32(square, _SIN)
    cosine = (f(1) - turn) * (f(1) + turn) * _polynomial32(square, _COS)
    first = ((radius * cosine).view(np.uint32) ^ (a << np.uint32(31))).view(f)
    return first, radius * sine


def linear_rows32(
    seed: int, rows: np.ndarray, *, m: Sequence[float], c: float, mean: float, std: float, noise_std: float
) -> tuple[np.ndarray, np.ndarray]:
    """`(x, y)`, float32 `[k, d]` and `[k]`: bit for bit what the source makes."""
    f, d, rows = np.float32, len(m), rows.astype(np.uint64)
    words = np.random.SeedSequence((seed, int.from_bytes(b"rows", "big"))).generate_state(d + 2, np.uint32)
    z = np.empty((len(rows), d + 2), f)
    for first in range(0, d + 1, 2):
        pair = threefry13((words[first], words[first + 1]), rows & _MASK, rows >> np.uint64(32))
        z[:, first], z[:, first + 1] = normals32(*(word.astype(np.uint32) for word in pair))
    x = z[:, :d] * f(std) + f(mean)
    y = np.full(len(rows), f(c))
    for weight, column in zip([*m, noise_std], [*x.T, z[:, d]], strict=True):
        y = y + f(weight) * column
    return x, y
