"""The sums of `moments.py` of a block in the memory of the host, by NumPy and the BLAS that it brings along.

There a product of a matrix with its own transpose takes little more than half the work of another, so that

    K_01 + K_10 = (slice_0 + slice_1) (slice_0 + slice_1)' - K_00 - K_11

saves a quarter of it. Whole numbers are the same whoever multiplies them. Blocks are summed side by side, each on one
core: a BLAS that shares a small product out waits for its threads for longer than it multiplies.

Legend: `d` features, `D = d + 1` columns (the features, then the target), `T` rows of a tile, `k` rows of a chunk.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tapedist.exact_arithmetic import SLICE_BITS, SLICE_ROWS

SLICES = 3
_HALF_BITS = 27
_CHUNK_NUMBERS = 2**17  # Of a slice: a MiB.
_LEAST_ROWS = 512
_MOST_SUMMED = SLICE_ROWS // 4  # Products of sums of two slices that a float64 sum holds.
_SPARSE = 1 / 8  # With fewer rows that hold a number, picking them out costs less than multiplying all.


def pairs(weighted: bool) -> list[tuple[int, int]]:
    """Which slices are multiplied; without weights each pair serves its mirror image too."""
    return [(a, b) for a in range(SLICES) for b in range(SLICES - a) if weighted or a <= b]


def block_sums(
    numbers: np.ndarray, count: int, rows: Sequence[np.ndarray], *, fast: bool, row_major: bool
) -> np.ndarray:
    """The integers `[2, M]` of `MomentSteps` of a block's first `count` rows.

    Args:
        numbers: `MomentUnits`: shifts, tops and weighted tops, `[3 D + 1]`.
        count: rows that are real.
        rows: `(x [n, d, T], y [n, T][, w [n, T]])`.
        fast: whether products may be rounded.
        row_major: whether `x` is `[n, T, d]`.
    """
    columns, weighted = len(numbers) // 3, len(rows) == 3
    products = np.zeros([len(pairs(weighted)), columns, columns], np.int64)
    of_columns = np.zeros([SLICES, columns + weighted], np.int64)
    x = rows[0].swapaxes(1, 2) if row_major else rows[0]
    with one_thread_each():
        chunks = _chunks((x, *rows[1:]), count, numbers)
        if fast:
            _add_rounded(products, of_columns, chunks)
        else:
            for left, right in chunks:
                _add_exact(products, of_columns, left, right)
    sums = np.concatenate([products.ravel(), of_columns.ravel(), [count]])
    return np.stack([sums >> _HALF_BITS, sums & ((1 << _HALF_BITS) - 1)])


def _chunks(rows: Sequence[np.ndarray], count: int, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Columns of the first `count` rows, shifted and in steps of their first slices.

    Yields:
        `(left, right)`: columns `[D, k]` on the right; on the left the same object, or, with weights, the columns times
        these and then the weights, `[D + 1, k]`.
    """
    x, y, *w = rows
    _, d, length = x.shape
    shifts, tops, weighted_tops = np.split(numbers[:, np.newaxis], [d + 1, 2 * d + 2])
    size = 2.0 ** (SLICE_BITS - 1)
    step = max(1, min(SLICE_ROWS, max(_LEAST_ROWS, _CHUNK_NUMBERS // (d + 1))) // length)
    for first in range(0, -(-count // length), step):
        part, real = slice(first, first + step), count - first * length
        z = np.empty([d + 1, y[part].size])
        z[:d].reshape(d, -1, length)[...] = x[part].swapaxes(0, 1)
        z[d] = y[part].ravel()
        z = z[:, :real]
        z -= shifts
        left = z
        if w:
            left = w[0][part].ravel()[:real] * np.concatenate([z, np.ones_like(z[:1])])
            left *= size / weighted_tops
        z *= size / tops
        yield left, z


def _slices(z: np.ndarray) -> list[np.ndarray]:
    """Columns, which are overwritten, as whole numbers: each slice in steps that are `2**21` times finer."""
    found = []
    for _ in range(SLICES - 1):
        found.append(np.rint(z))
        z -= found[-1]
        z *= 2.0**SLICE_BITS
    return [*found, np.rint(z, out=z)]


def _add_exact(products: np.ndarray, columns: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Adds a chunk's products of slices `[pairs, D, D]` and sums of slices `[3, D]`, with weights `[3, D + 1]`."""
    rights = _slices(right)
    lefts = rights if left is right else _slices(left)
    ones = np.ones(right.shape[1])
    for level, part in enumerate(lefts):
        columns[level] += (part @ ones).astype(np.int64)
    if left is not right or len(ones) > _MOST_SUMMED:
        products += [_product(lefts[a][: len(right)], rights[b]) for a, b in pairs(left is not right)]
        return
    first, second, third = rights
    both, squares, last = _product(first, first), _product(second, second), _product(first, third)
    second += first
    products += [both, _half(_product(second, second) - both - squares), last, squares]


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a b'` of whole numbers `[D, k]`, int64 `[D, D]`; of float32 rows the last slice is 0 in nearly all of them."""
    if a is not b:
        held = np.flatnonzero(b.any(axis=0))
        if len(held) < _SPARSE * b.shape[1]:
            a, b = a[:, held], b[:, held]
    return (a @ b.T).astype(np.int64)


def _add_rounded(products: np.ndarray, columns: np.ndarray, chunks: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    """What `_add_exact` adds for all chunks, of sums that are rounded as they come."""
    total, of_columns, weighted = np.zeros(products.shape[1:]), np.zeros(columns.shape[1]), False
    for left, right in chunks:
        total += left[: len(right)] @ right.T
        of_columns += left @ np.ones(right.shape[1])
        weighted = left is not right
    for sums, places in ((total, products[:2]), (of_columns, columns)):
        for place in places:
            whole = np.rint(sums)
            place += whole.astype(np.int64)
            sums = (sums - whole) * 2.0**SLICE_BITS
    if not weighted:
        products[1] = _half(products[1])


def _half(symmetric: np.ndarray) -> np.ndarray:
    """What adds up to `symmetric` `[D, D]` with its own transpose; the diagonal's numbers are even."""
    return np.triu(symmetric, 1) + np.diag(np.diag(symmetric) // 2)


_products_under_way = 0
_threads_before = 0
_lock = threading.Lock()


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Products of matrices inside take one thread each, where NumPy's BLAS is OpenBLAS."""
    global _products_under_way, _threads_before
    if not _openblas():
        yield
        return
    get, put = _openblas()
    with _lock:
        if not _products_under_way:
            _threads_before = get()
            put(1)
        _products_under_way += 1
    try:
        yield
    finally:
        with _lock:
            _products_under_way -= 1
            if not _products_under_way:
                put(_threads_before)


@functools.cache
def _openblas() -> tuple[Any, ...]:
    """What tells and sets the threads of NumPy's OpenBLAS, by the names of wheels and of distributions; or nothing."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(np._core._multiarray_umath.__file__)  # type: ignore[attr-defined]
        for name in ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "openblas_{}_num_threads"):
            if hasattr(library, name.format("set")):
                return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return ()
