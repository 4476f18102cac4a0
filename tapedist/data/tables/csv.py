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

from tapedist.data.tables import csv_blocks
from tapedist.data.tables.cells import NUMBER_PATTERN, is_blank, judged, meant_as_number, number, quoted
from tapedist.data.tables.columns import Column, merged, row_labels, without_repeats
from tapedist.data.tables.csv_blocks import Block, bad_text, blocks, bodies, grammar, is_clean, records, split_header
from tapedist.data.tables.files import TableFile, shown
from tapedist.data.tables.reader import Cell, RowBatch
from tapedist.errors import InputError

_SAMPLE_ROWS = 1000
_LATER_SAMPLE_ROWS = 100  # Of the files after the first, which may be thousands.
_NULLS = ["", "NA", "N/A", "nan", "NaN", "NAN", "-nan", "-NaN", "null", "NULL", "None", "#N/A"]


class CsvReader:
    """Reads text tables: comma-separated, or tab-separated where the name ends in `.tsv`.

    Which columns hold numbers is judged by the first rows of every file: at least half of the cells that are not blank.

    Args:
        files: the table, in order; columns may be in another order in each.

    Raises:
        InputError: if a header is missing or unusable.
    """

    default_target = default_weight = ""
    default_features: tuple[str, ...] = ()

    def __init__(self, files: Sequence[TableFile]):
        self._files = files
        self._headers = {}
        tables: list[tuple[str, list[Column]]] = []
        for file in files:
            line, names = _header(file)
            rows = _sample(file, _SAMPLE_ROWS if file is files[0] else _LATER_SAMPLE_ROWS)
            where = f"{file.name}:{line}"
            if len(names) == 1:
                _refuse_other_marks(where, names[0], rows, grammar(file).delimiter)
            numbers = [name for name in names if meant_as_number(name)]
            if tables and numbers and set(names) != {column.name for column in tables[0][1]}:
                raise InputError(
                    f"{where}: the first line holds {quoted(numbers[0])}, where {tables[0][0]} has column names; add "
                    "the header line"
                )
            if _has_row_names(names, rows):
                names = ("", *names)
            self._headers[file] = names
            tables.append((where, _columns(where, names, rows)))
        self.columns = merged(tables)

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


def _header(file: TableFile) -> tuple[int, tuple[str, ...]]:
    """The line and the names of a file's header."""
    first = next(blocks(file, csv_blocks.HEADER_BYTES), Block(b"", 1))
    found = records(split_header(file, first)[0], grammar(file))
    line, fields = next((record for record in found if any(map(str.strip, record[1]))), (1, []))
    names, where = tuple(field.strip() for field in fields), f"{file.name}:{line}"
    if any("\0" in name for name in names):
        raise InputError(f"{where}: {bad_text(chr(0))}")
    if not names:
        raise InputError(f"{where}: a table needs at least two columns, and this file has none; write it again")
    if all(map(meant_as_number, names)):
        raise InputError(f"{where}: the first line holds numbers, not column names; add a header line")
    return line, names


def _sample(file: TableFile, most: int) -> list[list[str]]:
    """The first rows of a file."""
    size = csv_blocks.SAMPLE_BYTES if most == _SAMPLE_ROWS else csv_blocks.HEADER_BYTES
    block = next(bodies(file, size), Block(b"", 1))
    return [fields for _, fields in itertools.islice(records(block, grammar(file)), most)]


