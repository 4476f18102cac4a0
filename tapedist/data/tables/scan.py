"""The one pass over a table when it is opened: every cell is checked, hashed, and kept in the store of its split.

Beside the reading, threads of their own take the digest of the numbers. While a table is scanned it is known which rows
test by their hash, but not which are the last ones: where those test, all rows go to one store, which is cut at the
end, and each chunk's extremes are kept; the one chunk that lies on both sides is read again.

Legend: `k` rows, `c` columns: the features, the target and the weight if there are any.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tapedist.data.layout import piece_rows
from tapedist.data.ranges import holds_tiny
from tapedist.data.source import check_stop
from tapedist.data.tables.columns import Roles
from tapedist.data.tables.reader import Cell, RowBatch, TableReader
from tapedist.data.tables.store import NoRoomError, RowStore, ScratchFolder
from tapedist.errors import InputError, StorageError

CHUNK_ROWS = 65_536
_CHUNK_BYTES = 2**26  # Rows of very many columns come in shorter chunks.
_LOOKED_AT = 20  # Cells that tell a blank column from one of bad numbers.
# The smallest magnitude that float32 rounds to infinity: half a unit above its largest number.
_FLOAT32_LIMIT = (2 - 2.0**-24) * 2.0**127
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
# Least and greatest value of each column, float64 `[c]` each.
Extremes = tuple[np.ndarray, np.ndarray]


def row_hash(rows: np.ndarray, seed: int) -> np.ndarray:
    """A 64-bit hash of `(seed, row number)` that is the same on every machine and in every release.

    The seed-th splitmix64 stream (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), read
    at each row number.

    Args:
        rows: int64 array of row numbers in the file.
        seed: from 0 to 2**63 - 1.

    Returns:
        A uint64 array of the shape of `rows`.
    """
    start = np.array([(seed + 1) * _GOLDEN & _MASK], np.uint64)
    _finalise(start)
    hashes = rows.astype(np.uint64)
    hashes += np.uint64(1)
    hashes *= np.uint64(_GOLDEN)
    hashes += start
    _finalise(hashes)
    return hashes


def _finalise(z: np.ndarray) -> None:
    """Mixes in place: at this size, fresh temporaries cost more than the arithmetic."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)


class HashSplit(NamedTuple):
    """Which rows test, by the hash of their numbers.

    Attributes:
        test_fraction: in [0, 1).
        seed: of the hash.
    """

    test_fraction: float
    seed: int

    def tests(self, first: int, count: int) -> np.ndarray:
        """Whether each of the rows numbered `first ..` in the file tests, boolean `[count]`."""
        return row_hash(np.arange(first, first + count), self.seed) < np.uint64(int(self.test_fraction * 2.0**64))


@dataclasses.dataclass
class Scanned:
    """What the scan found.

    Attributes:
        num_rows: rows in the file.
        kept: how many of them are used, "train" and "test" by their hash; all are "train" without one.
        dropped: numbers in the file of the rows that are not used, int64, a chunk each.
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
        stores: the kept rows, by "train" and "test" as in `kept`, bad cells of features as NaN; None without room.
        no_room: why they were not kept; empty if they were.
    """

    num_rows: int = 0
    kept: dict[str, int] = dataclasses.field(default_factory=lambda: {"train": 0, "test": 0})
    dropped: list[np.ndarray] = dataclasses.field(default_factory=list)
    num_dropped: int = 0
    num_imputed: int = 0
    digest: str = ""
    largest: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    extremes: ScannedExtremes | None = None
    holds_tiny: bool = False
    bad: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    first_bad: str = ""
    suspects: tuple[str, ...] = ()
    stores: dict[str, RowStore] | None = None
    no_room: str = ""


