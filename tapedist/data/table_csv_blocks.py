"""A CSV file as blocks of whole records, in bounded memory whatever the file holds."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Iterator
from typing import BinaryIO

from tapedist.data.table_files import TableFile
from tapedist.errors import InputError

BLOCK_BYTES = 4 * 2**20
SAMPLE_BYTES = 2**20
HEADER_BYTES = 2**18
MAX_RECORD_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(r"\r\n|\n|\r")


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
    line = 1
    while True:
        end = _last_record_end(held)
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
    if held.count(b'"') % 2:
        opened = line + count_lines(held[: held.rfind(b'"')])
        raise InputError(f"{file.name}:{opened}: a quote is opened and never closed; close it")
    if held:
        yield Block(held, line)


def _last_record_end(data: bytes) -> int:
    """Where the last whole record of `data` ends, or 0."""
    mark = b"\n" if b"\n" in data else b"\r"
    # A CR at the very end may be half of a CRLF.
    end = data.rfind(mark, 0, len(data) - (mark == b"\r")) + 1
    quotes = data.count(b'"', 0, end)
    while quotes % 2:
        earlier = data.rfind(mark, 0, end - 1) + 1
        quotes -= data.count(b'"', earlier, end)
        end = earlier
    return end


def _too_long(file: TableFile, held: bytes, line: int) -> str:
    size = f"{MAX_RECORD_BYTES // 2**20} MiB"
    if held.count(b'"') % 2:
        return f"{file.name}:{line}: a quote is opened and not closed within {size}; close it"
    return f"{file.name}:{line}: the line is longer than {size}; is this a text table?"


def split_header(block: Block) -> tuple[Block, Block]:
    """The first record of a file's first block, and the rest; blank lines before it go with it."""
    data, end = block.data, 0
    for match in re.finditer(rb"\r\n|\n|\r", data):
        end = match.end()
        if data[:end].strip() and data.count(b'"', 0, end) % 2 == 0:
            break
    else:
        end = len(data)
    return Block(data[:end], block.first_line), Block(data[end:], block.first_line + count_lines(data[:end]))


def bodies(file: TableFile, block_bytes: int | None = None) -> Iterator[Block]:
    """The blocks of a file without its header."""
    for number, block in enumerate(blocks(file, block_bytes)):
        rest = block if number else split_header(block)[1]
        if rest.data:
            yield rest


def check_text(file: TableFile, block: Block) -> None:
    """Refuses bytes that are no text.

    Raises:
        InputError: naming the line.
    """
    at = block.data.find(b"\0")
    if at >= 0:
        line = block.first_line + count_lines(block.data[:at])
        raise InputError(f"{file.name}:{line}: holds a NUL byte; save the table as UTF-8 text")
    if not block.data.isascii():
        try:
            block.data.decode()
        except UnicodeDecodeError as error:
            line = block.first_line + count_lines(block.data[: error.start])
            byte = f"0x{block.data[error.start]:02x}"
            raise InputError(f"{file.name}:{line}: byte {byte} is not UTF-8; save the table as UTF-8") from None


def records(file: TableFile, block: Block, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """`(line, fields)` of each record; blank lines are passed over. Slow, exact about lines.

    Raises:
        InputError: if a field is longer than Python's csv module takes.
    """
    text = block.data.decode()
    if '"' not in text:
        for offset, record in enumerate(_LINE_END.split(text)):
            if record:
                yield block.first_line + offset, record.split(delimiter)
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    line = block.first_line
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = block.first_line + reader.line_num
    except csv.Error as error:
        raise InputError(f"{file.name}:{line}: {error}; shorten the field") from None
