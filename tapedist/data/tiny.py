"""Numbers too small to train on, which become 0: units of computing treat them in different ways."""

from __future__ import annotations

from typing import Any

import numpy as np

# The least magnitude of each type that is not 0: float32's denormals go; of float64 so much that products are normal.
LEAST = {"float32": 2.0**-126, "float64": 2.0**-250}
# From here on float64 rounds up to the least float32. A thread of TensorFlow, which flushes denormals, may round to 0
# what lies between; so it is moved to where there is nothing to round.
ROUNDS_UP = 2.0**-126 - 2.0**-150

_PIECE = 16_384  # Temporaries that stay in the cache.


def flushed(values: np.ndarray, dtype: Any) -> np.ndarray:
    """`values` rounded to `dtype`, with 0 for what is then smaller than the type's least magnitude."""
    dtype = np.dtype(dtype)
    least, sizes = LEAST[dtype.name], np.abs(values)
    if (sizes < least).any():
        below = ROUNDS_UP if values.dtype.itemsize > dtype.itemsize else least
        values = np.where(sizes < least, np.where(sizes < below, 0.0, np.sign(values) * least), values)
    with np.errstate(over="ignore"):  # A loss that is not finite is told by name.
        return values.astype(dtype, copy=False)


def holds_tiny(values: np.ndarray) -> bool:
    """Whether a number other than 0 is below the least magnitude of any type."""
    if not values.size or values.min() >= LEAST["float32"] or values.max() <= -LEAST["float32"]:
        return False
    flat = values.reshape(-1)
    for first in range(0, len(flat), _PIECE):
        sizes = np.abs(flat[first : first + _PIECE])
        if sizes.min() < LEAST["float32"] and ((sizes < LEAST["float32"]) & (sizes > 0)).any():
            return True
    return False
