"""The one pass over a table when it is opened: every cell is checked, hashed and, if need be, kept.

Beside the reading, threads of their own take the digest of the numbers and the ranges of the splits. While a table is
scanned it is known which rows test by their hash, but not which are the last ones: where those test, each chunk's
extremes are kept, and the one chunk that lies on both sides is read again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tapedist.data.ranges import holds_tiny
from tapedist.data.tables.columns import Roles
from tapedist.data.tables.reader import Cell, RowBatch, TableReader
from tapedist.data.tables.split import CHUNK_ROWS, HashSplit, RowSplit
from tapedist.data.tables.store import MemoryStore, ScratchStore
from tapedist.errors import InputError

_LOOKED_AT = 20  # Cells that tell a blank column from one of bad numbers.
# The smallest magnitude that float32 rounds to infinity: half a unit above its largest number.
_FLOAT32_LIMIT = (2 - 2.0**-24) * 2.0**127
# Least and greatest value of each column, float64 `[columns]` each.
Extremes = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass
class Scanned:
    """What the scan found.

    Attributes:
        num_rows: rows in the file.
        dropped: chunk number -> packed bits of the rows that are not used.
        num_dropped: how many those are.
        num_imputed: feature cells that await their column's mean.
        digest: SHA-256 of the column names and of each column's little-endian float64 bytes in row order, bad cells
            as NaN: the same for the same table in any format.
        largest: the largest magnitude of each column's good cells.
        extremes: of the rows of each split.
        holds_tiny: whether a feature or the target holds a number other than 0 below 2**-126.
        bad: the number of bad cells of each column.
        first_bad: the first of them, and its rule.
        suspects: columns without any good cell among the first rows; where there are any, nothing else was looked at.
        store: the rows, if they were kept.
    """

    num_rows: int = 0
    dropped: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    num_dropped: int = 0
    num_imputed: int = 0
    digest: str = ""
    largest: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    extremes: ScannedExtremes | None = None
    holds_tiny: bool = False
    bad: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    first_bad: str = ""
    suspects: tuple[str, ...] = ()
    store: MemoryStore | ScratchStore | None = None


class CellRule:
    """Which numbers a column may hold.

    Args:
        roles: the columns.
        dtype: the compute type; float32 refuses what would round to infinity.
    """

    def __init__(self, roles: Roles, dtype: str):
        self._limit = _FLOAT32_LIMIT if dtype == "float32" else np.inf
        self._dtype = dtype
        self._weight = roles.names.index(roles.weight) if roles.weight else -1

    def bad(
        self, position: int, values: np.ndarray, ends: tuple[np.floating, np.floating] | None = None
    ) -> np.ndarray | None:
        """Which cells of a column are bad, or None if none is.

        Args:
            position: of the column.
            values: its cells.
            ends: their minimum and maximum, if they are known.
        """
        if not values.size:
            return None
        lowest, highest = ends or (values.min(), values.max())  # NaN if any is NaN, and then no comparison holds.
        # Weights count in proportion only, and are brought near 1 before they become float32.
        is_weight = position == self._weight
        least, limit = (0, np.inf) if is_weight else (-self._limit, self._limit)
        if (least < lowest or lowest == 0) and highest < limit:
            return None
        return ~(np.abs(values) < limit) | ((values < 0) if is_weight else False)

    def broken(self, position: int, value: float) -> str:
        """The rule that a number breaks."""
        if not np.isfinite(value):
            return "is not finite"
        if position == self._weight and value < 0:
            return "is a negative weight"
        return f"is beyond {self._dtype} (3.4e38); use --dtype=float64"


def scan(
    reader: TableReader,
    roles: Roles,
    *,
    dtype: str,
    on_bad_rows: str,
    in_memory: int,
    keep: bool,
    by_hash: HashSplit | None = None,
    test_fraction: float = 0.0,
    suspect: bool = False,
    check_stop: Callable[[], object] = lambda: None,
) -> Scanned:
    """Reads the whole table once.

    Args:
        reader: the table.
        roles: its columns.
        dtype: the compute type.
        on_bad_rows: "error", "drop" or "mean".
        in_memory: bytes up to which rows are kept in memory.
        keep: whether to copy a larger table to a scratch file.
        by_hash: which rows test; None where the last ones do.
        test_fraction: of the rows.
        suspect: whether to stop at the first rows if they leave it open whether a feature holds any number.
        check_stop: called for every chunk; may raise to break the scan off.

    Raises:
        InputError: at the first bad cell if `on_bad_rows` is "error".
        StateError: if a file changes meanwhile.
        StorageError: if the scratch file cannot grow.
    """
    names, found = roles.names, Scanned()
    rule = CellRule(roles, dtype)
    found.store, found.largest = MemoryStore(len(names)), np.zeros(len(names))
    found.bad = np.zeros(len(names), np.int64)
    found.extremes = ScannedExtremes(
        len(names), weighted=bool(roles.weight), by_hash=by_hash, test_fraction=test_fraction
    )
    digests = ColumnDigests(names)
    for number, chunk in enumerate(_chunks(reader.batches(names), len(names))):
        check_stop()
        if suspect and not number:
            found.suspects = tuple(_blank_so_far(chunk, roles))
            if found.suspects:
                return found
        columns = _checked(chunk, number, rule, roles, on_bad_rows, found)
        values = columns[:-1] if roles.weight else columns
        found.holds_tiny = found.holds_tiny or any(map(holds_tiny, values))
        digests.update(columns)
        found.num_rows += len(columns[0])
        if isinstance(found.store, MemoryStore) and found.num_rows * found.store.row_bytes > in_memory:
            found.store = _moved(found.store) if keep else None
        if found.store is not None:
            found.store.append(columns)
    found.digest = digests.hexdigest()
    return found


def holds_numbers(reader: TableReader, names: Sequence[str], check_stop: Callable[[], object]) -> set[str]:
    """Which of the columns `names` hold a finite number anywhere; reads no further than it must."""
    found: set[str] = set()
    for batch in reader.batches(names):
        check_stop()
        found.update(name for name, column in zip(names, batch.columns, strict=True) if np.isfinite(column).any())
        if len(found) == len(names):
            break
    return found


def _blank_so_far(chunk: RowBatch, roles: Roles) -> Iterator[str]:
    """Features of which the first rows hold nothing, or NaN."""
    for position, name in enumerate(roles.features):
        if np.isfinite(chunk.columns[position]).any():
            continue
        first = range(min(_LOOKED_AT, len(chunk.columns[position])))
        if all(map(_is_nothing, (chunk.explain(row, position) for row in first))):
            yield name


def _is_nothing(cell: Cell) -> bool:
    return cell.rule.endswith("is blank") or cell.value.strip("'").lower() == "nan"


def _moved(memory: MemoryStore) -> ScratchStore:
    scratch = ScratchStore(memory.row_bytes // 8)
    for columns in memory.chunks:
        scratch.append(columns)
    return scratch


def _checked(
    chunk: RowBatch, number: int, rule: CellRule, roles: Roles, on_bad_rows: str, found: Scanned
) -> Sequence[np.ndarray]:
    """The chunk's columns with bad cells as NaN; their rows, and the largest good cells, are noted in `found`."""
    ends = [(column.min(), column.max()) for column in chunk.columns]
    masks = {position: rule.bad(position, column, ends[position]) for position, column in enumerate(chunk.columns)}
    bad = {position: mask for position, mask in masks.items() if mask is not None and mask.any()}
    assert found.extremes
    if not bad:
        found.largest = np.maximum(found.largest, np.abs(ends).max(axis=1))
        found.extremes.add(chunk.columns, number, np.array(ends), None)
        return chunk.columns
    row, position = min((int(mask.argmax()), position) for position, mask in bad.items())
    if on_bad_rows == "error":
        raise InputError(f"{_said(chunk, row, position, rule)}; {_fix(row, position, bad, roles)}")
    found.first_bad = found.first_bad or _said(chunk, row, position, rule)
    for position, mask in bad.items():
        found.bad[position] += int(mask.sum())
    columns = [np.where(bad[p], np.nan, column) if p in bad else column for p, column in enumerate(chunk.columns)]
    # `fmax` passes over NaN.
    good = [(np.fmax.reduce(column, initial=0.0), -np.fmin.reduce(column, initial=0.0)) for column in columns]
    found.largest = np.maximum(found.largest, np.max(good, axis=1))
    imputable = range(len(roles.features)) if on_bad_rows == "mean" else range(0)
    dropped = np.zeros(len(columns[0]), bool)
    for position, mask in bad.items():
        if position not in imputable:
            dropped |= mask
    found.num_imputed += sum(int((mask & ~dropped).sum()) for p, mask in bad.items() if p in imputable)
    if dropped.any():
        found.dropped[number] = np.packbits(dropped)
        found.num_dropped += int(dropped.sum())
    found.extremes.add(columns, number, np.stack([-np.array(good)[:, 1], np.array(good)[:, 0]], axis=1), dropped)
    return columns


