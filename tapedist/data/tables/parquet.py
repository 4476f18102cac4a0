"""Parquet tables, decoded a part of a row group at a time."""

from __future__ import annotations

import dataclasses
import decimal
import json
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tapedist.data.tables.columns import Column, merged, row_labels, without_repeats
from tapedist.data.tables.csv import is_blank, judged
from tapedist.data.tables.files import TableFile, display
from tapedist.data.tables.reader import INEXACT, Cell, RowBatch, TableReader, inexact_integers
from tapedist.errors import InputError

_BATCH_ROWS = 65_536
_SAMPLE_ROWS = 100
_TEXTS = ("string", "large_string", "string_view")
# Powers of ten up to this one are exact in float64, and a quotient of two exact numbers is rounded once.
_EXACT_POWER = 22


class ParquetReader(TableReader):
    """Reads a list of Parquet files with equal columns.

    Args:
        files: the table, in order.

    Raises:
        InputError: if a file is no Parquet file, or its columns differ from the first one's.
    """

    def __init__(self, files: Sequence[TableFile]):
        self.files = files
        self._metadata = []
        tables = []
        for file in files:
            schema, metadata = _footer(file)
            self._metadata.append(metadata)
            tables.append((file.name, without_repeats(_columns(file, schema), file.name)))
        self.num_rows = sum(metadata.num_rows for metadata in self._metadata)
        self.columns = tuple(self._doubted(column) for column in merged(tables))

    def batches(self, names: Sequence[str]) -> Iterator[RowBatch]:
        """All rows, decoded a part of a row group at a time."""
        for file, metadata in zip(self.files, self._metadata, strict=True):
            first = 0
            try:
                with _opened(file, metadata) as parquet:
                    for arrow in parquet.iter_batches(_BATCH_ROWS, columns=list(names)):
                        yield _batch(file, first, arrow, names)
                        first += arrow.num_rows
            except (pa.ArrowException, OSError) as error:
                file.check_unchanged()
                raise InputError(f"{file.name}:row {first + 1}: cannot be decoded: {error}; write it again") from None
            file.check_unchanged()

    def _doubted(self, column: Column) -> Column:
        """The column, with what its first cells say where it is text that may be meant as numbers."""
        if column.kind not in _TEXTS or column.problem or not self._metadata[0].num_row_groups:
            return column
        try:
            with _opened(self.files[0], self._metadata[0]) as parquet:
                batch = next(parquet.iter_batches(_SAMPLE_ROWS, row_groups=[0], columns=[column.name]), None)
            cells = batch.column(column.name).to_pylist() if batch is not None else []
        except (pa.ArrowException, OSError):
            return column  # It plays no part.
        cells = [cell for cell in cells if cell is not None and not is_blank(cell)]
        numeric, _, doubt = judged(cells)
        meant = f"its cells are numbers written as text, like {cells[0]!r}" if numeric and cells else doubt
        return dataclasses.replace(column, doubt=meant)


def _opened(file: TableFile, metadata: pq.FileMetaData) -> pq.ParquetFile:
    return pq.ParquetFile(file.path, metadata=metadata, pre_buffer=False, page_checksum_verification=True)


def _footer(file: TableFile) -> tuple[pa.Schema, pq.FileMetaData]:
    try:
        with pq.ParquetFile(file.path) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file.name}: not a readable Parquet file ({display(reason)}); write it again") from None
    return schema, metadata


def _columns(file: TableFile, schema: pa.Schema) -> list[Column]:
    """What a file's schema says of its columns."""
    index, categories = _pandas_names(schema)
    columns = []
    for position, field in enumerate(schema):
        name, blank = field.name, pa.types.is_null(field.type)
        aside = row_labels(name, position)
        if name in index:
            aside = aside or "an index that pandas wrote"
        elif name in categories and _numeric(field.type):
            aside = aside or "categories, as pandas wrote them"
        problem = "" if name else f"{file.name}: column {position + 1} has no name; name it"
        columns.append(
            Column(
                name or f"(column {position + 1})", blank or _numeric(field.type), str(field.type), blank=blank,
                aside=aside, problem=problem,
            )
        )  # fmt: skip
    return columns