def _has_row_names(names: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether each row begins with a label that has no place in the header, as R's `write.table` writes it.

    Pandas and R read such a file so. A row that ends in one delimiter too many looks alike, and so does a header that
    lost a name: labels are different from each other, and whole numbers or words.
    """
    if not rows or any(len(row) != len(names) + 1 for row in rows) or all(is_blank(row[-1]) for row in rows):
        return False
    labels = [row[0] for row in rows]
    whole = all(label.strip().isdecimal() or not meant_as_number(label) for label in labels)
    return whole and len(set(labels)) == len(labels) and not any(map(is_blank, labels))


def _columns(where: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Column]:
    """What a file's header and first rows say of its columns."""
    columns = []
    for position, name in enumerate(names):
        cells = [row[position] for row in rows if position < len(row) and not is_blank(row[position])]
        numeric, kind, doubt = judged(cells)
        label, problem = row_labels(name, position), f"{where}: {bad_text(name)}" if bad_text(name) else ""
        if not name:
            problem = f"{where}: column {position + 1} has no name; name it in the header"
            name = f"(column {position + 1})"
            numeric = numeric and (bool(cells) or not position)  # Blanks behind the last delimiter are nothing.
        columns.append(Column(name, numeric, kind, blank=not cells, aside=label, problem=problem, doubt=doubt))
    return without_repeats(columns, where)


def _refuse_other_marks(where: str, name: str, rows: Sequence[Sequence[str]], delimiter: str) -> None:
    """A header of one name is one column, unless it and its rows are separated by something else."""
    for mark in ";\t|, ":
        count = name.count(mark)
        if mark != delimiter and count and rows and all(row[0].strip().count(mark) >= count for row in rows[:10]):
            raise InputError(
                f"{where}: a table needs at least two columns; columns seem to be separated by {mark!r}; "
                "write .csv with ',' or .tsv with tabs"
            )


class _Parser:
    """Turns blocks of one file into rows; called from several threads."""

    def __init__(self, file: TableFile, header: Sequence[str], names: Sequence[str]):
        self._file, self._header, self._names = file, header, names
        self._positions = [header.index(name) for name in names]
        self._keys = [str(position) for position in self._positions]
        self._grammar = grammar(file)

    def parse(self, block: Block) -> RowBatch:
        if not is_clean(block):
            self._check_text(block)
        columns = self._fast(block) or self._patched(block)
        if columns is None or self._holds_huge_integers(block, columns):
            columns = self._slow(block)
        return RowBatch(columns, lambda row, column: self._explain(block, row, column))

    def _check_text(self, block: Block) -> None:
        """Refuses cells that are no text, where they play a part."""
        for line, fields in records(block, self._grammar):
            used = [fields[position] for position in self._positions] if len(fields) == len(self._header) else fields
            rule = next(filter(None, map(bad_text, used)), "")
            if rule:
                raise InputError(f"{self._file.name}:{line}: {rule}")

    def _fast(self, block: Block) -> list[np.ndarray] | None:
        """Arrow's reading, or None where it found anything odd."""
        try:
            table = self._arrow(block, self._keys, pa.float64())
        except pa.ArrowInvalid:
            return None
        return [table[key].to_numpy() for key in self._keys]

    def _patched(self, block: Block) -> list[np.ndarray] | None:
        """The same where single cells are no numbers: they become NaN. None where rows are ragged."""
        try:
            texts = self._arrow(block, self._keys, pa.string())
        except pa.ArrowInvalid:
            return None
        columns = []
        for key in self._keys:
            text = texts[key]
            good = pc.match_substring_regex(text, f"^(?:{NUMBER_PATTERN})$")
            numbers = pc.if_else(good, pc.utf8_trim(text, " \t"), pa.scalar(None, pa.string()))
            columns.append(numbers.cast(pa.float64()).to_numpy())
        return columns

    def _holds_huge_integers(self, block: Block, columns: list[np.ndarray]) -> bool:
        """Whether a number from 2**53 on is written as an integer, so that only its text tells if digits were lost."""
        huge = {key: places for key, c in zip(self._keys, columns, strict=True) if (places := np.abs(c) >= 2**53).any()}
        if not huge:
            return False
        texts = self._arrow(block, list(huge), pa.string())
        return any(
            pc.any(pc.match_substring_regex(texts[key].filter(pa.array(places)), r"^\s*[+-]?\d+\s*$")).as_py()
            for key, places in huge.items()
        )

    def _arrow(self, block: Block, keys: Sequence[str], kind: pa.DataType) -> pa.Table:
        # Columns are named by their positions: names that play no part may be anything, and be there twice.
        return pa.csv.read_csv(
            pa.BufferReader(block.data),
            pa.csv.ReadOptions(
                column_names=[str(position) for position in range(len(self._header))],
                use_threads=False, block_size=len(block.data) + 1,
            ),
            pa.csv.ParseOptions(delimiter=self._grammar.delimiter, newlines_in_values=True),
            pa.csv.ConvertOptions(include_columns=keys, column_types=dict.fromkeys(keys, kind), null_values=_NULLS),
        )  # fmt: skip

    def _slow(self, block: Block) -> list[np.ndarray]:
        """The same, cell by cell; a ragged row is NaN throughout."""
        width = len(self._header)
        rows = []
        for _, fields in records(block, self._grammar):
            if len(fields) == width:
                rows.append([number(fields[position])[0] for position in self._positions])
            else:
                rows.append([np.nan] * len(self._names))
        return list(np.array(rows, np.float64).reshape(len(rows), len(self._names)).T)

    def _explain(self, block: Block, row: int, column: int) -> Cell:
        line, fields = next(itertools.islice(records(block, self._grammar), row, None))
        where = f"{self._file.name}:{line}:{shown(self._names[column])}"
        if len(fields) != len(self._header):
            found = f"has {len(fields)} fields where the header has {len(self._header)}"
            return Cell(f"{self._file.name}:{line}", quoted(self._grammar.delimiter.join(fields)), found)
        text = fields[self._positions[column]]
        return Cell(where, quoted(text), number(text)[1])