class Chunk(NamedTuple):
    """Consecutive rows of the file, checked.

    Attributes:
        first: the number of the first in the file.
        columns: `c` arrays `[k]`, float64, bad cells as NaN.
        ends: minimum and maximum of each column, `[c, 2]`, or beyond them.
        dropped: the rows that are not used, boolean `[k]`, or None.
        tests: those that test by their hash, boolean `[k]`, or None.
    """

    first: int
    columns: Sequence[np.ndarray]
    ends: np.ndarray
    dropped: np.ndarray | None = None
    tests: np.ndarray | None = None


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
    chunks: Callable[..., Iterator[Chunk]],
    roles: Roles,
    *,
    in_memory: int,
    folder: ScratchFolder,
    num_rows: int | None = None,
    in_order: bool = True,
    hashed: bool = False,
    test_fraction: float = 0.0,
    suspect: bool = False,
) -> Scanned:
    """Reads the whole table once.

    Args:
        chunks: `checked_chunks` of it, but for the arguments that are here too.
        roles: its columns.
        in_memory: bytes up to which rows are kept in memory.
        folder: where more of them go.
        num_rows: how many the files say there are.
        in_order: whether rows may be decoded anew for want of room.
        hashed: whether rows test by their hash; otherwise the last ones do.
        test_fraction: of the rows.
        suspect: whether to stop at the first rows if they leave it open whether a feature holds any number.

    Raises:
        InputError: at the first bad cell, if it is to be one.
        StateError: if a file changes meanwhile.
        StorageError: if rows cannot be written, and must be or there is room.
    """
    names, found = roles.names, Scanned()
    found.stores = {split: RowStore(len(names), folder) for split in (("train", "test") if hashed else ("train",))}
    found.extremes = ScannedExtremes(
        len(names), weighted=bool(roles.weight), hashed=hashed, test_fraction=test_fraction
    )
    digests = ColumnDigests(names, len(names) - bool(roles.weight))
    for chunk in chunks(found=found, suspect=suspect):
        digests.update(chunk)
        found.extremes.add(chunk)
        if chunk.dropped is not None:
            found.dropped.append(chunk.first + np.flatnonzero(chunk.dropped))
        for split, rows in kept_pieces(chunk):
            found.kept[split] += len(rows)
            _keep(found, split, rows, in_memory=in_memory, in_order=in_order, num_rows=num_rows)
    found.digest, found.holds_tiny = digests.hexdigest(), digests.holds_tiny
    for store in (found.stores or {}).values():
        store.seal()
    return found


def _keep(
    found: Scanned, split: str, rows: np.ndarray, *, in_memory: int, in_order: bool, num_rows: int | None
) -> None:
    """Appends rows to the store of their split; without room for them, all stores go."""
    if found.stores is None:
        return
    try:
        # Where the files say how many rows there are, room for them is looked for at once.
        expected = max(sum(found.kept.values()), num_rows or 0)
        if found.stores["train"].in_memory and expected * rows.shape[1] * 8 > in_memory:
            found.stores["train"].check_room(expected)
            for store in found.stores.values():
                store.move_to_file()
        found.stores[split].append(rows)
    except NoRoomError as error:
        if not in_order:
            raise StorageError(f"{error}; give a folder with more room, or use --shuffle=none") from None
        found.stores, found.no_room = None, str(error)


def checked_chunks(
    reader: TableReader, roles: Roles, *, dtype: str, on_bad_rows: str, found: Scanned,
    by_hash: HashSplit | None = None, suspect: bool = False,
) -> Iterator[Chunk]:  # fmt: skip
    """All rows of a table in order.

    Args:
        reader: the table.
        roles: its columns.
        dtype: the compute type.
        on_bad_rows: "error", "drop" or "mean".
        found: counts what is bad, and the rows.
        by_hash: which rows test; None where the last ones do.
        suspect: see `scan`.
    """
    rule, names = CellRule(roles, dtype), roles.names
    found.largest, found.bad = np.zeros(len(names)), np.zeros(len(names), np.int64)
    for chunk in _chunks(reader.batches(names), len(names)):
        check_stop()
        if suspect and not found.num_rows:
            found.suspects = tuple(_blank_so_far(chunk, roles))
            if found.suspects:
                return
        checked, count = _checked(chunk, rule, roles, on_bad_rows, found), len(chunk.columns[0])
        yield checked._replace(tests=by_hash.tests(found.num_rows, count)) if by_hash else checked
        found.num_rows += count


