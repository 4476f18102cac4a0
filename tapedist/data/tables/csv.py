"""CSV and TSV tables: Arrow parses whole blocks; a block that it refuses is read again cell by cell."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from tapedist.data.tables import csv_blocks
from tapedist.data.tables.columns import Column, merged, row_labels, without_repeats
from tapedist.data.tables.csv_blocks import Block, bad_text, blocks, bodies, grammar, is_clean, records, split_header
from tapedist.data.tables.files import TableFile, display
from tapedist.data.tables.reader import INEXACT, Cell, RowBatch, TableReader
from tapedist.errors import InputError

NUMBER_PATTERN = r"[ \t]*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?[ \t]*"
_NUMBER = re.compile(NUMBER_PATTERN, re.ASCII)
_INTEGER = re.compile(r"[ \t]*[+-]?\d+[ \t]*", re.ASCII)
_MOST_SHOWN = 40
_LONGEST = 100  # Of a misspelt number; patterns that go back and forth are not tried on more.

# Amounts of money, shares, and negative numbers as accountants write them, around a number with any separators.
_MONEY = "[$\u00a2\u00a3\u00a5\u20a0-\u20bf]|USD|EUR|GBP|JPY|CHF|CNY|INR|CAD|AUD|SEK|NOK|DKK|PLN|BRL"
_DIGITS = r"\d[\d.,'\u2019 \u00a0\u2009\u202f]*|[.,]\d+"
_SIGN = r"[+\-\u2212]?"
# What people and programs write for a number that is none; a column of these is still meant as numbers.
_LOOKALIKES = tuple(
    (re.compile(rf"\s*(?:{pattern})\s*", re.IGNORECASE), rule)
    for pattern, rule in (
        (r"[+-]?(nan|inf|infinity)", "is not finite"),
        (r"#(div/0!|value!|ref!|num!|name\?|null!)", "is a spreadsheet's error"),
        (
            rf"{_SIGN}\d{{1,3}}(,\d{{2,3}})*,\d{{3}}(\.\d*)?([eE][+-]?\d+)?",
            "has a thousands comma; write the digits alone (or a decimal point, if it is a decimal comma)",
        ),
        (rf"{_SIGN}[\d.]*,\d+([eE][+-]?\d+)?", "has a decimal or thousands comma; write a decimal point"),
        (r"[+-]?\d[\d_]*_\d[\d_.]*", "has underscores; write digits only"),
        (r"[+-]?0[xX][0-9a-fA-F]+", "is hexadecimal; write it in decimal"),
        (rf"{_SIGN}({_DIGITS})\s*%|%\s*{_SIGN}({_DIGITS})", "has a percent sign; write the number alone"),
        (rf"{_SIGN}\s*({_MONEY})\s*{_SIGN}({_DIGITS})", "has a currency sign; write the number alone"),
        (rf"{_SIGN}({_DIGITS})\s*({_MONEY})", "has a currency sign; write the number alone"),
        (rf"\(\s*({_MONEY})?\s*({_DIGITS})\s*\)", "has brackets for a negative number; write a minus sign"),
        (r"\u2212\d+(\.\d*)?([eE][+-]?\d+)?", "has a minus sign that is not the keyboard's; write -"),
        (
            rf"{_SIGN}\d{{1,3}}([ '\u2019\u00a0\u2009\u202f]\d{{3}})+([.,]\d*)?",
            "is text, because of the marks between its digits; write the digits alone",
        ),
        (rf"{_SIGN}\d{{1,3}}(\.\d{{3}}){{2,}}", "has thousands points; write the digits alone"),
    )
)
# Words and signs for no number, of pandas, R, Excel, databases and questionnaires.
_BLANKS = frozenset(("", "na", "n/a", "null", "none", "nil", "nat", "(null)", "\\n", "?", "-", "--", ".")) | frozenset(
    ("#n/a", "#na", "#n/a n/a", "<na>", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan")
)
_WITH_UNIT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)\s*[^\W\d_].*|[<>~]=?\s*[+-]?(\d+\.?\d*|\.\d+)", re.DOTALL)
_SAMPLE_ROWS = 1000
_LATER_SAMPLE_ROWS = 100  # Of the files after the first, which may be thousands.
_NULLS = ["", "NA", "N/A", "nan", "NaN", "NAN", "-nan", "-NaN", "null", "NULL", "None", "#N/A"]


def number(text: str) -> tuple[float, str]:
    """The number in a cell.

    Args:
        text: the cell, unquoted.

    Returns:
        `(value, "")`, or `(nan, rule)` where the rule says what is wrong.
    """
    if _NUMBER.fullmatch(text):
        value = float(text)
        if math.isinf(value):
            return math.nan, "is beyond float64 (1.8e308)"
        if abs(value) >= 2**53 and _INTEGER.fullmatch(text) and not _is_exact(value, text):
            return math.nan, INEXACT
        return value, ""
    if is_blank(text):
        return math.nan, "is blank"
    return math.nan, _lookalike(text) or "is text, not a number"


def _is_exact(value: float, text: str) -> bool:
    """Whether `value` is the integer in `text`, whose zeros in front may be more than Python's `int` reads."""
    return abs(int(value)) == int(text.strip().lstrip("+-").lstrip("0"))


