"""NumPy arrays as tables: `.npy` files and `.npz` archives, which array is which column, read in batches.

Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import numpy as np

from tapedist.data.tables.columns import Column, merged, without_repeats
from tapedist.data.tables.files import TableFile, display
from tapedist.data.tables.reader import INEXACT, Cell, RowBatch, TableReader, inexact_integers
from tapedist.errors import InputError, StateError

_MAX_RATIO = 200
_BOMB_BYTES = 256 * 2**20
_TURN_BYTES = 2**30
_LOCAL_HEADER = struct.Struct("<26xHH")
_BATCH_ROWS = 65_536
_BATCH_BYTES = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class ArrayHeader:
    """What the header of an array says, checked.

    Attributes:
        name: the array's name in messages.
        dtype: its type.
        shape: `[n]` or `[n, k]`.
        fortran: whether columns are contiguous.
        offset: bytes of the header.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    offset: int

    @property
    def width(self) -> int:
        """Columns of the array."""
        return self.shape[1] if len(self.shape) == 2 else 1

    @property
    def numeric(self) -> bool:
        return self.dtype.kind in "iuf" and self.dtype.itemsize <= 8

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WrongKindError(InputError):
    """A good array that cannot be a column."""


def read_header(stream: IO[bytes], name: str, size: int) -> ArrayHeader:
    """The header of the array in `stream`, which holds `size` bytes.

    Raises:
        InputError: if it is no array, or if its size is not what the header says.
        WrongKindError: if it needs pickle, or if its type or shape is not a table's.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, TypeError, EOFError, SyntaxError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{name}: not a NumPy array ({display(str(error).splitlines()[0])}); save it again") from None
    if dtype.hasobject:
        raise WrongKindError(f"{name}: holds Python objects, which are never loaded; save it as float64")
    if dtype.names:
        raise WrongKindError(f"{name}: is a structured array; save one plain array a column in an .npz")
    if dtype.kind in "cmMV" or (dtype.kind == "f" and dtype.itemsize > 8):
        raise WrongKindError(f"{name}: holds {dtype}, not real numbers of up to 64 bits; convert it to float64")
    if len(shape) not in (1, 2) or min(shape) < 0 or (len(shape) == 2 and not shape[1]):
        raise WrongKindError(f"{name}: has shape {list(shape)}; a table needs [n] or [n, columns]")
    header = ArrayHeader(name, dtype, shape, fortran and len(shape) == 2, stream.tell())
    if header.offset + header.nbytes != size:
        raise InputError(
            f"{name}: its header promises {header.nbytes} bytes of numbers, the file holds {size - header.offset}; "
            "the file is damaged, save it again"
        )
    return header


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An uncompressed array inside a file, readable from any row.

    Attributes:
        file: the `.npy` or `.npz`.
        header: of the array.
        member: name of its columns, numbered if there are several.
        begin: where the array's header starts in the file.
    """

    file: TableFile
    header: ArrayHeader
    member: str = "x"
    begin: int = 0

    def read(self, first: int, last: int) -> list[np.ndarray]:
        """Rows `[first, last)` as `width` arrays of the stored type.

        Raises:
            StateError: if the file got shorter.
        """
        header, rows = self.header, last - first
        item, base = header.dtype.itemsize, self.begin + header.offset
        with open(self.file.path, "rb", buffering=0) as stream:
            if not header.fortran:
                stride = item * header.width
                flat = self._at(stream, base + first * stride, rows * header.width)
                return list(flat.reshape(rows, header.width).T)
            spans = (base + (column * header.shape[0] + first) * item for column in range(header.width))
            return [self._at(stream, span, rows) for span in spans]

    def _at(self, stream: IO[bytes], offset: int, count: int) -> np.ndarray:
        numbers = np.empty(count, self.header.dtype)
        view, done = numbers.view(np.uint8).data, 0
        stream.seek(offset)
        while done < len(view):
            got = stream.readinto(view[done:])  # type: ignore[attr-defined]
            if not got:
                raise StateError(f"{self.file.name}: became shorter while in use; restore the file and resume")
            done += got
        return numbers


@dataclasses.dataclass(frozen=True)
class CompressedArray:
    """An array in a compressed member of an `.npz`; it can only be read from the start.

    Attributes:
        file: the `.npz`.
        header: of the array.
        member: name of its columns, numbered if there are several.
    """

    file: TableFile
    header: ArrayHeader
    member: str

    def parts(self, rows: int) -> Iterator[list[np.ndarray]]:
        """All rows as `width` arrays at a time, `rows` long but for the last.

        Raises:
            InputError: if the data is damaged, or lies by columns and is too large to be turned in memory.
        """
        header = self.header
        if header.fortran and header.nbytes > _TURN_BYTES:
            raise InputError(f"{header.name}: is large and in Fortran order; save it in C order, or uncompressed")
        step = header.shape[0] if header.fortran else rows
        try:
            with zipfile.ZipFile(self.file.path) as archive, archive.open(f"{self.member}.npy") as stream:
                stream.read(header.offset)
                for first in range(0, header.shape[0], max(1, step)):
                    count = min(step, header.shape[0] - first)
                    raw = stream.read(count * header.width * header.dtype.itemsize)
                    flat = np.frombuffer(raw, header.dtype)
                    whole = flat.reshape((header.width, count) if header.fortran else (count, header.width))
                    columns = list(whole if header.fortran else whole.T)
                    for at in range(0, count, rows):
                        yield [column[at : at + rows] for column in columns]
                stream.read(1)  # Checks the checksum.
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
            self.file.check_unchanged()
            raise InputError(f"{header.name}: cannot be unpacked ({error}); save it again") from None