def kept_pieces(chunk: Chunk) -> Iterator[tuple[str, np.ndarray]]:
    """The kept rows of a chunk: `(split, rows [k, c])` in order, in pieces; the next one takes the memory of a piece.

    Columns are turned into rows where they stay in the cache.
    """
    count = len(chunk.columns[0])
    step = piece_rows(len(chunk.columns))
    buffer = np.empty((min(step, count), len(chunk.columns)))
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        rows = buffer[: part.stop - first]
        for place, column in enumerate(chunk.columns):
            rows[:, place] = column[part]
        kept = None if chunk.dropped is None else ~chunk.dropped[part]
        if chunk.tests is None:
            yield "train", rows if kept is None else rows[kept]
            continue
        for split, chosen in (("train", ~chunk.tests[part]), ("test", chunk.tests[part])):
            yield split, rows[chosen if kept is None else chosen & kept]


def _checked(chunk: RowBatch, rule: CellRule, roles: Roles, on_bad_rows: str, found: Scanned) -> Chunk:
    """A chunk with bad cells as NaN; their rows, and the largest good cells, are noted in `found`."""
    ends = [(column.min(), column.max()) for column in chunk.columns]
    masks = {position: rule.bad(position, column, ends[position]) for position, column in enumerate(chunk.columns)}
    bad = {position: mask for position, mask in masks.items() if mask is not None and mask.any()}
    if not bad:
        found.largest = np.maximum(found.largest, np.abs(ends).max(axis=1))
        return Chunk(found.num_rows, chunk.columns, np.array(ends))
    row, position = min((int(mask.argmax()), position) for position, mask in bad.items())
    if on_bad_rows == "error":
        raise InputError(f"{_said(chunk, row, position, rule)}; {_fix(row, position, bad, roles)}")
    found.first_bad = found.first_bad or _said(chunk, row, position, rule)
    for position, mask in bad.items():
        found.bad[position] += int(mask.sum())
    columns = [np.where(bad[p], np.nan, column) if p in bad else column for p, column in enumerate(chunk.columns)]
    # `fmax` passes over NaN.
    good = np.array([(np.fmin.reduce(c, initial=0.0), np.fmax.reduce(c, initial=0.0)) for c in columns])
    found.largest = np.maximum(found.largest, np.abs(good).max(axis=1))
    imputable = range(len(roles.features)) if on_bad_rows == "mean" else range(0)
    dropped = np.zeros(len(columns[0]), bool)
    for position, mask in bad.items():
        if position not in imputable:
            dropped |= mask
    found.num_imputed += sum(int((mask & ~dropped).sum()) for p, mask in bad.items() if p in imputable)
    found.num_dropped += int(dropped.sum())
    return Chunk(found.num_rows, columns, good, dropped)