def _lookalike(text: str) -> str:
    """The rule that a misspelt number breaks; empty if the text is none."""
    if len(text) > _LONGEST:
        return ""
    return next((rule for pattern, rule in _LOOKALIKES if pattern.fullmatch(text)), "")


def is_blank(text: str) -> bool:
    """Whether a cell holds nothing, or a word for nothing."""
    return text.strip().lower() in _BLANKS


def meant_as_number(text: str) -> bool:
    """Whether a cell is a number or a common misspelling of one."""
    return bool(_NUMBER.fullmatch(text) or _lookalike(text))


def judged(cells: Sequence[str]) -> tuple[bool, str, str]:
    """What a column holds, by some of its cells.

    Args:
        cells: those that are not blank.

    Returns:
        `(numeric, kind, doubt)`: at least half of the cells are meant as numbers; the kind in the user's words; why a
        user may take a column for numbers although it is not, or empty.
    """
    numbers = sum(map(meant_as_number, cells))
    if 2 * numbers >= len(cells):
        return True, "numbers", ""
    word = quoted(next(cell for cell in cells if not meant_as_number(cell)))
    doubt = ""
    if 10 * numbers >= len(cells):
        doubt = f"{numbers} of its first {len(cells)} cells are numbers, but most are not, like {word}"
    elif 2 * sum(bool(_WITH_UNIT.fullmatch(cell.strip())) for cell in cells) >= len(cells):
        doubt = f"its cells have words beside the numbers, like {word}"
    return False, f"text ({word})", doubt


def quoted(text: str) -> str:
    """A cell for a message: shortened, with control characters escaped."""
    return repr(text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "...")


class CsvReader(TableReader):
    """Reads text tables: comma-separated, or tab-separated where the name ends in `.tsv`.

    Which columns hold numbers is judged by the first rows of every file: at least half of the cells that are not blank.

    Args:
        files: the table, in order; columns may be in another order in each.

    Raises:
        InputError: if a header is missing or unusable.
    """

    def __init__(self, files: Sequence[TableFile]):
        self.files = files
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

    def batches(self, names: Sequence[str]) -> Iterator[RowBatch]:
        """All rows, parsed in as many threads as there are cores; at most a few blocks are held."""
        workers = min(8, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            waiting: collections.deque[concurrent.futures.Future[RowBatch]] = collections.deque()
            try:
                for file in self.files:
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
        where = f"{self._file.name}:{line}:{display(self._names[column])}"
        if len(fields) != len(self._header):
            found = f"has {len(fields)} fields where the header has {len(self._header)}"
            return Cell(f"{self._file.name}:{line}", quoted(self._grammar.delimiter.join(fields)), found)
        text = fields[self._positions[column]]
        return Cell(where, quoted(text), number(text)[1])