def _said(chunk: RowBatch, row: int, position: int, rule: CellRule) -> str:
    """A bad cell and the rule that it breaks."""
    cell = chunk.explain(row, position)
    reason = cell.rule or rule.broken(position, float(chunk.columns[position][row]))
    return f"{cell.where}: {cell.value} {reason}" if cell.value else f"{cell.where} {reason}"


def _fix(row: int, position: int, bad: dict[int, np.ndarray], roles: Roles) -> str:
    """What helps against a bad cell, as far as the rows around it tell."""
    fixes = ["correct it"]
    if not np.logical_or.reduce(list(bad.values())).all():
        fixes.append("use --on_bad_rows=drop")
    ragged = len(bad) == len(roles.names) and all(mask[row] for mask in bad.values())
    hopeless = {p for p, mask in bad.items() if mask.all()} | {position}
    without = roles.fix_without(roles.features[p] for p in hopeless if p < len(roles.features))
    if without and position < len(roles.features) and not ragged:
        fixes.append(f"leave the column out by {without}")
    return f"{', '.join(fixes[:-1])}, or {fixes[-1]}" if len(fixes) > 1 else fixes[0]


def _chunks(batches: Iterator[RowBatch], num_columns: int) -> Iterator[RowBatch]:
    """The same rows in chunks of `CHUNK_ROWS`, float64, so that nothing after depends on the format's batches."""
    held: list[tuple[RowBatch, int, int]] = []
    rows = 0
    for batch in batches:
        first, size = 0, len(batch.columns[0])
        while size - first:
            last = min(size, first + CHUNK_ROWS - rows)
            held.append((batch, first, last))
            rows, first = rows + last - first, last
            if rows == CHUNK_ROWS:
                yield _joined(held, num_columns)
                held, rows = [], 0
    if held:
        yield _joined(held, num_columns)


