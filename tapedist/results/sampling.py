"""Which rows a picture shows, when there are more than it can: always the same ones."""

from __future__ import annotations

import numpy as np


def sampled(count: int, most: int) -> np.ndarray:
    """Up to `most` of `count` indices, drawn at random from a fixed seed, in ascending order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False, shuffle=False))


def thinned(count: int, most: int) -> np.ndarray:
    """Up to `most` of `count` indices, evenly spaced, with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)) if count else np.arange(0)


def caption(drawn: int, total: int) -> str:
    """How many rows are shown, as in `showing 5,000 of 8,000,000 rows`."""
    return f"{drawn:,} rows" if drawn == total else f"showing {drawn:,} of {total:,} rows"
