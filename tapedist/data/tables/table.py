"""The user's own rows: CSV, TSV, Parquet, NumPy and TFDS tables as a `Source`.

`check_table` looks at paths and headers only; `open_table` also reads every row once, and keeps a small table in
memory, a large one in place (Parquet, uncompressed arrays) or in a scratch file. Neither imports TensorFlow, except
for TFDS.

Legend: `n` rows of a split, `d` features, `k` rows asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tapedist.data.permutations import WINDOW_ROWS
from tapedist.data.ranges import LEAST, Ranges, ranges_of_rows
from tapedist.data.source import RowNumbers, Source, Units
from tapedist.data.tables.columns import Column, Roles, choose, listed
from tapedist.data.tables.files import display
from tapedist.data.tables.gather import RowGather, empty_rows
from tapedist.data.tables.listing import FoundFiles, find_files
from tapedist.data.tables.reader import SegmentStore, TableReader
from tapedist.data.tables.scan import CellRule, Scanned, holds_numbers, scan
from tapedist.data.tables.split import CHUNK_ROWS, HashSplit, RowSplit
from tapedist.data.tables.store import MemoryStore, ScratchStore, SegmentCache
from tapedist.errors import InputError, TapedistError

MEMORY_BUDGET = 512 * 2**20
_HELD_SEGMENTS = 10
TFDS_PREFIX = "tfds:"
_STORAGE: dict[type, str] = {MemoryStore: "memory", ScratchStore: "scratch file"}


@dataclasses.dataclass(frozen=True)
class TableHeader:
    """A table whose paths and header are known to be good.

    Attributes:
        data: what the user called it.
        reader: its files.
        roles: its columns.
        files: where it lies; None for TFDS.
    """

    data: str
    reader: TableReader
    roles: Roles
    files: FoundFiles | None = None


def check_table(
    data: str,
    *,
    target: str = "",
    features: Sequence[str] = (),
    weight: str = "",
    need_target: bool = True,
    of_run: bool = False,
) -> TableHeader:
    """Checks paths, headers and the columns asked for, without TensorFlow and without reading the rows.

    Args:
        data: a file, a folder, a glob, or `tfds:NAME[/CONFIG]`.
        target: the column to predict; empty takes `y` of an `.npz` with `x` and `y`, or what a TFDS dataset supervises.
        features: the columns to predict from; empty takes all other numeric ones.
        weight: the column of row weights; empty weighs all rows alike (but takes `w` beside `x` and `y`).
        need_target: False for predicting, where a table needs no target.
        of_run: whether `features` and `target` are a trained run's, so that messages name no flags for them.

    Raises:
        InputError: with every problem of the columns, or the first of the files.
    """
    reader, files = _reader(data)
    if not target and reader.default_target:
        target = reader.default_target
        features = features or reader.default_features
        weight = weight or (reader.default_weight if reader.default_weight not in features else "")
    roles = choose(
        reader.columns, where=display(data), target=target, features=features, weight=weight, need_target=need_target,
        partitions=files.partitions if files else (), of_run=of_run,
    )  # fmt: skip
    return TableHeader(data, reader, roles, files)


def column_names(data: str) -> tuple[str, ...]:
    """Names of a table's columns, by its header.

    Raises:
        InputError: if there is no such table, or its header is not good.
    """
    return tuple(column.name for column in _reader(data)[0].columns)


def open_table(
    data: str,
    *,
    target: str = "",
    features: Sequence[str] = (),
    weight: str = "",
    on_bad_rows: str = "error",
    split: str = "hash",
    test_fraction: float = 0.2,
    seed: int = 0,
    dtype: str = "float32",
    memory_budget: int = MEMORY_BUDGET,
    need_target: bool = True,
    of_run: bool = False,
    check_stop: Callable[[], object] = lambda: None,
) -> TableSource:
    """Opens a table and reads it once: checks every cell, hashes, splits, and keeps what cannot be read again cheaply.

    Args:
        data: see `check_table`, as for `target`, `features`, `weight`, `need_target` and `of_run`.
        on_bad_rows: "error" stops at the first bad cell; "drop" drops its row; "mean" puts the column's mean over the
            training rows there, and drops the row where the target or the weight is bad.
        split: "hash" of the row number and seed, or "index": the last `floor(n * test_fraction)` rows test.
        test_fraction: in [0, 1).
        seed: of the hash.
        dtype: the compute type; numbers beyond float32 are bad cells under "float32".
        memory_budget: bytes of rows to hold; larger tables are read in place or copied to a scratch file in `$TMPDIR`.
        check_stop: called now and then while rows are read; may raise to break it off.

    Raises:
        InputError: for anything wrong with the table.
        StateError: if a file changes while it is read.
        StorageError: if a scratch file is needed and cannot be written.
    """
    header = check_table(data, target=target, features=features, weight=weight, need_target=need_target, of_run=of_run)
    read = functools.partial(
        _scanned, dtype=dtype, on_bad_rows=on_bad_rows, test_fraction=test_fraction, memory_budget=memory_budget,
        by_hash=HashSplit(test_fraction, seed) if split == "hash" and test_fraction else None, check_stop=check_stop,
    )  # fmt: skip
    segments, scanned = read(header, suspect=not header.roles.chosen)
    if scanned.suspects:
        header = _without_blank(header, scanned.suspects, check_stop)
        segments, scanned = read(header, suspect=False)
    if scanned.num_rows == scanned.num_dropped:
        raise InputError(no_rows(display(data), header.roles, scanned))
    rows = RowSplit(scanned.num_rows, scanned.dropped, split, test_fraction, seed)
    if not rows.count("train"):
        raise InputError(f"--test_fraction={test_fraction}: leaves no row of {display(data)} to train on; lower it")
    store: SegmentStore | None = scanned.store if scanned.store is not None else segments
    assert store is not None
    # More than this is seldom asked for again before it is dropped, and fresh memory costs more than decoding.
    held = min(memory_budget, max(2 * _window_bytes(store, test_fraction), _HELD_SEGMENTS * _largest(store)))
    settings = [split, test_fraction, seed if split == "hash" else 0] if test_fraction else []
    settings += [on_bad_rows] if scanned.num_dropped or scanned.num_imputed else []
    return TableSource(header, scanned, rows, store, CellRule(header.roles, dtype), settings, held, check_stop)


class TableSource(Source):
    """Rows of a table by number. Made by `open_table`.

    Attributes:
        num_features: `d`.
        feature_names: their columns.
        target_name: the target's column; empty if there is none.
        weighted: whether rows have weights.
        weight_exponent: training divides weights, which count in proportion only, by 2 to the power of it: the largest
            is then about 1, in any type.
        dtype: of the rows.
        num_dropped: rows left out for bad cells.
        num_imputed: cells that were replaced by their column's mean.
        largest: the largest magnitude of each feature and, last, of the target, float64; without a target `[d]`.
        storage: where the rows are kept: "memory", "in place" or "scratch file".
        content_digest: names the table's numbers, whatever its format, split and settings.
        notices: sentences that the user should see once.
        failure: what went wrong inside a `tf.data` map, which loses the type of an error; None if nothing did.
    """

    dtype = np.dtype(np.float64)
    read_by_numpy = True
    row_major = False

    def __init__(
        self, header: TableHeader, scanned: Scanned, split: RowSplit, store: SegmentStore, rule: CellRule,
        settings: list[Any], memory_budget: int, check_stop: Callable[[], object],
    ):  # fmt: skip
        roles = header.roles
        self.num_features, self.feature_names = len(roles.features), roles.features
        self.target_name, self.weighted = roles.target, bool(roles.weight)
        self.num_dropped, self.num_imputed = scanned.num_dropped, scanned.num_imputed
        self.weight_exponent = int(np.frexp(scanned.largest[-1])[1]) if self.weighted else 0
        self.largest = scanned.largest[: self.num_features + bool(roles.target)]
        self.content_digest = scanned.digest
        self.storage = _STORAGE.get(type(store), "in place")
        self.notices = tuple(_notices(header, scanned))
        self.failure: TapedistError | None = None
        self._split, self._rule, self._roles = split, rule, roles
        self._gather = RowGather(
            store.get if isinstance(store, MemoryStore) else SegmentCache(store, memory_budget).get,
            store.starts,
            num_features=self.num_features, has_target=bool(roles.target), weighted=self.weighted, rule=rule,
        )  # fmt: skip
        names = json.dumps([self.content_digest, roles.features, roles.target, roles.weight, settings])
        self._fingerprint = hashlib.sha256(names.encode()).hexdigest()
        assert scanned.extremes
        self._extremes, self._ranges = scanned.extremes, dict[str, Ranges]()
        least_weight = np.ldexp(scanned.extremes.least_weight, -self.weight_exponent) if self.weighted else 1.0
        self._holds_tiny = scanned.holds_tiny or bool(least_weight < LEAST["float32"])
        if self.num_imputed:
            self._gather.means = self._train_means(check_stop)
            if self.target_name:  # What stands in the place of bad cells was not scanned.
                for name in ("train", "test"):
                    self._ranges[name] = ranges_of_rows(self, name, check_stop=check_stop)
        if self.weighted and not any((w > 0).any() for _, _, w in self._train_blocks(check_stop)):
            raise InputError(f"--weight={display(roles.weight)}: is 0 in every training row; give positive weights")
        if self.weighted and scanned.largest[-1] < (least := np.finfo(np.float64).tiny):
            raise InputError(
                f"--weight={display(roles.weight)}: its largest weight is {scanned.largest[-1]:g}; must be at least "
                f"{least:.3g}, below which numbers lose their digits; multiply the column by a large number, which "
                "changes no result"
            )

    @property
    def holds_tiny(self) -> bool:
        """Whether training meets numbers other than 0 below 2**-126."""
        return self._holds_tiny

    def num_rows(self, split: str) -> int:
        """Rows in `split`, which is "train" or "test"."""
        return self._split.count(split)

    def ranges(self, split: str) -> Ranges:
        """Least and greatest values of the rows of a split."""
        if split not in self._ranges:
            low, high = self._extremes.of(split, self._split, self._columns)
            weight = float(np.ldexp(high[-1], -self.weight_exponent)) if self.weighted else 1.0
            count = self.num_features + bool(self.target_name)
            self._ranges[split] = Ranges.of_extremes(low[:count], high[:count], weight)
        return self._ranges[split]

    def _columns(self, split: str, rows: range) -> list[np.ndarray]:
        """Rows of a split, one array a column as the scan has them."""
        x, *rest = self.rows(split, rows)
        return [*x.T, *(rest if self.target_name else rest[1:])]

    def fingerprint(self) -> str:
        """Names the rows and their split: equal for the same table in any file format."""
        return self._fingerprint

    def rows(self, split: str, indices: RowNumbers) -> tuple[np.ndarray, ...]:
        """Rows of a split by number; may be called from several threads.

        Args:
            split: "train" or "test".
            indices: a range, or int64 `[k]`, each in `[0, num_rows(split))`.

        Returns:
            `(x, y)` of shapes `[k, d]` and `[k]`, float64, or `(x, y, w)` if `weighted`. `y` is NaN without a target.

        Raises:
            IndexError: if an index is outside the split.
            StateError: if a file changed since it was opened.
        """
        out = empty_rows(len(indices), self.num_features, weighted=self.weighted, dtype=self.dtype)
        self._read(out, split, indices)
        return out

    def read_into(
        self, out: Sequence[np.ndarray], split: str, rows: RowNumbers, *, units: Units | None = None,
        ascending: bool = True,
    ) -> None:  # fmt: skip
        """Writes rows of a split as training takes them; may be called from several threads.

        Args:
            out: `(x [k, d], y [k][, w [k]])`, whose types are rounded to at the very end; weights are divided by
                `2**weight_exponent`. `x` may be feature-major tiles `[tiles, d, T]`, see `table_gather.write_tiles`.
            split: "train" or "test".
            rows: a range, which is the fastest, or int64 `[k]`.
            units: of the result; raw ones if None.
            ascending: whether the rows behind are asked for next, and worth reading ahead.

        Raises:
            IndexError: if a row is outside the split.
            StateError: if a file changed since it was opened.
        """
        self._read(out, split, rows, units=units, weight_exponent=self.weight_exponent, ascending=ascending)

    def _read(self, out: Sequence[np.ndarray], split: str, rows: RowNumbers, **how: Any) -> None:
        try:
            self._gather.into(out, self._split.file_rows(split, rows), **how)
        except TapedistError as error:
            self.failure = error
            raise

    def columns_into(self, found: np.ndarray, split: str, rows: RowNumbers) -> None:
        """Writes rows of a split into `found` column by column: features, target and any weight, `[d + 1 (+ 1), k]`."""
        self._gather.columns_into(found, self._split.file_rows(split, rows))

    def file_rows(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Numbers in the file, int64 `[k]`, of rows of a split; rows left out for bad cells have numbers too."""
        return np.asarray(self._split.file_rows(split, indices))

    def take(self, split: str, indices: Any) -> tuple[Any, ...]:
        """`rows` as a TensorFlow operation.

        Args:
            split: "train" or "test".
            indices: int64 tensor `[k]`, `k` known statically.

        Returns:
            Tensors as `rows` returns arrays, with static shapes.
        """
        import tensorflow as tf

        types = [tf.as_dtype(self.dtype)] * (3 if self.weighted else 2)
        taken = tf.numpy_function(functools.partial(self.rows, split), [indices], types, stateful=False)
        for tensor, shape in zip(taken, ([self.num_features], [], []), strict=False):
            tensor.set_shape(tf.TensorShape(indices.shape[:1]).concatenate(shape))
        return tuple(taken)

    def _train_blocks(self, check_stop: Callable[[], object]) -> Iterator[tuple[np.ndarray, ...]]:
        n = self.num_rows("train")
        for first in range(0, n, CHUNK_ROWS):
            check_stop()
            yield self.rows("train", range(first, min(first + CHUNK_ROWS, n)))

    def _train_means(self, check_stop: Callable[[], object]) -> np.ndarray:
        """Mean of the good cells of each feature over the training rows, `[d]`; summed in blocks of fixed size."""
        sums, counts = np.zeros(self.num_features), np.zeros(self.num_features)
        for x, *_ in self._train_blocks(check_stop):
            for position, values in enumerate(x.T):
                bad = self._rule.bad(position, values)
                good = values if bad is None else values[~bad]
                sums[position] += good.sum()
                counts[position] += len(good)
        if not counts.all():
            name = self.feature_names[int(counts.argmin())]
            fix = self._roles.fix_without([name])
            raise InputError(
                f"--features={display(name)}: has no good cell among the training rows, so no mean; leave it out"
                + (f" by {fix}" if fix else "")
            )
        return sums / counts