Array = StoredArray | CompressedArray


def to_floats(numbers: np.ndarray) -> np.ndarray:
    """Real numbers of any type and byte order as native floats; NaN where float64 cannot hold an integer."""
    if numbers.dtype.kind == "f":
        return numbers.astype(numbers.dtype.newbyteorder("="), copy=False)
    inexact = inexact_integers(numbers)
    floats = numbers.astype(np.float64)
    if inexact.any():
        floats[inexact] = np.nan
    return floats


def open_npy(file: TableFile) -> list[StoredArray]:
    """The one array of an `.npy` file."""
    with open(file.path, "rb") as stream:
        return [StoredArray(file, read_header(stream, file.name, file.size))]


@dataclasses.dataclass(frozen=True)
class UnusableArray:
    """A member of an `.npz` that cannot be a column; no matter, as long as it plays no part.

    Attributes:
        member: its name.
        problem: why, and the fix.
    """

    member: str
    problem: str


def open_npz(file: TableFile) -> list[StoredArray | CompressedArray | UnusableArray]:
    """The arrays of an `.npz` archive.

    Raises:
        InputError: if it is no archive, a bomb, or holds a member twice.
    """
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = archive.infolist()
            _check_members(file, members)
            return [_judged_member(file, archive, info) for info in members if info.filename.endswith(".npy")]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error) as error:
        raise InputError(f"{file.name}: not a readable .npz archive ({display(str(error))}); save it again") from None


def _check_members(file: TableFile, members: list[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in members]
    twice = sorted({display(name) for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{file.name}: holds {', '.join(twice)} twice; save it again with each name once")
    total = sum(info.file_size for info in members)
    if total > _BOMB_BYTES and total > _MAX_RATIO * file.size:
        raise InputError(
            f"{file.name}: would grow {total // file.size} times, to {total} bytes, when it is unpacked; "
            "if it is meant so, save it with numpy.savez"
        )
    if not any(name.endswith(".npy") for name in names):
        raise InputError(f"{file.name}: holds no arrays; save it with numpy.savez")


def _judged_member(
    file: TableFile, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> StoredArray | CompressedArray | UnusableArray:
    try:
        return _member(file, archive, info)
    except WrongKindError as error:
        return UnusableArray(info.filename.removesuffix(".npy"), error.problems[0])


def _member(file: TableFile, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredArray | CompressedArray:
    member = info.filename.removesuffix(".npy")
    label = f"{file.name}:{display(member)}"
    with archive.open(info) as stream:
        header = read_header(stream, label, info.file_size)
    if info.compress_type != zipfile.ZIP_STORED:
        return CompressedArray(file, header, member)
    with open(file.path, "rb") as raw:
        raw.seek(info.header_offset)
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
    begin = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    if begin + info.file_size > os.path.getsize(file.path):
        raise InputError(f"{label}: lies outside the archive; the file is damaged, save it again")
    return StoredArray(file, header, member, begin)


class ArrayReader(TableReader):
    """Reads `.npy` files (one array `[n]` or `[n, columns]`) or `.npz` archives (any number of them).

    A one-column array is the column of its name, others are `name0`, `name1`, ...; the array of an `.npy` file is `x`.
    In an `.npz` with `x` and `y`, the target is `y` and the weight is `w`, unless the user names others.

    Args:
        files: the table, in order; all with the same columns.

    Raises:
        InputError: if a file is damaged or no table.
    """

    def __init__(self, files: Sequence[TableFile]):
        self.files = files
        found = [_arrays(file) for file in files]
        self._tables = [[array for array in table if not isinstance(array, UnusableArray)] for table in found]
        first = {array.member: array.header.width for array in self._tables[0]}
        self.columns = merged(
            [(file.name, _table_columns(file, table, first)) for file, table in zip(files, found, strict=True)],
            what="arrays",
        )
        self.num_rows = sum(table[0].header.shape[0] for table in self._tables if table)
        members = {array.member for array in self._tables[0]}
        names = {column.name for column in self.columns}
        self.default_target = "y" if {"x", "y"} <= members and "y" in names else ""
        self.default_weight = "w" if self.default_target and "w" in names else ""

    def batches(self, names: Sequence[str]) -> Iterator[RowBatch]:
        """All rows, in batches of bounded memory."""
        for file, table in zip(self.files, self._tables, strict=True):
            used = [array for array in table if any(column.name in names for column in _columns(array))]
            first = 0
            for parts in zip(*(_parts(array, _batch_rows(used)) for array in used), strict=True):
                raw = _pick(used, parts, names)
                yield _batch(file, first, names, raw)
                first += len(raw[0])
            file.check_unchanged()


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
                f"{file.name}: {display(like.member)} has {usual} rows and {display(array.member)} has {rows}; give "
                "all arrays the same length"
            )
        width = widths.get(array.member, array.header.width)
        if array.header.width != width:
            problem = (
                f"{file.name}: its arrays differ from those of the first file: {display(array.member)} has "
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
    return max(64, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))


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
        where = f"{file.name}:row {first + row + 1}:{display(names[column])}"
        return Cell(where, str(value), INEXACT if isinstance(value, int) and abs(value) > 2**53 else "")

    return RowBatch([to_floats(column) for column in raw], explain)
