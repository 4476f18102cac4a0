"""The user's own rows: CSV, TSV, Parquet, NumPy and TFDS tables as a `Source`.

`check_table` looks at paths and headers only; `open_table` also reads every row once, and keeps them as one matrix a
split: of a small table in memory, of a large one in a scratch file. Neither imports TensorFlow, except for TFDS.

Legend: `n` rows of a split, `d` features, `k` rows asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tapedist.data.layout import RowNumbers, Units, convert_matrix
from tapedist.data.orders import split_sizes
from tapedist.data.ranges import LEAST, ranges_of_rows
from tapedist.data.source import Ranges, Source, check_stop
from tapedist.data.tables.columns import Column, Roles, choose, listed
from tapedist.data.tables.files import display
from tapedist.data.tables.listing import FoundFiles, find_files
from tapedist.data.tables.reader import TableReader
from tapedist.data.tables.scan import (
    CHUNK_ROWS,
    Chunk,
    HashSplit,
    Scanned,
    checked_chunks,
    holds_numbers,
    kept_pieces,
    scan,
)
from tapedist.data.tables.store import DecodedRows, RowStore, ScratchFolder
from tapedist.errors import InputError, TapedistError

MEMORY_BUDGET = 512 * 2**20
TFDS_PREFIX = "tfds:"


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
    scratch_dir: str = "",
    in_order: bool = True,
    need_target: bool = True,
    of_run: bool = False,
) -> TableSource:
    """Opens a table and reads it once: checks every cell, hashes, splits, and keeps its rows.

    Args:
        data: see `check_table`, as for `target`, `features`, `weight`, `need_target` and `of_run`.
        on_bad_rows: "error" stops at the first bad cell; "drop" drops its row; "mean" puts the column's mean over the
            training rows there, and drops the row where the target or the weight is bad.
        split: "hash" of the row number and seed, or "index": the last `floor(n * test_fraction)` rows test.
        test_fraction: in [0, 1).
        seed: of the hash.
        dtype: the compute type; numbers beyond float32 are bad cells under "float32".
        memory_budget: bytes of rows to keep in memory; larger tables are kept in a scratch file.
        scratch_dir: its folder; empty takes the system's temporary one. Without room there they are decoded anew for
            every pass.
        in_order: whether rows will be asked for in their order, nearly, so that they need not be kept.

    Raises:
        InputError: for anything wrong with the table.
        StateError: if a file changes while it is read.
        StorageError: if a scratch file is needed and cannot be written.
    """
    header = check_table(data, target=target, features=features, weight=weight, need_target=need_target, of_run=of_run)
    by_hash = HashSplit(test_fraction, seed) if split == "hash" and test_fraction else None
    header, chunks, found = _scanned(
        header, suspect=not header.roles.chosen, dtype=dtype, on_bad_rows=on_bad_rows, by_hash=by_hash,
        test_fraction=test_fraction, in_memory=memory_budget, folder=ScratchFolder(scratch_dir),
        in_order=in_order,
    )  # fmt: skip
    if found.num_rows == found.num_dropped:
        raise InputError(no_rows(display(data), header.roles, found))
    parts = _parts(found, functools.partial(_decoded, header.reader, chunks), 0.0 if by_hash else test_fraction)
    if not len(parts["train"].rows):
        raise InputError(f"--test_fraction={test_fraction}: leaves no row of {display(data)} to train on; lower it")
    settings = [split, test_fraction, seed if split == "hash" else 0] if test_fraction else []
    settings += [on_bad_rows] if found.num_dropped or found.num_imputed else []
    return TableSource(header, found, parts, settings)


def _scanned(
    header: TableHeader, *, suspect: bool, dtype: str, on_bad_rows: str, by_hash: HashSplit | None,
    **keeping: Any,
) -> tuple[TableHeader, Callable[..., Iterator[Chunk]], Scanned]:  # fmt: skip
    """The header without features that hold no number, what decodes the table anew, and what its scan found."""
    chunks = functools.partial(
        checked_chunks, header.reader, header.roles, dtype=dtype, on_bad_rows=on_bad_rows, by_hash=by_hash
    )
    found = scan(
        chunks, header.roles, num_rows=header.reader.num_rows, hashed=by_hash is not None, suspect=suspect,
        **keeping,
    )  # fmt: skip
    if not found.suspects:
        return header, chunks, found
    header = _without_blank(header, found.suspects)
    return _scanned(header, suspect=False, dtype=dtype, on_bad_rows=on_bad_rows, by_hash=by_hash, **keeping)


class Part(NamedTuple):
    """A split: some consecutive rows of a store.

    Attributes:
        store: kept rows.
        rows: those of the split.
    """

    store: RowStore | DecodedRows
    rows: range


def _parts(scanned: Scanned, decode: Callable[[str], Iterator[np.ndarray]], test_fraction: float) -> dict[str, Part]:
    """The splits; the last rows test where none do by their hash, and then both splits are of one store."""
    kept = scanned.kept
    stores: Mapping[str, RowStore | DecodedRows] = scanned.stores or {
        split: DecodedRows(functools.partial(decode, split), count) for split, count in kept.items()
    }
    if not test_fraction:
        return {split: Part(stores.get(split, stores["train"]), range(count)) for split, count in kept.items()}
    num_train, num_test = split_sizes(kept["train"], test_fraction)
    store = stores["train"]
    return {"train": Part(store, range(num_train)), "test": Part(store, range(num_train, num_train + num_test))}


def _decoded(reader: TableReader, chunks: Callable[..., Iterator[Chunk]], split: str) -> Iterator[np.ndarray]:
    """All kept rows of a split, decoded anew."""
    reader.check_unchanged()
    for chunk in chunks(found=Scanned()):
        for of_split, rows in kept_pieces(chunk):
            if of_split == split and len(rows):
                yield rows.copy()


class TableSource(Source):
    """Rows of a table by number. Made by `open_table`.

    Attributes:
        num_dropped: rows left out for bad cells.
        num_imputed: cells that were replaced by their column's mean.
        storage: where the rows are kept: "memory", "scratch file", or "nowhere": they are decoded anew in each pass.
    """

    dtype = np.dtype(np.float64)
    read_by_numpy = True
    row_major = False

    def __init__(
        self, header: TableHeader, scanned: Scanned, parts: dict[str, Part], settings: list[Any],
    ):  # fmt: skip
        roles, extremes = header.roles, scanned.extremes
        assert extremes
        self.num_features, self.feature_names = len(roles.features), roles.features
        self.target_name, self.weighted = roles.target, bool(roles.weight)
        self.num_dropped, self.num_imputed = scanned.num_dropped, scanned.num_imputed
        self.weight_exponent = int(np.frexp(scanned.largest[-1])[1]) if self.weighted else 0
        kept = "memory" if parts["train"].store.in_memory else "scratch file"
        self.storage = "nowhere" if scanned.no_room else kept
        self.notices = tuple(_notices(header, scanned))
        self._parts, self._roles, self._dropped = parts, roles, scanned.dropped
        names = json.dumps([scanned.digest, roles.features, roles.target, roles.weight, settings])
        self._fingerprint = hashlib.sha256(names.encode()).hexdigest()
        self._extremes, self._ranges = extremes, dict[str, Ranges]()
        least_weight = np.ldexp(extremes.least_weight, -self.weight_exponent) if self.weighted else 1.0
        self._holds_tiny = scanned.holds_tiny or bool(least_weight < LEAST["float32"])
        if self.num_imputed:
            self._impute()
        if self.weighted:
            self._check_weights(float(scanned.largest[-1]))

    @property
    def holds_tiny(self) -> bool:
        """Whether training meets numbers other than 0 below 2**-126."""
        return self._holds_tiny

    def num_rows(self, split: str) -> int:
        """Rows in `split`, which is "train" or "test"."""
        return len(self._parts[split].rows)

    def fingerprint(self) -> str:
        """Names the rows and their split: equal for the same table in any file format."""
        return self._fingerprint

    def ranges(self, split: str) -> Ranges:
        """Least and greatest values of the rows of a split."""
        if split not in self._ranges:
            low, high = self._extremes.of(split, self.num_rows("train"), self._columns)
            weight = float(np.ldexp(high[-1], -self.weight_exponent)) if self.weighted else 1.0
            count = self.num_features + bool(self.target_name)
            self._ranges[split] = Ranges.of_extremes(low[:count], high[:count], weight)
        return self._ranges[split]

    def _columns(self, split: str, rows: range) -> list[np.ndarray]:
        """Rows of a split, one array a column as the scan has them."""
        x, *rest = self.rows(split, rows)
        return [*x.T, *(rest if self.target_name else rest[1:])]

    def rows(self, split: str, indices: RowNumbers) -> tuple[np.ndarray, ...]:
        """Rows of a split by number; may be called from several threads.

        Args:
            split: "train" or "test".
            indices: a range, or int64 `[k]`, each in `[0, num_rows(split))`.

        Returns:
            `(x, y)` of shapes `[k, d]` and `[k]`, float64, or `(x, y, w)` if `weighted`; not to be written to. Without
            a target `y` is NaN.

        Raises:
            IndexError: if an index is outside the split.
            StateError: if they are decoded anew, and a file changed since it was opened.
        """
        found, d = self._taken(split, indices), self.num_features
        y = found[:, d] if self.target_name else np.full(len(found), np.nan)
        return found[:, :d], y, *([found[:, -1]] if self.weighted else [])

    def _taken(self, split: str, indices: RowNumbers) -> np.ndarray:
        store, own = self._parts[split]
        if not len(indices):
            return np.empty((0, len(self._roles.names)))
        ends = (indices[0], indices[-1]) if isinstance(indices, range) else (indices.min(), indices.max())
        if ends[0] < 0 or ends[1] >= len(own):
            raise IndexError(f"row {ends[0]} to {ends[1]} of {len(own)} in split {split!r}")
        try:
            return store.take(_shifted(indices, own.start))
        except TapedistError as error:
            self.failure = error
            raise

    def read_into(self, out: Sequence[np.ndarray], split: str, rows: RowNumbers, *, units: Units | None = None) -> None:
        assert self.target_name
        take = functools.partial(self._taken, split)
        convert_matrix(out, take, rows, units=units, weight_exponent=self.weight_exponent)

    def read_ahead(self, split: str, rows: range) -> None:
        store, own = self._parts[split]
        store.read_ahead(range(rows.start + own.start, rows.stop + own.start))

    def file_rows(self, indices: np.ndarray) -> np.ndarray:
        """Numbers in the file, int64 `[k]`, of rows of an undivided table, where dropped ones have numbers too."""
        dropped = np.concatenate([np.zeros(0, np.int64), *self._dropped])
        # Before the j-th dropped row there are as many kept rows as its number says, less j.
        return indices + np.searchsorted(dropped - np.arange(len(dropped)), indices, side="right")

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

        def read(numbers: np.ndarray) -> list[np.ndarray]:
            return [np.ascontiguousarray(column) for column in self.rows(split, numbers)]

        taken = tf.numpy_function(read, [indices], types, stateful=False)
        for tensor, shape in zip(taken, ([self.num_features], [], []), strict=False):
            tensor.set_shape(tf.TensorShape(indices.shape[:1]).concatenate(shape))
        return tuple(taken)

    def _train_blocks(self) -> Iterator[tuple[np.ndarray, ...]]:
        n = self.num_rows("train")
        for first in range(0, n, CHUNK_ROWS):
            check_stop()
            yield self.rows("train", range(first, min(first + CHUNK_ROWS, n)))

    def _impute(self) -> None:
        """Puts means in the place of bad cells."""
        means = self._train_means()
        for store in {id(part.store): part.store for part in self._parts.values()}.values():
            store.impute(means)
        if self.target_name:  # What stands there now was not scanned.
            for split in self._parts:
                self._ranges[split] = ranges_of_rows(self, split)

    def _train_means(self) -> np.ndarray:
        """Mean of the good cells of each feature over the training rows, `[d]`; summed in blocks of fixed size."""
        sums, counts = np.zeros(self.num_features), np.zeros(self.num_features)
        for x, *_ in self._train_blocks():
            for position, values in enumerate(x.T):
                bad = np.isnan(values)
                good = values[~bad] if bad.any() else values
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

    def _check_weights(self, largest: float) -> None:
        """Raises InputError if no training row counts, or the weights are too small to be divided."""
        name = display(self._roles.weight)
        if not any((w > 0).any() for _, _, w in self._train_blocks()):
            raise InputError(f"--weight={name}: is 0 in every training row; give positive weights")
        if largest < (least := np.finfo(np.float64).tiny):
            raise InputError(
                f"--weight={name}: its largest weight is {largest:g}; must be at least {least:.3g}, below which "
                "numbers lose their digits; multiply the column by a large number, which changes no result"
            )


def _shifted(rows: RowNumbers, by: int) -> RowNumbers:
    """`rows + by`."""
    return range(rows.start + by, rows.stop + by) if isinstance(rows, range) else rows + by if by else rows


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


def _without_blank(header: TableHeader, suspects: Sequence[str]) -> TableHeader:
    """The header without those features among `suspects` that hold no number in any row."""
    found = holds_numbers(header.reader, suspects)
    roles = header.roles.without([name for name in suspects if name not in found])
    if not roles.features:
        raise InputError(
            f"--data={display(header.data)}: no feature is left, because no row holds a number in "
            f"{listed(roles.blank)}; give a table with numbers to predict from"
        )
    return dataclasses.replace(header, roles=roles)


def _notices(header: TableHeader, scanned: Scanned) -> Iterator[str]:
    if scanned.no_room:
        yield f"{scanned.no_room}; so {display(header.data)} is decoded anew in each pass; give a folder with more room"
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