def _reader(data: str) -> tuple[TableReader, FoundFiles | None]:
    if data.startswith(TFDS_PREFIX):
        from tapedist.data.tables.tfds import TfdsReader

        return TfdsReader(data), None
    found = find_files(data)
    if found.format == "csv":
        from tapedist.data.tables.csv import CsvReader

        return CsvReader(found.files), found
    if found.format == "parquet":
        from tapedist.data.tables.parquet import ParquetReader

        return ParquetReader(found.files), found
    from tapedist.data.tables.npy import ArrayReader

    return ArrayReader(found.files), found


def _scanned(
    header: TableHeader, *, test_fraction: float, memory_budget: int, **settings: Any
) -> tuple[SegmentStore | None, Scanned]:
    """The table in place, if it can be read there, and what its scan found."""
    segments = header.reader.segments(header.roles.names)
    in_place = segments is not None and _window_bytes(segments, test_fraction) <= memory_budget
    scanned = scan(
        header.reader, header.roles, in_memory=memory_budget // 2, keep=not in_place, test_fraction=test_fraction,
        **settings,
    )  # fmt: skip
    return segments, scanned


def _without_blank(header: TableHeader, suspects: Sequence[str], check_stop: Callable[[], object]) -> TableHeader:
    """The header without those features among `suspects` that hold no number in any row."""
    found = holds_numbers(header.reader, suspects, check_stop)
    roles = header.roles.without([name for name in suspects if name not in found])
    if not roles.features:
        raise InputError(
            f"--data={display(header.data)}: no feature is left, because no row holds a number in "
            f"{listed(roles.blank)}; give a table with numbers to predict from"
        )
    return dataclasses.replace(header, roles=roles)


