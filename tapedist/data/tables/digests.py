"""The digest of a table's numbers, taken beside the reading."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np


class ColumnDigests:
    """SHA-256 of column names and of each column's little-endian float64 bytes in row order.

    Columns are hashed side by side in threads, the last chunk's while the next is decoded; which the interpreter's lock
    does not hinder.

    Args:
        names: of the columns.
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._hashes = [hashlib.sha256() for _ in names]
        self._pool = concurrent.futures.ThreadPoolExecutor(
            len(os.sched_getaffinity(0)), thread_name_prefix="tapedist-hash"
        )
        self._under_way: list[concurrent.futures.Future[None]] = []

    def update(self, columns: Sequence[np.ndarray]) -> None:
        """Adds rows; `columns` must not be changed afterwards."""
        self._settle()
        pairs = zip(self._hashes, columns, strict=True)
        self._under_way = [self._pool.submit(_add, digest, column) for digest, column in pairs]

    def hexdigest(self) -> str:
        """The digest of all; nothing may be added any more."""
        self._settle()
        self._pool.shutdown()
        parts = [
            hashlib.sha256(name.encode()).digest() + digest.digest()
            for name, digest in zip(self._names, self._hashes, strict=True)
        ]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def _settle(self) -> None:
        for future in self._under_way:
            future.result()


def _add(digest: Any, column: np.ndarray) -> None:
    digest.update(np.ascontiguousarray(column, "<f8").data)