def holds_numbers(reader: TableReader, names: Sequence[str]) -> set[str]:
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
    """The same rows, float64, in chunks that are neither large nor so small that their number costs time."""
    held: list[tuple[RowBatch, int, int]] = []
    rows, most = 0, max(256, min(CHUNK_ROWS, _CHUNK_BYTES // (8 * num_columns)))
    for batch in batches:
        size = len(batch.columns[0])
        for first in range(0, size, most):
            last = min(size, first + most)
            if held and (rows + last - first > most or rows >= most // 4):
                yield _joined(held, num_columns)
                held, rows = [], 0
            held.append((batch, first, last))
            rows += last - first
    if held:
        yield _joined(held, num_columns)


def _joined(held: list[tuple[RowBatch, int, int]], num_columns: int) -> RowBatch:
    columns = [_column(position, held) for position in range(num_columns)]

    def explain(row: int, column: int) -> Cell:
        for batch, first, last in held:
            if row < last - first:
                return batch.explain(first + row, column)
            row -= last - first
        raise IndexError(row)

    return RowBatch(columns, explain)


def _column(position: int, held: list[tuple[RowBatch, int, int]]) -> np.ndarray:
    """One column of a chunk, float64; not copied where it is one already."""
    if len(held) == 1:
        batch, first, last = held[0]
        return np.asarray(batch.columns[position][first:last], np.float64)
    return np.concatenate([batch.columns[position][first:last] for batch, first, last in held], dtype=np.float64)


class ColumnDigests:
    """SHA-256 of column names and of each column's little-endian float64 bytes in row order.

    Columns are hashed side by side in threads, the last chunk's while the next is decoded; which the interpreter's lock
    does not hinder.

    Args:
        names: of the columns.
        num_values: how many of the first of them training computes with.

    Attributes:
        holds_tiny: whether one of those holds a number other than 0 below 2**-126; once all were added.
    """

    def __init__(self, names: Sequence[str], num_values: int):
        self.holds_tiny = False
        self._names, self._num_values = names, num_values
        self._hashes = [hashlib.sha256() for _ in names]
        self._pool = concurrent.futures.ThreadPoolExecutor(
            len(os.sched_getaffinity(0)), thread_name_prefix="tapedist-hash"
        )
        self._under_way: list[concurrent.futures.Future[None]] = []

    def update(self, chunk: Chunk) -> None:
        """Adds rows, whose arrays must not be changed afterwards."""
        self._settle()
        self._under_way = [self._pool.submit(self._add, chunk, position) for position in range(len(self._names))]

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

    def _add(self, chunk: Chunk, position: int) -> None:
        column = chunk.columns[position]
        self._hashes[position].update(np.ascontiguousarray(column, "<f8").data)
        if position < self._num_values and not self.holds_tiny and holds_tiny(column, chunk.ends[position]):
            self.holds_tiny = True


class ScannedExtremes:
    """Extremes of the kept rows of positive weight.

    Args:
        num_columns: `c`.
        weighted: whether the last column is a weight.
        hashed: whether rows test by their hash; otherwise the last ones do.
        test_fraction: of the rows.
    """

    def __init__(self, num_columns: int, *, weighted: bool, hashed: bool, test_fraction: float):
        self._weighted = weighted
        self._per_chunk = not hashed and test_fraction > 0
        splits = 2 if hashed else 1
        self._low, self._high = np.full((splits, num_columns), np.inf), np.full((splits, num_columns), -np.inf)
        self._kept_ends = [0]
        self._chunks: list[Extremes] = []

    def add(self, chunk: Chunk) -> None:
        """Takes in a chunk."""
        columns, ends = chunk.columns, chunk.ends
        if self._per_chunk:
            dropped = 0 if chunk.dropped is None else int(chunk.dropped.sum())
            self._kept_ends.append(self._kept_ends[-1] + len(columns[0]) - dropped)
            counts = self._counts(columns, chunk.dropped)
            self._chunks.append((ends[:, 0], ends[:, 1]) if counts is None else _extremes(columns, counts))
            return
        # Few chunks hold a new extreme; only those are looked at row by row.
        new = (ends[:, 0] < self._low.max(axis=0)) | (ends[:, 1] > self._high.min(axis=0))
        if not new.any():
            return
        counts = self._counts(columns, chunk.dropped)
        chosen = [columns[position] for position in np.flatnonzero(new).tolist()]
        for split in range(len(self._low)):
            of_split = None if chunk.tests is None else chunk.tests == bool(split)
            picked = of_split if counts is None else counts if of_split is None else counts & of_split
            low, high = _extremes(chosen, picked)
            self._low[split, new] = np.minimum(self._low[split, new], low)
            self._high[split, new] = np.maximum(self._high[split, new], high)

    def of(self, split: str, num_train: int, read: Callable[[str, range], Sequence[np.ndarray]]) -> Extremes:
        """Extremes of a split.

        Args:
            split: "train" or "test".
            num_train: rows of "train".
            read: `(split, rows) -> columns`, for the chunk that holds rows of both splits.
        """
        if not self._per_chunk:
            place = ("train", "test").index(split)
            return self._low[place], self._high[place]
        ends = np.array(self._kept_ends)
        whole = ends[1:] <= num_train if split == "train" else ends[:-1] >= num_train
        found = [self._chunks[chunk] for chunk in np.flatnonzero(whole)]
        for chunk in np.flatnonzero((ends[:-1] < num_train) & (ends[1:] > num_train)).tolist():
            part = range(ends[chunk], num_train) if split == "train" else range(ends[chunk + 1] - num_train)
            columns = read(split, part)
            found.append(_extremes(columns, self._counts(columns, None)))
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