def _joined(held: list[tuple[RowBatch, int, int]], num_columns: int) -> RowBatch:
    columns = [
        np.concatenate([batch.columns[position][first:last] for batch, first, last in held], dtype=np.float64)
        for position in range(num_columns)
    ]

    def explain(row: int, column: int) -> Cell:
        for batch, first, last in held:
            if row < last - first:
                return batch.explain(first + row, column)
            row -= last - first
        raise IndexError(row)

    return RowBatch(columns, explain)


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


class ScannedExtremes:
    """Extremes of the kept rows of positive weight.

    Args:
        num_columns: features, then the target and the weight if there are any.
        weighted: whether the last column is a weight.
        by_hash: which rows test; None where the last ones do.
        test_fraction: of the rows.
    """

    def __init__(self, num_columns: int, *, weighted: bool, by_hash: HashSplit | None, test_fraction: float):
        self._weighted, self._by_hash = weighted, by_hash
        self._per_chunk = by_hash is None and test_fraction > 0
        splits = 2 if by_hash else 1
        self._low, self._high = np.full((splits, num_columns), np.inf), np.full((splits, num_columns), -np.inf)
        self._chunks: list[Extremes] = []

    def add(self, columns: Sequence[np.ndarray], number: int, ends: np.ndarray, dropped: np.ndarray | None) -> None:
        """Takes in a chunk.

        Args:
            columns: its cells.
            number: of the chunk.
            ends: minimum and maximum of each column, `[columns, 2]`, or beyond them.
            dropped: the rows that are not used, boolean, or None.
        """
        if self._per_chunk:
            found = (ends[:, 0], ends[:, 1])
            counts = self._counts(columns, dropped)
            self._chunks.append(found if counts is None else _extremes(columns, counts))
            return
        # Few chunks hold a new extreme; only those are looked at row by row.
        new = (ends[:, 0] < self._low.max(axis=0)) | (ends[:, 1] > self._high.min(axis=0))
        if not new.any():
            return
        counts = self._counts(columns, dropped)
        tests = self._by_hash.tests(number, len(columns[0])) if self._by_hash else None
        chosen = [columns[position] for position in np.flatnonzero(new).tolist()]
        for split in range(len(self._low)):
            of_split = None if tests is None else tests == bool(split)
            picked = of_split if counts is None else counts if of_split is None else counts & of_split
            low, high = _extremes(chosen, picked)
            self._low[split, new] = np.minimum(self._low[split, new], low)
            self._high[split, new] = np.maximum(self._high[split, new], high)

    def of(self, split: str, rows: RowSplit, read: Callable[[str, range], Sequence[np.ndarray]]) -> Extremes:
        """Extremes of a split.

        Args:
            split: "train" or "test".
            rows: which rows are whose.
            read: `(split, rows) -> columns`, for the chunk that holds rows of both splits.
        """
        if not self._per_chunk:
            place = ("train", "test").index(split)
            return self._low[place], self._high[place]
        trains, ends = rows.count("train"), rows.kept_ends
        lies_on_both = np.flatnonzero((ends[:-1] < trains) & (ends[1:] > trains))
        whole = ends[1:] <= trains if split == "train" else ends[:-1] >= trains
        found = [self._chunks[chunk] for chunk in np.flatnonzero(whole)]
        for chunk in lies_on_both.tolist():
            part = range(ends[chunk], trains) if split == "train" else range(ends[chunk + 1] - trains)
            columns = read(split, part)
            counts = self._counts(columns, None)
            found.append(_extremes(columns, counts))
        if not found:
            return self._low[0], self._high[0]
        lows, highs = zip(*found, strict=True)
        return np.min(lows, axis=0), np.max(highs, axis=0)

    @property
    def least_weight(self) -> float:
        """The least positive weight."""
        return float(min([low[-1] for low, _ in self._chunks], default=self._low[:, -1].min()))

    def _counts(self, columns: Sequence[np.ndarray], dropped: np.ndarray | None) -> np.ndarray | None:
        """Which rows count, or None if all do."""
        if self._weighted and not (columns[-1] > 0).all():
            return columns[-1] > 0 if dropped is None else (columns[-1] > 0) & ~dropped
        return None if dropped is None else ~dropped


def _extremes(columns: Sequence[np.ndarray], picked: np.ndarray | None) -> Extremes:
    """Infinite where no row is picked."""
    values = columns if picked is None else [column[picked] for column in columns]
    # `fmin` passes over cells that await their column's mean.
    low = [np.fmin.reduce(column, initial=np.inf) for column in values]
    return np.array(low), np.array([np.fmax.reduce(column, initial=-np.inf) for column in values])
