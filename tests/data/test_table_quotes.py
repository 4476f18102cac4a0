"""A quote counts where a field begins with it: blocks are cut as fields are read, and both as pandas and Arrow do."""

from __future__ import annotations

import csv
import io
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapedist.data.tables import csv_blocks
from tapedist.data.tables.csv_blocks import Block, blocks, grammar, records
from tapedist.data.tables.files import TableFile
from tapedist.data.tables.table import open_table
from tapedist.errors import InputError

_PIECES = st.lists(
    st.sampled_from(['"', '""', ",", "\n", "\r\n", "\r", "a", " ", "1", '",', ',"', '"\n', '\n"', "\u00e9"]),
    max_size=25,
)


def _read(path: Path, block_bytes: int) -> list[tuple[int, list[str]]] | str:
    """Lines and fields of a file that is read in blocks of a size, or the error."""
    file = TableFile.of(str(path))
    try:
        return [record for block in blocks(file, block_bytes) for record in records(block, grammar(file))]
    except InputError as error:
        return error.problems[0]


def _by_csv(text: str, delimiter: str) -> list[list[str]]:
    return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]


def _by_arrow(text: str, delimiter: str, width: int) -> list[list[str]]:
    names = [str(position) for position in range(width)]
    table = pa.csv.read_csv(
        pa.BufferReader(text.encode()),
        pa.csv.ReadOptions(column_names=names, use_threads=False),
        pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )
    return [list(row) for row in zip(*(table[name].to_pylist() for name in names), strict=True)]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(_PIECES, st.sampled_from([".csv", ".tsv"]))
def test_cutting_and_reading_agree_with_csv_and_arrow(pieces: list[str], end: str):
    delimiter = "\t" if end == ".tsv" else ","
    text = "".join(pieces).replace(",", delimiter) or "a"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"t{end}")
        path.write_bytes(text.encode())
        whole = _read(path, 10_000)
        assert all(_read(path, block_bytes) == whole for block_bytes in (1, 2, 3, 5, 8))
    if isinstance(whole, str):
        # To the csv module, too, the last record is still open: what follows belongs to it.
        assert whole.endswith("a quote is opened and never closed; close it")
        assert len(_by_csv(f'{text}{delimiter}\n"', delimiter)) == len(_by_csv(text, delimiter))
        return
    rows = [fields for _, fields in whole]
    assert rows == _by_csv(text, delimiter)
    if len({len(row) for row in rows}) == 1:
        assert rows == _by_arrow(text, delimiter, len(rows[0]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text('",\r\n a6\u2033', max_size=6), st.booleans()), min_size=1, max_size=12))
def test_every_row_of_a_written_table_is_read(notes: list[tuple[str, bool]]):
    """Notes with quotes anywhere, quoted by the writer where they must be, or as they are where that is safe."""
    lines = ['size (in"),note,y']
    for number, (note, quoted) in enumerate(notes):
        bare = not quoted and not note.startswith('"') and not set(note) & set(",\r\n")
        lines.append(f"{number},{note if bare else chr(34) + note.replace(chr(34), chr(34) * 2) + chr(34)},{-number}")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "t.csv")
        path.write_text("\n".join(lines) + "\n", newline="")
        for block_bytes in (3, 17, 2**20):
            patch.setattr(csv_blocks, "BLOCK_BYTES", block_bytes)
            source = open_table(str(path), target="y", features=('size (in")',), test_fraction=0.0)
            x, y = source.rows("train", np.arange(source.num_rows("train")))
            assert x[:, 0].tolist() == list(range(len(notes)))
            assert y.tolist() == [-number for number in range(len(notes))]


@pytest.mark.parametrize(
    ("text", "names", "rows"),
    [
        ('bore (in"),note,y\n1,ok,2\n3,6" steel,4\n5,ok,6\n', ('bore (in")',), [[1, 2], [3, 4], [5, 6]]),
        ('a,note,y\n1,6",2\n3,"6",4\n5,7",6\n', ("a",), [[1, 2], [3, 4], [5, 6]]),
        ('a,note,y\n1, "x,2\n3,y",4\n', ("a",), [[1, 2], [3, 4]]),
        ('a,note,y\n1,"x ""y"" z",2\n3,"",4\n', ("a",), [[1, 2], [3, 4]]),
        ('a,note,y\n1,"two\nlines, and ""a quote""",2\n3,"x"y",4\n', ("a",), [[1, 2], [3, 4]]),
        ('"a ""b""",note,y\n1,",",2\n', ('a "b"',), [[1, 2]]),
        ('"a\nb",note,y\n1,u,2\n', ("a\nb",), [[1, 2]]),
        ('note,a,y\r\n"\r\n",1,2\r\n6",3,4\r\n', ("a",), [[1, 2], [3, 4]]),
        ('a,y\n"1","2"\n"3",4\n', ("a",), [[1, 2], [3, 4]]),
    ],
)
@pytest.mark.parametrize("end", [".csv", ".tsv"])
def test_quotes_in_headers_and_cells(tmp_path: Path, text: str, names: tuple[str, ...], rows: list, end: str):
    path = tmp_path / f"t{end}"
    path.write_text(text.replace(",", "\t") if end == ".tsv" else text, newline="")
    source = open_table(str(path), target="y", test_fraction=0.0)
    assert tuple(name.replace("\t", ",") for name in source.feature_names) == names
    x, y = source.rows("train", np.arange(source.num_rows("train")))
    assert np.column_stack([x, y]).tolist() == rows


def test_lines_are_counted_and_open_quotes_are_found(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text('a,note,y\n1,6",2\n3,"two\nlines",4\n5,"open,6\n7,8",9"\n8,"x,1\n')
    with pytest.raises(InputError, match=r"t\.csv:7: a quote is opened and never closed; close it"):
        open_table(str(path), target="y", test_fraction=0.0)
    path.write_text('a,note,y\n1,6",2\n3,"two\nlines",4\n5,"",oops\n')
    with pytest.raises(InputError, match=r"t\.csv:5:y: 'oops' is text"):
        open_table(str(path), target="y", test_fraction=0.0)


def test_fields_of_any_length_are_read(tmp_path: Path):
    """Python's csv module would take no more than 131,072 characters, unless the whole process is set otherwise."""
    path = tmp_path / "t.csv"
    path.write_text(f'a,note,y\n1,"{"x" * 200_000}",2\n3,u,oops\n')
    source = open_table(str(path), target="y", test_fraction=0.0, on_bad_rows="drop")
    assert source.num_rows("train") == 1


def test_cutting_takes_linear_time():
    data = b'"a""b",6",x y\n' * 100_000
    marks = grammar(TableFile("t.csv", 0, 0, (0, 0)))
    assert marks.records.match(data).end() == len(data)
    assert sum(1 for _ in records(Block(data, 1), marks)) == 100_000
