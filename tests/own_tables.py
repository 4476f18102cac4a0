"""One small table in every format, for tests that train on it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

NAMES = ("area", "rooms", "age", "price", "times")


def columns(rows: int = 700, seed: int = 3) -> dict[str, np.ndarray]:
    """Three features of very different scales, a target, and integer weights with some zeros."""
    random = np.random.default_rng(seed)
    area, rooms, age = random.normal(120, 30, rows), random.integers(1, 9, rows), random.uniform(0, 1e-3, rows)
    price = 1000 * area - 2500.5 * rooms + 4e6 * age + 70_000 + random.normal(0, 900, rows)
    times = random.integers(0, 4, rows)
    arrays = (area, rooms.astype(float), age, price, times.astype(float))
    return dict(zip(NAMES, arrays, strict=True))


def write_csv(path: Path, table: dict[str, np.ndarray]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(map(repr, column.tolist()) for column in table.values()), strict=True))
    return path


def write_parquet(path: Path, table: dict[str, np.ndarray], *, row_group_size: int = 128) -> Path:
    parquet.write_table(pa.table(table), path, row_group_size=row_group_size)
    return path


def write_npz(path: Path, table: dict[str, np.ndarray]) -> Path:
    np.savez(path, **table)
    return path


def solution(table: dict[str, np.ndarray], *, weighted: bool = False) -> np.ndarray:
    """Least squares of all rows by NumPy: three weights and the intercept, for columns at unit length."""
    x = np.stack([*(table[name] for name in NAMES[:3]), np.ones(len(table["price"]))], axis=1)
    root = np.sqrt(table["times"])[:, np.newaxis] if weighted else 1.0
    scale = np.linalg.norm(x * root, axis=0)
    return np.linalg.lstsq(x * root / scale, np.ravel(table["price"][:, np.newaxis] * root), rcond=None)[0] / scale
