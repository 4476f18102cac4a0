"""Rows in the layout, the units and the type of training.

Memory that is touched for the first time costs more than the arithmetic on it. So a few thousand rows at a time are
converted in a piece of memory that stays in the cache, and written once into the result.

Legend: `k` rows, `d` features, `T` rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

# Numbers of rows: a range, which is the fastest to follow, or int64 `[k]`.
RowNumbers = range | np.ndarray

PIECE_BYTES = 2**18
_ALIGNMENT = 64  # TensorFlow takes over arrays that begin there and copies others.
_FEW_FEATURES = 32


class Units(NamedTuple):
    """`(x - center) * factor` and `y - target_center`, in float64.

    Attributes:
        center: float64 `[d]`.
        factor: float64 `[d]`.
        target_center: a float.
    """

    center: np.ndarray
    factor: np.ndarray
    target_center: float


def as_array(rows: RowNumbers) -> np.ndarray:
    """Row numbers as int64 `[k]`: NumPy itself would ask a range for each of them."""
    return np.arange(rows.start, rows.stop) if isinstance(rows, range) else rows


def piece_rows(num_columns: int) -> int:
    """Rows of float64 columns that stay in the cache."""
    return max(64, PIECE_BYTES // (8 * max(1, num_columns)))


def convert(
    out: Sequence[np.ndarray], read: Callable[[RowNumbers], Sequence[np.ndarray]], rows: RowNumbers, *,
    units: Units | None, weight_exponent: int,
) -> None:  # fmt: skip
    """Writes rows into `out`, piece by piece; see `Source.read_into`, whose arguments these are.

    Args:
        out: where to.
        read: `rows -> (x [k, d], y [k][, w [k]])`.
        rows: their numbers.
        units: of the result.
        weight_exponent: weights are divided by 2 to the power of it.
    """
    (x, *rest), num_features = out, out[0].shape[-1 if out[0].ndim == 2 else 1]
    # Float rows that only change their type need no piece of memory in between.
    plain = units is None and x.ndim == 2 and isinstance(rows, range)
    step = len(rows) if plain else piece_rows(num_features)
    with np.errstate(over="ignore"):  # A loss that is not finite is told by name.
        for first in range(0, len(rows), step or 1):
            part = slice(first, min(first + step, len(rows)))
            features, y, *w = read(rows[part])
            if units:
                features = _in_units(features, units)
                y = np.subtract(y, units.target_center, dtype=np.float64)
            if x.ndim == 3:
                write_tiles(x, first, features.T)
            else:
                x[part] = features
            w = [np.ldexp(weights.astype(np.float64), -weight_exponent) for weights in w]
            for column, values in zip(rest, (y, *w), strict=True):
                column[part] = values


def convert_matrix(
    out: Sequence[np.ndarray], take: Callable[[RowNumbers], np.ndarray], rows: RowNumbers, *, units: Units | None,
    weight_exponent: int,
) -> None:  # fmt: skip
    """`convert` where a row's numbers lie side by side: `take` gives `[k, c]`, features, target and any weight.

    Shifted and scaled as one long row: loops over the few features of each would be short.
    """
    (x, *rest), num_features = out, out[0].shape[-1 if out[0].ndim == 2 else 1]
    shape = (min(len(rows), piece_rows(2 * (num_features + len(rest)))), num_features + len(rest))
    if units:
        weight = [0.0] * (len(rest) - 1)
        center = np.tile(np.concatenate([units.center, [units.target_center], weight]), (shape[0], 1))
        factor = np.tile(np.append(units.factor, [1.0] * len(rest)), (shape[0], 1))
        buffer = np.empty(shape)
    with np.errstate(over="ignore"):  # A loss that is not finite is told by name.
        for first in range(0, len(rows), shape[0] or 1):
            part = slice(first, min(first + shape[0], len(rows)))
            found = take(rows[part])
            if units:
                found = np.subtract(found, center[: len(found)], out=buffer[: len(found)])
                found *= factor[: len(found)]
            if x.ndim == 3:
                write_tiles(x, first, found[:, :num_features].T)
            else:
                x[part] = found[:, :num_features]
            rest[0][part] = found[:, num_features]
            if len(rest) > 1:
                rest[1][part] = np.ldexp(found[:, -1], -weight_exponent)


def _in_units(x: np.ndarray, units: Units) -> np.ndarray:
    """Features `[k, d]` in other units, float64; column by column where the features of a row make short loops."""
    if x.shape[1] >= _FEW_FEATURES:
        found = np.subtract(x, units.center, dtype=np.float64)
        found *= units.factor
        return found
    columns = np.empty(x.shape[::-1])
    np.subtract(x.T, units.center[:, np.newaxis], out=columns)
    columns *= units.factor[:, np.newaxis]
    return columns.T


def write_tiles(x: np.ndarray, first: int, columns: np.ndarray) -> None:
    """Writes rows `first ..` of feature-major tiles.

    Args:
        x: `[tiles, d, T]`: the rows of one tile go before those of the next.
        first: the first row.
        columns: `[d, k]`, the features of the rows.
    """
    (_, d, size), (_, k) = x.shape, columns.shape
    done = 0
    while done < k:
        tile, inside = divmod(first + done, size)
        whole = (k - done) // size if not inside else 0
        rows = whole * size or min(size - inside, k - done)
        part = columns[:, done : done + rows]
        if whole:
            x[tile : tile + whole] = part.reshape(d, whole, size).swapaxes(0, 1)
        else:
            x[tile, :, inside : inside + rows] = part
        done += rows


def empty_rows(k: int, d: int, *, weighted: bool, dtype: Any) -> tuple[np.ndarray, ...]:
    """`(x [k, d], y [k][, w [k]])` to be written into, aligned for TensorFlow."""
    return empty((k, d), dtype), *(empty((k,), dtype) for _ in range(1 + weighted))


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array to be written into, aligned for TensorFlow."""
    count, item = int(np.prod(shape)), np.dtype(dtype).itemsize
    flat = np.empty(count * item + _ALIGNMENT, np.uint8)
    first = -flat.ctypes.data % _ALIGNMENT
    return flat[first : first + count * item].view(dtype).reshape(shape)
