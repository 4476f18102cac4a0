"""Tables of NumPy arrays: which array is which column, read in batches and in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tapedist.data.tables.columns import Column, merged, without_repeats
from tapedist.data.tables.files import TableFile, shown
from tapedist.data.tables.npy import CompressedArray, StoredArray, UnusableArray, open_npy, open_npz, to_floats
from tapedist.data.tables.reader import INEXACT, Cell, RowBatch

_BATCH_ROWS = 65_536
_SEGMENT_BYTES = 8 * 2**20

Array = StoredArray | CompressedArray


class ArrayReader:
    """Reads `.npy` files (one array `[n]` or `[n, columns]`) or `.npz` archives (any number of them).

    A one-column array is the column of its name, others are `name0`, `name1`, ...; the array of an `.npy` file is `x`.
    In an `.npz` with `x` and `y`, the target is `y` and the weight is `w`, unless the user names others.

    Args:
        files: the table, in order; all with the same columns.

    Raises:
        InputError: if a file is damaged or no table.
    """

    default_features: tuple[str, ...] = ()

    def __init__(self, files: Sequence[TableFile]):
        self._files = files
        found = [_arrays(file) for file in files]
        self._tables = [[array for array in table if not isinstance(array, UnusableArray)] for table in found]
        first = {array.member: array.header.width for array in self._tables[0]}
        self.columns = merged(
            [(file.name, _table_columns(file, table, first)) for file, table in zip(files, found, strict=True)],
            what="arrays",
        )
        members = {array.member for array in self._tables[0]}
        names = {column.name for column in self.columns}
        self.default_target = "y" if {"x", "y"} <= members and "y" in names else ""
        self.default_weight = "w" if self.default_target and "w" in names else ""

    def check_unchanged(self) -> None:
        """Raises StateError if a file changed since it was opened."""
        for file in self._files:
            file.check_unchanged()

    def batches(self, names: Sequence[str]) -> Iterator[RowBatch]:
        """All rows, in batches of bounded memory."""
        for file, table in zip(self._files, self._tables, strict=True):
            used = [array for array in table if any(column.name in names for column in _columns(array))]
            first = 0
            for parts in zip(*(_parts(array, _batch_rows(used)) for array in used), strict=True):
                raw = _pick(used, parts, names)
                yield _batch(file, first, names, raw)
                first += len(raw[0])
            file.check_unchanged()

    def segments(self, names: Sequence[str]) -> ArraySegments | None:
        """The arrays in place, if none that is needed is compressed."""
        tables = [[a for a in table if any(c.name in names for c in _columns(a))] for table in self._tables]
        stored = [[array for array in table if isinstance(array, StoredArray)] for table in tables]
        return ArraySegments(self._files, stored, names) if list(map(len, stored)) == list(map(len, tables)) else None


class ArraySegments:
    """Row ranges of uncompressed arrays; a `SegmentStore`.

    Args:
        files: the table, in order.
        tables: the arrays of each file that hold a column of `names`.
        names: the columns.
    """

    def __init__(self, files: Sequence[TableFile], tables: Sequence[Sequence[StoredArray]], names: Sequence[str]):
        self._files, self._tables, self._names = files, tables, names
        self._spans = []
        for number, table in enumerate(tables):
            rows, step = table[0].header.shape[0], _batch_rows(table)
            self._spans += [(number, first, min(first + step, rows)) for first in range(0, rows, step)]
        self.starts = np.concatenate([[0], np.cumsum([b - a for _, a, b in self._spans], dtype=np.int64)])
        self.row_bytes = sum(array.header.width * 8 for array in tables[0])

    def load(self, segment: int) -> list[np.ndarray]:
        """One float array a column.

        Raises:
            StateError: if the file changed since it was opened.
        """
        number, first, last = self._spans[segment]
        self._files[number].check_unchanged()
        table = self._tables[number]
        raw = _pick(table, [array.read(first, last) for array in table], self._names)
        self._files[number].check_unchanged()
        return [to_floats(column) for column in raw]


def _arrays(file: TableFile) -> list[Array | UnusableArray]:
    return [*(open_npz(file) if file.path.lower().endswith(".npz") else open_npy(file))]


def _table_columns(file: TableFile, arrays: Sequence[Array | UnusableArray], widths: Mapping[str, int]) -> list[Column]:
    """The columns of a file's arrays.

    Those that differ in length from most, or from the first file's in width, cannot play a part.

    Args:
        file: the file.
        arrays: what it holds.
        widths: of the first file's arrays, by name: columns are told apart by their places only.
    """
    columns: list[Column] = []
    lengths = [array.header.shape[0] for array in arrays if not isinstance(array, UnusableArray)]
    usual = max(lengths, key=lengths.count, default=0)
    for array in arrays:
        if isinstance(array, UnusableArray):
            columns.append(Column(array.member, True, "no column", problem=array.problem))
            continue
        rows, problem = array.header.shape[0], ""
        if rows != usual:
            like = next(a for a in arrays if not isinstance(a, UnusableArray) and a.header.shape[0] == usual)
            problem = (
                f"{file.name}: {shown(like.member)} has {usual} rows and {shown(array.member)} has {rows}; give all "
                "arrays the same length"
            )
        width = widths.get(array.member, array.header.width)
        if array.header.width != width:
            problem = (
                f"{file.name}: its arrays differ from those of the first file: {shown(array.member)} has "
                f"{array.header.width} columns, not {width}; give all files the same arrays"
            )
        columns += [dataclasses.replace(column, problem=problem) for column in _columns(array)]
    return without_repeats(columns, file.name)


def _columns(array: Array) -> list[Column]:
    header, name = array.header, array.member
    names = [name] if header.width == 1 else [f"{name}{j}" for j in range(header.width)]
    return [Column(name, header.numeric, "numbers" if header.numeric else str(header.dtype)) for name in names]


def _batch_rows(arrays: Sequence[Array]) -> int:
    """Rows that keep a batch of all columns of `arrays` small."""
    row_bytes = 8 * sum(array.header.width for array in arrays)
    return max(64, min(_BATCH_ROWS, _SEGMENT_BYTES // row_bytes))


def _parts(array: Array, rows: int) -> Iterator[list[np.ndarray]]:
    if isinstance(array, CompressedArray):
        yield from array.parts(rows)
        return
    for first in range(0, array.header.shape[0], rows):
        yield array.read(first, min(first + rows, array.header.shape[0]))


def _pick(arrays: Sequence[Array], parts: Sequence[list[np.ndarray]], names: Sequence[str]) -> list[np.ndarray]:
    """The columns `names` out of the parts of several arrays."""
    found = {
        column.name: values
        for array, part in zip(arrays, parts, strict=True)
        for column, values in zip(_columns(array), part, strict=True)
    }
    return [found[name] for name in names]


def _batch(file: TableFile, first: int, names: Sequence[str], raw: list[np.ndarray]) -> RowBatch:
    def explain(row: int, column: int) -> Cell:
        value = raw[column][row].item()
        where = f"{file.name}:row {first + row + 1}:{shown(names[column])}"
        return Cell(where, str(value), INEXACT if isinstance(value, int) and abs(value) > 2**53 else "")

    return RowBatch([to_floats(column) for column in raw], explain)
