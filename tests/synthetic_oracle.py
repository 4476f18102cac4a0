"""The synthetic rows computed another way: NumPy, 64-bit integers, float64 functions, nothing of the package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MASK = np.uint64(0xFFFFFFFF)


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