def _largest(segments: SegmentStore) -> int:
    """Bytes of the largest segment."""
    return int(np.diff(segments.starts).max(initial=0)) * segments.row_bytes


def _window_bytes(segments: SegmentStore, test_fraction: float) -> int:
    """What a window of the shuffled order takes to be held, so that no segment is decoded twice for it."""
    return int(WINDOW_ROWS / (1 - test_fraction) * segments.row_bytes) + 2 * _largest(segments)


def _notices(header: TableHeader, scanned: Scanned) -> Iterator[str]:
    yield from row_notices(display(header.data), scanned)
    yield from column_notices(display(header.data), header.roles)
    if header.files:
        yield from header.files.notices
        present = {column.name for column in header.reader.columns}
        partitions = [key for key in header.files.partitions if key not in present]
        if partitions and not header.roles.chosen:
            yield partition_notice(display(header.data), partitions)


def row_notices(name: str, scanned: Scanned) -> Iterator[str]:
    """Sentences about bad cells; `name` is the table, as for the functions below."""
    if scanned.num_dropped:
        first = f"; the first: {scanned.first_bad}"
        yield f"{name}: {scanned.num_dropped} of {scanned.num_rows} rows have bad cells and are left out{first}"
    if scanned.num_imputed:
        first = "" if scanned.num_dropped else f"; the first: {scanned.first_bad}"
        yield f"{name}: {scanned.num_imputed} bad cells are replaced by the mean of their column{first}"


