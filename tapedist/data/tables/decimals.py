"""Decimal columns of Arrow as float64: each cell the number nearest to it, which is what its text would give."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

# Powers of ten up to this one are exact in float64, and a quotient of two exact numbers is rounded once.
_EXACT_POWER = 22


def decimals_to_floats(column: pa.Array) -> np.ndarray:
    """A decimal column as float64 `[n]`; NaN where a cell is null, or an integer that float64 cannot hold.

    Arrow's own cast multiplies by a rounded power of ten, and is off by a unit in the last place for a seventh of all
    prices.

    Args:
        column: of any decimal type. Without places behind the point its cells are integers, as in text.
    """
    scale, rows = column.type.scale, len(column)
    if not rows:
        return np.zeros(0)
    unscaled, fits = _unscaled(column)
    easy = fits & (np.abs(unscaled) <= 2**53) if abs(scale) <= _EXACT_POWER else np.zeros(rows, bool)
    power = np.float64(10.0) ** abs(scale) if abs(scale) <= _EXACT_POWER else np.float64(1)
    numbers = unscaled / power if scale > 0 else unscaled * power
    hard = ~easy
    if column.null_count:
        null = column.is_null().to_numpy(zero_copy_only=False)
        hard &= ~null
        numbers[null] = np.nan
    if hard.any():
        numbers[hard] = _by_text(column.filter(pa.array(hard)))
    return numbers


def _unscaled(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The cells as integers of the last place, int64 `[n]`, and which of them int64 can hold."""
    words = column.type.bit_width // 64
    kind = "<i8" if words else "<i4"
    raw = np.frombuffer(column.buffers()[1], kind)
    stored = raw[column.offset * max(1, words) :][: len(column) * max(1, words)].reshape(len(column), -1)
    lowest = stored[:, 0].astype(np.int64)
    # The higher words of a small number repeat its sign.
    return lowest, (stored[:, 1:] == (lowest >> 63)[:, np.newaxis]).all(axis=1)


def _by_text(column: pa.Array) -> np.ndarray:
    text = column.cast(pa.string())
    numbers = text.cast(pa.float64()).to_numpy(zero_copy_only=False)
    if column.type.scale:
        return numbers
    exact = np.array([int(number) == int(word) for number, word in zip(numbers, text.to_pylist(), strict=True)])
    return np.where(exact, numbers, np.nan)