def _pandas_names(schema: pa.Schema) -> tuple[set[str], set[str]]:
    """The columns that were the index of a pandas frame, and those that were categories, as its metadata says."""
    try:
        written = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
        index = {name for name in written.get("index_columns", []) if isinstance(name, str)}
        kinds = {column["field_name"]: column["pandas_type"] for column in written.get("columns", [])}
    except (ValueError, AttributeError, TypeError, KeyError):
        return set(), set()  # Somebody else's metadata.
    return index, {name for name, kind in kinds.items() if kind == "categorical"}


def _numeric(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _numbers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column as a NumPy float array; NaN where a cell is null or an integer that float64 cannot hold."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    if pa.types.is_decimal(column.type):
        return decimals_to_floats(column)
    if pa.types.is_floating(column.type):
        return column.to_numpy(zero_copy_only=False)
    nulls = column.null_count
    integers = (column.fill_null(0) if nulls else column).to_numpy(zero_copy_only=False)
    numbers = integers.astype(np.float64)
    inexact = inexact_integers(integers)
    if inexact.any():
        numbers[inexact] = np.nan
    if nulls:
        numbers[column.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return numbers


def _batch(file: TableFile, first: int, arrow: pa.RecordBatch, names: Sequence[str]) -> RowBatch:
    def explain(row: int, column: int) -> Cell:
        value = arrow.column(names[column])[row].as_py()
        where = f"{file.name}:row {first + row + 1}:{display(names[column])}"
        if value is None:
            typed = not pa.types.is_null(arrow.column(names[column]).type)
            return Cell(where, "None", "is not finite, the cell is blank") if typed else Cell(where, "", "is blank")
        whole = isinstance(value, int) or (isinstance(value, decimal.Decimal) and np.isnan(numbers[column][row]))
        return Cell(where, str(value), INEXACT if whole and abs(value) > 2**53 else "")

    numbers = [_numbers(arrow.column(name)) for name in names]
    return RowBatch(numbers, explain)


def decimals_to_floats(column: pa.Array) -> np.ndarray:
    """A decimal column as float64 `[n]`; NaN where a cell is null, or an integer that float64 cannot hold.

    Arrow's own cast multiplies by a rounded power of ten, and is off by a unit in the last place for a seventh of all
    prices.

    Args:
        column: of any decimal type. Without places behind the point its cells are integers, as in text.
    """
    scale, rows = column.type.scale, len(column)
    if not rows:
        return np.zeros(0)
    unscaled, fits = _unscaled(column)
    easy = fits & (np.abs(unscaled) <= 2**53) if abs(scale) <= _EXACT_POWER else np.zeros(rows, bool)
    power = np.float64(10.0) ** abs(scale) if abs(scale) <= _EXACT_POWER else np.float64(1)
    numbers = unscaled / power if scale > 0 else unscaled * power
    hard = ~easy
    if column.null_count:
        null = column.is_null().to_numpy(zero_copy_only=False)
        hard &= ~null
        numbers[null] = np.nan
    if hard.any():
        numbers[hard] = _by_text(column.filter(pa.array(hard)))
    return numbers


def _unscaled(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The cells as integers of the last place, int64 `[n]`, and which of them int64 can hold."""
    words = column.type.bit_width // 64
    kind = "<i8" if words else "<i4"
    raw = np.frombuffer(column.buffers()[1], kind)
    stored = raw[column.offset * max(1, words) :][: len(column) * max(1, words)].reshape(len(column), -1)
    lowest = stored[:, 0].astype(np.int64)
    # The higher words of a small number repeat its sign.
    return lowest, (stored[:, 1:] == (lowest >> 63)[:, np.newaxis]).all(axis=1)


def _by_text(column: pa.Array) -> np.ndarray:
    text = column.cast(pa.string())
    numbers = text.cast(pa.float64()).to_numpy(zero_copy_only=False)
    if column.type.scale:
        return numbers
    exact = np.array([int(number) == int(word) for number, word in zip(numbers, text.to_pylist(), strict=True)])
    return np.where(exact, numbers, np.nan)