def column_notices(name: str, roles: Roles) -> Iterator[str]:
    """Sentences about columns that play no part, by the reason."""
    if roles.blank:
        yield f"{name}: columns not used, because they hold no number: {listed(roles.blank)}"
    yield from _unused_notices(name, roles.unused)


def partition_notice(name: str, partitions: Sequence[str]) -> str:
    return (
        f"{name}: partition column {listed(partitions)} is not used: it stands in the names of the folders, not in the "
        "files; add it to the files as a column to use it"
    )


def no_rows(name: str, roles: Roles, scanned: Scanned) -> str:
    """Why a table has no row to use, and the fix."""
    data = f"--data={name}"
    if not scanned.num_rows:
        return f"{data}: holds no rows below its header; give a table with rows"
    never = [name for name, bad in zip(roles.names, scanned.bad, strict=True) if bad == scanned.num_rows]
    what = f"{data}: holds no good row among {scanned.num_rows} below its header"
    if not never:
        return f"{what}; correct its bad cells"
    fix = roles.fix_without(never) if set(never) <= set(roles.features) else ""
    return f"{what}: no cell of {listed(never)} can be used; " + (f"leave it out by {fix}" if fix else "correct it")


def _unused_notices(name: str, unused: Sequence[Column]) -> Iterator[str]:
    plain = [column.name for column in unused if not column.aside and not column.doubt]
    if plain:
        yield f"{name}: columns not used: {', '.join(map(display, plain))}"
    for reason in dict.fromkeys(column.aside for column in unused if column.aside):
        group = [column for column in unused if column.aside == reason]
        named = tuple(column.name for column in group if column.numeric and not column.problem)
        nameless = any(column.numeric and column.problem for column in group)
        fix = "; name them in the header to use them" if nameless else ""
        fix = "; name them in --features to use them" if named else fix
        yield f"{name}: columns not used, because they are {reason}: {listed(c.name for c in group)}{fix}"
    for column in unused:
        if column.doubt and not column.aside:
            yield f"{name}: column {display(column.name)} is not used: {column.doubt}"
