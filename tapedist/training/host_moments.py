"""The sums of `moments.py` over a block in host memory, by NumPy and its BLAS.

A product of a matrix with its own transpose takes little more than half the work of another, so that

    K_01 + K_10 = (slice_0 + slice_1) (slice_0 + slice_1)' - K_00 - K_11

saves a quarter of it. Products of whole numbers are exact under any BLAS. Blocks are summed in parallel, each on one
core: a BLAS that splits a small product among threads waits for them longer than it multiplies.

Legend: `d` features, `D = d + 1` columns (the features, then the target), `T` rows of a tile, `k` rows of a chunk.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tapedist.data.exact_arithmetic import SLICE_BITS, SLICE_ROWS

SLICES = 3
_HALF_BITS = 27
_CHUNK_NUMBERS = 2**17  # Of a slice, one MiB: 2**14 to 2**16 and 2**18 are slower.
_LEAST_ROWS = 512
_WIDE = 32  # From so many features on, NumPy's inner loop over the features of a row is long enough.
_MOST_SUMMED = SLICE_ROWS // 4  # Sums of two slices have a bit more, and so their products two: a quarter of the rows.
_SPARSE = 1 / 8  # If fewer rows are not 0, selecting them costs less than multiplying all.


def pairs(weighted: bool) -> list[tuple[int, int]]:
    """The pairs of slices that are multiplied; without weights a pair stands for its mirror image, too."""
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
    length = x.shape[2]
    tiles = max(1, min(SLICE_ROWS, max(_LEAST_ROWS, _CHUNK_NUMBERS // columns)) // length)
    # About a MiB of numbers in a chunk, and at most `SLICE_ROWS` rows, up to which products are exact.
    room = _Room((columns + weighted) * tiles * length)
    with one_thread_each():
        chunks = _chunks((x, *rows[1:]), count, numbers, tiles, room)
        scales = _scales(numbers, weighted)
        if fast:
            _add_rounded(products, of_columns, chunks, scales)
        else:
            _add_exact(products, of_columns, chunks, scales, room)
    sums = np.concatenate([products.ravel(), of_columns.ravel(), [count]])
    # Halves as those of `exact.halves`: blocks, replicas and checkpoints add them.
    return np.stack([sums >> _HALF_BITS, sums & ((1 << _HALF_BITS) - 1)])


class _Room:
    """Thread-local memory for a chunk's columns and slices.

    Fresh arrays for each chunk take longer: the system maps their pages one by one.

    Args:
        size: numbers of an array, at most.
    """

    _kept = threading.local()

    def __init__(self, size: int):
        if getattr(self._kept, "size", 0) < size:
            self._kept.size, self._kept.arrays = size, {}

    def array(self, name: str, shape: tuple[int, int], *, by_row: bool) -> np.ndarray:
        """A float64 array `[columns, k]` to be written into, in the memory of the last one of this name.

        Args:
            name: what the array is for.
            shape: its shape.
            by_row: whether a row's numbers lie together.
        """
        flat = self._kept.arrays.get(name)
        if flat is None:
            flat = self._kept.arrays[name] = np.empty(self._kept.size)
        flat = flat[: shape[0] * shape[1]]
        return flat.reshape(shape[::-1]).T if by_row else flat.reshape(shape)


def _scales(numbers: np.ndarray, weighted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Powers of two `[D, 1]` that scale the left and the right columns to steps of the first slice."""
    _, tops, weighted_tops = np.split(numbers[:, np.newaxis], [len(numbers) // 3, 2 * (len(numbers) // 3)])
    size = 2.0 ** (SLICE_BITS - 1)
    return size / (weighted_tops if weighted else tops), size / tops


def _chunks(
    rows: Sequence[np.ndarray], count: int, numbers: np.ndarray, step: int, room: _Room
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Columns of the first `count` rows, shifted, of `step` tiles at a time.

    Yields:
        `(left, right)`: columns `[D, k]` on the right; on the left the same object, or, with weights, the columns times
        these and then the weights, `[D + 1, k]`.
    """
    x, y, *w = rows
    _, d, length = x.shape
    shifts = numbers[: d + 1]
    for first in range(0, -(-count // length), step):
        part, real = slice(first, first + step), count - first * length
        # Columns keep the layout of wide rows, because to transpose them costs more than a BLAS that reads rows.
        by_row = d >= _WIDE and x.strides[1] == x.itemsize
        z = room.array("right", (d + 1, y[part].size), by_row=by_row)
        if by_row:
            np.subtract(x[part].swapaxes(1, 2).reshape(-1, d), shifts[:d], out=z[:d].T)
        else:
            np.subtract(x[part].swapaxes(0, 1), shifts[:d, np.newaxis, np.newaxis], out=z[:d].reshape(d, -1, length))
        np.subtract(y[part].ravel(), shifts[d], out=z[d])
        z = z[:, :real]
        left = z
        if w:
            left = room.array("left", (d + 2, z.shape[1]), by_row=by_row)
            weights = w[0][part].ravel()[:real]
            np.multiply(weights, z, out=left[: d + 1])
            left[d + 1] = weights
        yield left, z


class _Slice(NamedTuple):
    """Whole numbers `[D, k]` of some columns, in the rows `held` or in all; in other rows they are 0."""

    numbers: np.ndarray
    held: np.ndarray | None = None


def _slices(z: np.ndarray, scale: np.ndarray, room: _Room, side: str) -> list[_Slice]:
    """Columns, which are overwritten, as whole numbers: each slice in steps that are `2**21` times finer."""
    z *= scale
    found = []
    for number in range(SLICES - 1):
        part = room.array(f"{side} {number}", z.shape, by_row=z.strides[0] < z.strides[1])
        # After the scale, the multiples of a grid are whole numbers, and `rint` is faster here than a magic constant.
        np.rint(z, out=part)
        z -= part
        z *= 2.0**SLICE_BITS
        found.append(_Slice(part))
    # A float32 number has 24 bits, of which the first two slices hold 42: nearly all rows have a third slice of 0.
    held = np.flatnonzero(z.any(axis=0))
    if len(held) < _SPARSE * z.shape[1]:
        return [*found, _Slice(np.rint(z[:, held]), held)]
    return [*found, _Slice(np.rint(z, out=z))]


def _add_exact(
    products: np.ndarray,
    columns: np.ndarray,
    chunks: Iterator[tuple[np.ndarray, np.ndarray]],
    scales: tuple[np.ndarray, np.ndarray],
    room: _Room,
) -> None:
    """Adds the products of slices `[pairs, D, D]` and sums of slices `[3, D]`, with weights `[3, D + 1]`."""
    for left, right in chunks:
        rights = _slices(right, scales[1], room, "right")
        lefts = rights if left is right else _slices(left, scales[0], room, "left")
        for level, part in enumerate(lefts):
            # Of whole numbers, so that the BLAS may add them in any order.
            columns[level] += (part.numbers @ np.ones(part.numbers.shape[1])).astype(np.int64)
        if left is not right or right.shape[1] > _MOST_SUMMED:
            count = len(right)
            products += [_product(lefts[a], rights[b])[:count] for a, b in pairs(left is not right)]
            continue
        first, second, third = rights
        both, squares, last = _product(first, first), _product(second, second), _product(first, third)
        # In place: the second slice is not needed any more.
        second.numbers[...] += first.numbers
        products += [both, _half(_product(second, second) - both - squares), last, squares]


def _product(a: _Slice, b: _Slice) -> np.ndarray:
    """`a b'`, int64 `[D, D]`; at least one of them has all rows."""
    left = a.numbers if b.held is None else a.numbers[:, b.held]
    right = b.numbers if a.held is None else b.numbers[:, a.held]
    return (left @ right.T).astype(np.int64)


def _add_rounded(
    products: np.ndarray,
    columns: np.ndarray,
    chunks: Iterator[tuple[np.ndarray, np.ndarray]],
    scales: tuple[np.ndarray, np.ndarray],
) -> None:
    """Adds what `_add_exact` adds, with rounded products."""
    total, of_columns, weighted = np.zeros(products.shape[1:]), np.zeros(columns.shape[1]), False
    for left, right in chunks:
        total += left[: len(right)] @ right.T  # The last row on the left are the weights.
        of_columns += left @ np.ones(right.shape[1])
        weighted = left is not right
    left_scale, right_scale = scales
    total *= left_scale[: len(total)] * right_scale.T
    of_columns *= left_scale[:, 0]
    # As integers of the same units, in the first two of the places, so that all that follows is the same code.
    for sums, places in ((total, products[:2]), (of_columns, columns)):
        for place in places:
            whole = np.rint(sums)
            place += whole.astype(np.int64)
            sums = (sums - whole) * 2.0**SLICE_BITS
    if not weighted:
        products[1] = _half(products[1])


def _half(symmetric: np.ndarray) -> np.ndarray:
    """The upper triangle `h` with `h + h' = symmetric` `[D, D]`, whose diagonal is even."""
    return np.triu(symmetric, 1) + np.diag(np.diag(symmetric) // 2)


_products_under_way = 0
_threads_before = 0
_lock = threading.Lock()


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """A context in which NumPy's products of matrices use one thread each, if its BLAS is OpenBLAS."""
    # The setting is the process's, so threads of blocks that overlap are counted: the first sets it, the last restores.
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
    """The getter and the setter of OpenBLAS' number of threads, by their names in wheels and distributions, or `()`."""
    with contextlib.suppress(OSError, AttributeError):
        # NumPy's extension is linked to its OpenBLAS, so that symbols are found through it wherever that library lies.
        library = ctypes.CDLL(np._core._multiarray_umath.__file__)  # type: ignore[attr-defined]
        for name in ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "openblas_{}_num_threads"):
            if hasattr(library, name.format("set")):
                return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return ()
