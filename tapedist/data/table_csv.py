"""CSV and TSV tables: Arrow parses whole blocks; a block that it refuses is read again cell by cell."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from tapedist.data import table_csv_blocks
from tapedist.data.table_cells import NUMBER_PATTERN, is_blank, meant_as_number, number, quoted
from tapedist.data.table_columns import Column, check_names
from tapedist.data.table_csv_blocks import Block, blocks, bodies, check_text, records, split_header
from tapedist.data.table_files import TableFile, shown
from tapedist.data.table_rows import Cell, RowBatch
from tapedist.errors import InputError

_SAMPLE_ROWS = 1000
_NULLS = ["", "NA", "N/A", "nan", "NaN", "NAN", "-nan", "-NaN", "null", "NULL", "None", "#N/A"]


class CsvReader:
    """Reads text tables: comma-separated, or tab-separated where the name ends in `.tsv`.

    Which columns hold numbers is judged by the first 1,000 rows: at least half of the cells that are not blank.

    Args:
        files: the table, in order; all with the same columns, in any order.

    Raises:
        InputError: if a header is missing or unusable.
    """

    default_target = default_weight = ""
    default_features: tuple[str, ...] = ()

    def __init__(self, files: Sequence[TableFile]):
        self._files = files
        headers = [self._header(file) for file in files]
        for file, header in zip(files, headers, strict=True):
            if set(header) != set(headers[0]):
                odd = sorted(set(header) ^ set(headers[0]))
                raise InputError(
                    f"{file.name}:1: its columns differ from those of {files[0].name} in "
                    f"{', '.join(map(shown, odd))}; give all files the same columns"
                )
        self._headers = dict(zip(files, headers, strict=True))
        self.columns = self._judge(files[0], headers[0])

    def segments(self, names: Sequence[str]) -> None:
        """None: text cannot be read from the middle."""

    def check_unchanged(self) -> None:
        """Raises StateError if a file changed since it was opened."""
        for file in self._files:
            file.check_unchanged()

    def batches(self, names: Sequence[str]) -> Iterator[RowBatch]:
        """All rows, parsed in as many threads as there are cores; at most a few blocks are held."""
        workers = min(8, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            waiting: collections.deque[concurrent.futures.Future[RowBatch]] = collections.deque()
            try:
                for file in self._files:
                    parser = _Parser(file, self._headers[file], names)
                    for block in bodies(file):
                        waiting.append(pool.submit(parser.parse, block))
                        if len(waiting) > workers:
                            yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    @staticmethod
    def _header(file: TableFile) -> tuple[str, ...]:
        first = next(blocks(file, table_csv_blocks.HEADER_BYTES), Block(b"", 1))
        check_text(file, first)
        line, fields = next(records(file, split_header(first)[0], _delimiter(file)), (1, []))
        names = tuple(field.strip() for field in fields)
        where = f"{file.name}:{line}"
        if names and all(map(meant_as_number, names)):
            raise InputError(f"{where}: the first line holds numbers, not column names; add a header line")
        if len(names) < 2:
            other = next((mark for mark in ";\t|," if mark in "".join(names) and mark != _delimiter(file)), "")
            hint = f"columns seem to be separated by {other!r}; " if other else ""
            raise InputError(
                f"{where}: a table needs at least two columns; {hint}write .csv with ',' or .tsv with tabs"
            )
        check_names(names, where)
        return names

    @staticmethod
    def _judge(file: TableFile, header: Sequence[str]) -> tuple[Column, ...]:
        rows = []
        for block in itertools.islice(bodies(file, table_csv_blocks.SAMPLE_BYTES), 1):
            check_text(file, block)
            rows = [fields for _, fields in itertools.islice(records(file, block, _delimiter(file)), _SAMPLE_ROWS)]
        columns = []
        for position, name in enumerate(header):
            cells = [row[position] for row in rows if position < len(row) and not is_blank(row[position])]
            numeric = 2 * sum(map(meant_as_number, cells)) >= len(cells)
            columns.append(Column(name, numeric, "numbers" if numeric else f"text ({quoted(cells[0])})"))
        return tuple(columns)


class _Parser:
    """Turns blocks of one file into rows; called from several threads."""

    def __init__(self, file: TableFile, header: Sequence[str], names: Sequence[str]):
        self._file, self._header, self._names = file, header, names
        self._positions = [header.index(name) for name in names]

    def parse(self, block: Block) -> RowBatch:
        check_text(self._file, block)
        columns = self._fast(block) or self._patched(block)
        if columns is None or self._holds_huge_integers(block, columns):
            columns = self._slow(block)
        return RowBatch(columns, lambda row, column: self._explain(block, row, column))

    def _fast(self, block: Block) -> list[np.ndarray] | None:
        """Arrow's reading, or None where it found anything odd."""
        try:
            table = self._arrow(block, self._names, pa.float64())
        except pa.ArrowInvalid:
            return None
        return [table[name].to_numpy() for name in self._names]

    def _patched(self, block: Block) -> list[np.ndarray] | None:
        """The same where single cells are no numbers: they become NaN. None where rows are ragged."""
        try:
            texts = self._arrow(block, self._names, pa.string())
        except pa.ArrowInvalid:
            return None
        columns = []
        for name in self._names:
            text = texts[name]
            good = pc.match_substring_regex(text, f"^(?:{NUMBER_PATTERN})$")
            numbers = pc.if_else(good, pc.utf8_trim(text, " \t"), pa.scalar(None, pa.string()))
            columns.append(numbers.cast(pa.float64()).to_numpy())
        return columns

    def _holds_huge_integers(self, block: Block, columns: list[np.ndarray]) -> bool:
        """Whether a number from 2**53 on is written as an integer, so that only its text tells if digits were lost."""
        huge = {
            name: places for name, c in zip(self._names, columns, strict=True) if (places := np.abs(c) >= 2**53).any()
        }
        if not huge:
            return False
        texts = self._arrow(block, list(huge), pa.string())
        return any(
            pc.any(pc.match_substring_regex(texts[name].filter(pa.array(places)), r"^\s*[+-]?\d+\s*$")).as_py()
            for name, places in huge.items()
        )

    def _arrow(self, block: Block, names: Sequence[str], kind: pa.DataType) -> pa.Table:
        return pa.csv.read_csv(
            pa.BufferReader(block.data),
            pa.csv.ReadOptions(column_names=self._header, use_threads=False, block_size=len(block.data) + 1),
            pa.csv.ParseOptions(delimiter=_delimiter(self._file), newlines_in_values=True),
            pa.csv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, kind), null_values=_NULLS),
        )

    def _slow(self, block: Block) -> list[np.ndarray]:
        """The same, cell by cell; a ragged row is NaN throughout."""
        width = len(self._header)
        rows = []
        for _, fields in records(self._file, block, _delimiter(self._file)):
            if len(fields) == width:
                rows.append([number(fields[position])[0] for position in self._positions])
            else:
                rows.append([np.nan] * len(self._names))
        return list(np.array(rows, np.float64).reshape(len(rows), len(self._names)).T)

    def _explain(self, block: Block, row: int, column: int) -> Cell:
        line, fields = next(itertools.islice(records(self._file, block, _delimiter(self._file)), row, None))
        where = f"{self._file.name}:{line}:{shown(self._names[column])}"
        if len(fields) != len(self._header):
            found = f"has {len(fields)} fields where the header has {len(self._header)}"
            return Cell(f"{self._file.name}:{line}", quoted(_delimiter(self._file).join(fields)), found)
        text = fields[self._positions[column]]
        return Cell(where, quoted(text), number(text)[1])


def _delimiter(file: TableFile) -> str:
    return "\t" if file.path.lower().endswith(".tsv") else ","
