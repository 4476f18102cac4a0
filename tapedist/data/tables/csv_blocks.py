"""A CSV file as blocks of whole records, in bounded memory whatever the file holds.

One grammar says what a record is, for cutting and for reading: a quote counts where a field begins with it, and nowhere
else, as for pandas, Arrow and Python's csv module.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import BinaryIO

from tapedist.data.tables.files import TableFile
from tapedist.errors import InputError

BLOCK_BYTES = 4 * 2**20
SAMPLE_BYTES = 2**20
HEADER_BYTES = 2**18
MAX_RECORD_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\n|\r")


class Grammar:
    """How records are told apart where fields are separated by `delimiter`.

    Attributes:
        delimiter: one ASCII character.
        content: matches what belongs to one record, without its line end; stops before a quote that is never closed.
        records: matches as many whole records as there are. A CR at the very end is none's: it may be half of a CRLF.
        field: one field of decoded text: what was quoted, what was not, and the delimiter, line end or nothing.
    """

    def __init__(self, delimiter: str):
        self.delimiter = delimiter
        begin = rf"(?<![^{delimiter}\r\n])"  # Nothing, or what ends a field, stands before.
        inner = r'[^"]*+(?:""[^"]*+)*+'
        # Possessive throughout: tokens are never split otherwise, and time is linear.
        content = rf'(?:[^"\r\n]++|{begin}"{inner}"|(?<=[^{delimiter}\r\n])")*+'
        self.content = re.compile(content.encode())
        self.records = re.compile(rf"(?:{content}(?:\r\n|\n|\r(?!\Z)))*+".encode())
        self.field = re.compile(rf'(?:"({inner})")?([^{delimiter}\r\n]*+)({delimiter}|\r\n|\n|\r|\Z)')


_COMMAS, _TABS = Grammar(","), Grammar("\t")


def grammar(file: TableFile) -> Grammar:
    """Tabs where the name ends in `.tsv`, else commas."""
    return _TABS if file.path.lower().endswith(".tsv") else _COMMAS


@dataclasses.dataclass(frozen=True)
class Block:
    """Whole records of one file.

    Attributes:
        data: their bytes.
        first_line: the line in the file on which they start, from 1.
    """

    data: bytes
    first_line: int


def count_lines(data: bytes) -> int:
    """Line ends (LF, CRLF or CR) in `data`."""
    lines = data.count(b"\n")
    return lines if b"\r" not in data else lines + data.count(b"\r") - data.count(b"\r\n")


def blocks(file: TableFile, block_bytes: int | None = None) -> Iterator[Block]:
    """Cuts a file at record ends; a line end inside quotes is none.

    Args:
        file: the file.
        block_bytes: bytes read at a time; None means `BLOCK_BYTES`.

    Raises:
        InputError: if the text is UTF-16, if a record is longer than `MAX_RECORD_BYTES`, or if a quote stays open.
        StateError: if the file changed since it was opened.
    """
    block_bytes = block_bytes or BLOCK_BYTES
    with open(file.path, "rb", buffering=0) as stream:
        head = stream.read(block_bytes)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{file.name}:1: is UTF-16; save the table as UTF-8")
        yield from _cut(file, stream, head.removeprefix(_BOM), block_bytes)
    file.check_unchanged()


def _cut(file: TableFile, stream: BinaryIO, held: bytes, block_bytes: int) -> Iterator[Block]:
    line, marks = 1, grammar(file)
    while True:
        end = _last_record_end(held, marks)
        if end:
            yield Block(held[:end], line)
            line += count_lines(held[:end])
            held = held[end:]
        if len(held) > MAX_RECORD_BYTES:
            raise InputError(_too_long(file, held, line))
        more = stream.read(block_bytes)
        if not more:
            break
        held += more
    opened = _open_quote(held, marks)
    if opened is not None:
        at = line + count_lines(held[:opened])
        raise InputError(f"{file.name}:{at}: a quote is opened and never closed; close it")
    if held:
        yield Block(held, line)


def _last_record_end(data: bytes, marks: Grammar) -> int:
    """Where the last whole record of `data`, which begins with one, ends; or 0."""
    if b'"' in data:
        match = marks.records.match(data)
        assert match
        return match.end()
    mark = b"\n" if b"\n" in data else b"\r"
    return data.rfind(mark, 0, len(data) - (mark == b"\r")) + 1


def _open_quote(data: bytes, marks: Grammar) -> int | None:
    """Where a quote is that is not closed within `data`, the beginning of a record; None if there is none."""
    if b'"' not in data:
        return None
    match = marks.content.match(data)
    assert match
    return match.end() if data[match.end() : match.end() + 1] == b'"' else None


def _too_long(file: TableFile, held: bytes, line: int) -> str:
    size = f"{MAX_RECORD_BYTES // 2**20} MiB"
    if _open_quote(held, grammar(file)) is not None:
        return f"{file.name}:{line}: a quote is opened and not closed within {size}; close it"
    return f"{file.name}:{line}: the line is longer than {size}; is this a text table?"


def split_header(file: TableFile, block: Block) -> tuple[Block, Block]:
    """The first record of a file's first block, and the rest; blank lines before it go with it."""
    data, start, marks = block.data, 0, grammar(file)
    while start < len(data):
        match = marks.content.match(data, start)
        assert match
        end = match.end()
        line_end = _LINE_END.match(data, end)
        blank, start = not data[start:end].strip(), line_end.end() if line_end else len(data)
        if not blank:
            break
    return Block(data[:start], block.first_line), Block(data[start:], block.first_line + count_lines(data[:start]))


def bodies(file: TableFile, block_bytes: int | None = None) -> Iterator[Block]:
    """The blocks of a file without its header."""
    for number, block in enumerate(blocks(file, block_bytes)):
        rest = block if number else split_header(file, block)[1]
        if rest.data:
            yield rest


def records(block: Block, marks: Grammar) -> Iterator[tuple[int, list[str]]]:
    """`(line, fields)` of each record; blank lines are passed over. Slow, exact about lines.

    Bytes that are no UTF-8 become lone surrogates, as in Python's file names.
    """
    text, line = block.data.decode(errors="surrogateescape"), block.first_line
    place = 0
    while place < len(text):
        fields, first, lines = [], place, 1
        while True:
            match = marks.field.match(text, place)
            assert match
            quoted, rest, end = match.groups()
            place = match.end()
            if quoted is None:
                fields.append(rest)
            else:
                fields.append(quoted.replace('""', '"') + rest)
                lines += _text_lines(quoted)
            if end != marks.delimiter:
                break
        # A line without anything in it; a pair of quotes is something.
        if len(fields) > 1 or place - len(end) > first:
            yield line, fields
        line += lines


def _text_lines(text: str) -> int:
    return text.count("\n") + text.count("\r") - text.count("\r\n")


def bad_text(text: str) -> str:
    """The rule that a cell's text breaks, or empty."""
    if "\0" in text:
        return "holds a NUL byte; save the table as UTF-8 text"
    odd = next((c for c in text if "\ud800" <= c <= "\udfff"), "") if not text.isascii() else ""
    return f"byte 0x{ord(odd) - 0xDC00:02x} is not UTF-8; save the table as UTF-8" if odd else ""


def is_clean(block: Block) -> bool:
    """Whether a block holds nothing but UTF-8 text."""
    if block.data.isascii():
        return b"\0" not in block.data
    try:
        return "\0" not in block.data.decode()
    except UnicodeDecodeError:
        return False
