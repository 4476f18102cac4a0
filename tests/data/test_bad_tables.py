"""What is wrong with a table is said in one line that names the place, the value, the rule and the fix."""

from __future__ import annotations

import io
import os
import socket
import struct
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tapedist.data.tables import csv_blocks, npy, store
from tapedist.data.tables.table import check_table, open_table
from tapedist.errors import InputError, StateError, StorageError

GOOD = b"a,b,y\n1,2,3\n4,5,6\n7,8,9\n"


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def _opened(path: str, **settings):
    return open_table(path, **{"target": "y", "test_fraction": 0.0, **settings})


def _refused(path: str, **settings) -> str:
    """The one line that refuses a table."""
    with pytest.raises(InputError) as caught:
        _opened(path, **settings)
    message = str(caught.value)
    assert message.isprintable()
    assert len(caught.value.problems) == 1
    return message


def _all(source) -> list[list[float]]:
    """`[*x, y]` of every training row."""
    x, y = source.rows("train", np.arange(source.num_rows("train")))[:2]
    return np.column_stack([x, y]).tolist()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"a,a,y\n1,2,3\n", "t.csv:1: duplicate column a in the header; rename one"),
        (b"a,,y\n1,2,3\n", "t.csv:1: column 2 has no name"),
        (b"1,2.5,-3e4\n1,2,3\n", "t.csv:1: the first line holds numbers, not column names; add a header"),
        (b"a,b,z\n1,2,3\n", "--target=y: no such column in {path}; present: a, b, z"),
        (b"a;b;y\n1;2;3\n", "t.csv:1: a table needs at least two columns; columns seem to be separated by ';'"),
        (b"word,y\nup,3\ndown,4\n", "no numeric column is left to be a feature; present: word, y"),
        (b"a,y\n1,up\n2,down\n", "--target=y: holds text ('up'), not numbers"),
        (b"\n\n", "t.csv:1: a table needs at least two columns"),
    ],
)
def test_header(tmp_path: Path, header: bytes, message: str):
    path = _write(tmp_path / "t.csv", header)
    with pytest.raises(InputError) as caught:
        check_table(path, target="y")
    assert message.format(path=path) in str(caught.value)


@pytest.mark.parametrize(
    ("roles", "messages"),
    [
        ({"target": "y", "features": ("a", "y")}, ["--target=y: is among --features"]),
        ({"target": "y", "features": ("a", "a")}, ["--features=a,a: names a column twice"]),
        ({"target": "y", "features": ("a", "q")}, ["--features=q: no such column", "present: a, b, y"]),
        ({"target": "Y"}, ["--target=Y: no such column", "; did you mean y? present: a, b, y"]),
        ({"target": "y", "features": ("a", "")}, ["--features=a,: holds an empty name; leave out the comma"]),
        ({"target": "y", "weight": "y"}, ["--weight=y: is the target too"]),
        ({"target": "y", "weight": "a", "features": ("a",)}, ["--weight=a: is among --features"]),
        ({"target": ""}, ["--target='': must name the column", "present: a, b, y"]),
        ({"target": "q", "weight": "\x1b[31m"}, ["--target=q", "--weight='\\x1b[31m'"]),
    ],
)
def test_columns_asked_for(tmp_path: Path, roles: dict, messages: list[str]):
    path = _write(tmp_path / "t.csv", GOOD)
    with pytest.raises(InputError) as caught:
        check_table(path, **roles)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("abc", "'abc' is text, not a number"),
        ("", "'' is blank"),
        ("   ", "'   ' is blank"),
        ("NA", "'NA' is blank"),
        ("nan", "'nan' is not finite"),
        ("inf", "'inf' is not finite"),
        ("-Infinity", "'-Infinity' is not finite"),
        ("1e999", "'1e999' is beyond float64"),
        ("1e39", "'1e39' is beyond float32 (3.4e38); use --dtype=float64"),
        ('"1,5"', "'1,5' has a decimal or thousands comma"),
        ('"1.000,5"', "'1.000,5' has a decimal or thousands comma"),
        ("1_000", "'1_000' has underscores"),
        ("0x10", "'0x10' is hexadecimal"),
        ("9007199254740993", "'9007199254740993' is an integer beyond 2**53"),
        ("\x1b[31m", "'\\x1b[31m' is text"),
        ("1\u00a0000", "'1\\xa0000' is text"),
    ],
)
def test_cell(tmp_path: Path, cell: str, reason: str):
    path = _write(tmp_path / "t.csv", f"a,b,y\n1,2,3\n\n4,{cell},6\n7,8,9\n".encode())
    message = _refused(path)
    assert message.startswith(f"{path}:4:b: {reason}")
    assert "--on_bad_rows=drop" in message
    dropped = _opened(path, on_bad_rows="drop")
    assert _all(dropped) == [[1, 2, 3], [7, 8, 9]]
    assert dropped.num_dropped == 1
    assert "1 of 3 rows have bad cells" in dropped.notices[0]
    assert _all(_opened(path, on_bad_rows="mean")) == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize("cell", ["+2", " 2.0 ", "2.", "02", "2e0", '"2"', ".2E1", "\t2"])
def test_spelling_of_a_number_is_free(tmp_path: Path, cell: str):
    path = _write(tmp_path / "t.csv", f"a,b,y\n1,{cell},3\n4,+5,6\n".encode())
    assert _all(_opened(path)) == [[1, 2, 3], [4, 5, 6]]


def test_large_numbers_that_float64_holds_are_exact(tmp_path: Path):
    path = _write(tmp_path / "t.csv", b"a,b,y\n9007199254740994,1e300,3\n-1152921504606846976,5e-324,6\n")
    assert _all(_opened(path, dtype="float64")) == [[2.0**53 + 2, 1e300, 3], [-(2.0**60), 5e-324, 6]]


@pytest.mark.parametrize(
    ("row", "found"), [(b"4,5", "has 2 fields"), (b"4,5,6,7", "has 4 fields"), (b"1,5;2,5;3,5", "has 4 fields")]
)
def test_ragged_row(tmp_path: Path, row: bytes, found: str):
    path = _write(tmp_path / "t.csv", b"a,b,y\n1,2,3\n" + row + b"\n7,8,9\n")
    assert f"{path}:3: '{row.decode()}' {found} where the header has 3" in _refused(path)
    for on_bad_rows in ("drop", "mean"):
        assert _all(_opened(path, on_bad_rows=on_bad_rows)) == [[1, 2, 3], [7, 8, 9]]


def test_line_numbers_count_lines_inside_quotes(tmp_path: Path):
    path = _write(tmp_path / "t.csv", b'note,b,y\r\n"two\r\nlines",2,3\r\n"say ""x""",oops,6\r\nz,1,1\r\n')
    assert _refused(path).startswith(f"{path}:4:b: 'oops' is text")


def test_negative_and_zero_weights(tmp_path: Path):
    path = _write(tmp_path / "t.csv", b"a,y,w\n1,2,1\n3,4,-1\n")
    assert f"{path}:3:w: '-1' is a negative weight" in _refused(path, weight="w")
    path = _write(tmp_path / "z.csv", b"a,y,w\n1,2,0\n3,4,0\n")
    assert "--weight=w: is 0 in every training row" in _refused(path, weight="w")


def test_mean_of_no_good_cell(tmp_path: Path):
    path = _write(tmp_path / "t.csv", b"a,b,y\n1,,3\n4,,6\n")
    message = _refused(path, on_bad_rows="mean", features=("a", "b"))
    assert "--features=b: has no good cell" in message
    assert message.endswith("leave it out by --features=a")
    message = _refused(path, on_bad_rows="drop", features=("a", "b"))
    assert (
        "holds no good row among 2 below its header: no cell of b can be used; leave it out by --features=a" in message
    )


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"\n", b"\r\n"),
        GOOD.replace(b"\n", b"\r"),
        GOOD.removesuffix(b"\n"),
        b"\n" + GOOD + b"\n\n",
        GOOD.replace(b"a,b", b'"a", b '),
    ],
    ids=["bom", "crlf", "cr", "no final newline", "blank lines", "quoted header"],
)
def test_text_that_is_accepted(tmp_path: Path, data: bytes):
    source = _opened(_write(tmp_path / "t.csv", data))
    assert source.feature_names == ("a", "b")
    assert _all(source) == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"a,b,y\n", "holds no rows below its header"),
        (GOOD.decode().encode("utf-16"), ":1: is UTF-16; save the table as UTF-8"),
        (GOOD.decode().encode("utf-16-le"), ":1: holds a NUL byte"),
        (GOOD + b"caf\xe9,1,2\n", ":5: byte 0xe9 is not UTF-8"),
        (GOOD + b"1,\x002,3\n", ":5: holds a NUL byte"),
        (GOOD + b'1,"2,3\n4,5,6\n', ":5: a quote is opened and never closed"),
    ],
    ids=["empty", "header only", "utf-16", "utf-16 without mark", "latin-1", "nul", "unclosed quote"],
)
def test_text_that_is_refused(tmp_path: Path, data: bytes, message: str):
    path = _write(tmp_path / "t.csv", data)
    assert message in _refused(path)


def test_bad_cells_far_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 4096)
    lines = [f'"t\n{i}",{i},{i}' for i in range(5000)]
    lines[4321] = '"t\n4321",4321,oops'
    path = _write(tmp_path / "t.csv", "\n".join(["text,b,y", *lines]).encode())
    assert _refused(path).startswith(f"{path}:{2 + 2 * 4321}:y: 'oops' is text")


@pytest.mark.parametrize("start", [b"a,b,y\n1,2,3\n", b'a,b,y\n1,"', b""], ids=["row", "quote", "header"])
def test_endless_line_takes_bounded_memory_and_time(tmp_path: Path, start: bytes):
    path = tmp_path / "t.csv"
    with path.open("wb") as stream:
        stream.write(start)
        for _ in range(8):
            stream.write(b"7" * 2**20)
        stream.truncate(2**30)  # The rest is a hole of NULs: no newline for a gigabyte.
    began = time.perf_counter()
    message = _refused(str(path))
    assert time.perf_counter() - began < 2
    assert "16 MiB" in message


def test_special_files_are_refused_unopened(tmp_path: Path):
    os.mkfifo(tmp_path / "f.csv")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.csv"))
        for path in (tmp_path / "f.csv", tmp_path / "s.csv", Path("/dev/zero")):
            assert "not a regular file" in _refused(str(path))
    (tmp_path / "link.csv").symlink_to("/dev/zero")
    assert "not a regular file" in _refused(str(tmp_path / "link.csv"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.csv", "no such file or directory"),
        ("*.csv", "no file matches this pattern"),
        ("empty_folder", "the folder holds no table"),
        ("t.xlsx", "unknown kind of table; known are CSV"),
        ("mixed", "mixes csv and npy files"),
        ("a\0b.csv", "a path cannot hold NUL"),
        ("no\x1bne.csv", "no such file or directory"),
    ],
)
def test_path(tmp_path: Path, name: str, message: str):
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "mixed").mkdir()
    _write(tmp_path / "mixed" / "a.csv", GOOD)
    np.save(tmp_path / "mixed" / "b.npy", np.zeros((3, 3)))
    _write(tmp_path / "t.xlsx", b"PK")
    assert message in _refused(str(tmp_path / name))


def test_files_of_a_folder_must_agree(tmp_path: Path):
    _write(tmp_path / "a.csv", GOOD)
    _write(tmp_path / "b.csv", b"a,c,y\n1,2,3\n")
    assert "b.csv:1: its columns differ from those of" in _refused(str(tmp_path))


def _npy(array: np.ndarray, *, shape: str = "") -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    data = stream.getvalue()
    return data.replace(str(array.shape).encode().ljust(len(shape)), shape.encode()) if shape else data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_npy(np.array([[1, None]], object)), "holds Python objects, which are never loaded"),
        (_npy(np.zeros((4, 2), complex)), "holds complex128, not real numbers"),
        (_npy(np.zeros((4, 2), "M8[s]")), "holds datetime64[s], not real numbers"),
        (_npy(np.zeros((4, 2), np.longdouble)), "not real numbers of up to 64 bits"),
        (_npy(np.zeros(4, [("a", "f8"), ("y", "f8")])), "is a structured array"),
        (_npy(np.zeros((2, 2, 2))), "has shape [2, 2, 2]"),
        (_npy(np.zeros((4, 2)), shape="(9, 2)"), "promises 144 bytes of numbers, the file holds 64"),
        (_npy(np.zeros((4, 2)), shape="(1, 2)"), "promises 16 bytes of numbers, the file holds 64"),
        (_npy(np.zeros((4, 2)))[:-8], "promises 64 bytes of numbers, the file holds 56"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "not a NumPy array"),
        (b"plain text", "not a NumPy array"),
        (_npy(np.zeros((0, 2))), "holds no rows"),
    ],
)
def test_npy_that_is_refused(tmp_path: Path, data: bytes, message: str):
    assert message in _refused(_write(tmp_path / "t.npy", data), target="x1")


@pytest.mark.parametrize("kind", ["<f2", ">f4", ">f8", "<f4", ">i2", "<u8", "i1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_exact_kind(tmp_path: Path, kind: str, order: str):
    array = np.asarray(np.arange(40).reshape(10, 4), kind, order=order)
    np.save(tmp_path / "t.npy", array)
    np.savez(tmp_path / "u.npz", x=array)
    np.savez_compressed(tmp_path / "c.npz", x=array)
    for name in ("t.npy", "u.npz", "c.npz"):
        assert _all(_opened(str(tmp_path / name), target="x3")) == array.astype(float).tolist()


def test_integers_beyond_float64(tmp_path: Path):
    rows = {"a": np.array([1, 2**53 + 1, 2**60]), "y": np.array([1, 2, 2**63 - 1])}
    np.savez(tmp_path / "t.npz", **rows)
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    np.savez(tmp_path / "u.npz", a=np.array([1, 2, 3]), y=np.array([1, 2, 2**64 - 1], np.uint64))
    for name in ("t.npz", "t.parquet"):
        assert "row 2:a: 9007199254740993 is an integer beyond 2**53" in _refused(str(tmp_path / name))
        assert _all(_opened(str(tmp_path / name), on_bad_rows="drop")) == [[1, 1]]
    assert "row 3:y: 18446744073709551615 is an integer beyond 2**53" in _refused(str(tmp_path / "u.npz"))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_bad_cells_of_binary_tables(tmp_path: Path, value: float):
    rows = {"a": np.array([1, value, 3]), "y": np.array([4.0, 5, 6])}
    np.savez(tmp_path / "t.npz", **rows)
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    for name in ("t.npz", "t.parquet"):
        reason = "is beyond float32" if value == 1e39 else "is not finite"
        assert f"{name}:row 2:a: {value} {reason}" in _refused(str(tmp_path / name))
        assert _all(_opened(str(tmp_path / name), on_bad_rows="drop")) == [[1, 4], [3, 6]]
        assert _all(_opened(str(tmp_path / name), on_bad_rows="mean")) == [[1, 4], [2, 5], [3, 6]]
    if value == 1e39:
        assert _opened(str(tmp_path / "t.npz"), dtype="float64").num_rows("train") == 3


def _npz_bomb(path: Path):
    np.savez_compressed(path, x=np.zeros(200_000), y=np.zeros(200_000))


def _npz_twice(path: Path):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("x.npy", _npy(np.zeros(3)))


def _npz_liar(path: Path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", _npy(np.zeros((4, 2)), shape="(9, 2)"))


def _npz_damaged(path: Path):
    np.savez_compressed(path, x=np.arange(1000.0), y=np.arange(1000.0))
    data = bytearray(path.read_bytes())
    data[600] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_npz_bomb, "would grow"),
        (_npz_twice, "holds x.npy twice"),
        (_npz_liar, "t.npz:x: its header promises 144 bytes"),
        (_npz_damaged, "t.npz"),
        (lambda path: np.savez(path, x=np.zeros(3), y=np.zeros(4)), "x has 3 rows and y has 4"),
        (lambda path: np.savez(path, x=np.zeros((3, 2)), x0=np.zeros(3), y=np.zeros(3)), "duplicate column x0"),
        (lambda path: np.savez(path, x=np.array([None]), y=np.zeros(1)), "holds Python objects"),
        (lambda path: path.write_bytes(b"PK\3\4 no archive"), "not a readable .npz archive"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "holds no arrays"),
    ],
)
def test_npz_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write, message: str):
    monkeypatch.setattr(npy, "_BOMB_BYTES", 2**20)
    write(tmp_path / "t.npz")
    assert message in _refused(str(tmp_path / "t.npz"))


def test_parquet_that_is_refused(tmp_path: Path):
    path = str(tmp_path / "t.parquet")
    _write(tmp_path / "t.parquet", b"PAR1 but no footer")
    assert "not a readable Parquet file" in _refused(path)
    pq.write_table(pa.table({"a": ["u", "v"], "y": [1.0, 2.0]}), path)
    assert "no numeric column is left" in _refused(path)
    assert "--features=a: holds string, not numbers" in _refused(path, features=("a",))
    pq.write_table(pa.table({"a": [1.0, None], "y": [1.0, 2.0]}), path)
    assert "row 2:a: None is not finite" in _refused(path)
    pq.write_table(
        pa.table({"a": np.random.default_rng(0).normal(size=9000), "y": np.zeros(9000)}), path, write_page_checksum=True
    )
    data = bytearray(Path(path).read_bytes())
    data[200:260] = struct.pack("60x")
    Path(path).write_bytes(data)
    assert "t.parquet:row 1: cannot be decoded" in _refused(path)


def test_change_while_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of rows that are decoded anew; others were read once for all."""
    monkeypatch.setattr(store, "_SPARE_BYTES", 2**62)
    monkeypatch.setattr(store, "_HELD_BYTES", 2**18)
    rows = {"a": np.arange(400_000.0), "y": np.zeros(400_000)}
    for name in ("t.parquet", "t.npz"):
        path = tmp_path / name
        if name == "t.npz":
            np.savez(path, **rows)
        else:
            pq.write_table(pa.table(rows), path, row_group_size=10_000)
        source = _opened(str(path), memory_budget=1_000_000)
        assert source.rows("train", np.array([5]))[0].tolist() == [[5.0]]
        os.utime(path, ns=(1, 1))
        with pytest.raises(StateError, match="changed while in use"):
            source.rows("train", np.array([399_999]))
        path.unlink()
        with pytest.raises(StateError, match="while in use"):
            source.rows("train", np.array([300_000]))


def test_change_while_it_is_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 1024)
    path = _write(tmp_path / "t.csv", b"a,y\n" + b"1,2\n" * 10_000)
    header = check_table(path, target="y")
    batches = header.reader.batches(("a", "y"))
    next(batches)
    with open(path, "ab") as stream:
        stream.write(b"3,4\n")
    with pytest.raises(StateError, match="changed while in use"):
        list(batches)


@pytest.mark.parametrize("in_order", [True, False])
def test_scratch_disk_full(tmp_path: Path, in_order: bool, run_python):
    """What cannot be written is decoded anew, where that will do."""
    path = _write(tmp_path / "t.csv", b"a,y\n" + b"1,2\n" * 200_000)
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))\n"
        "from tapedist.data.tables.table import open_table; from tapedist.errors import StorageError\n"
        f"try: source = open_table({path!r}, target='y', memory_budget=1_000_000, in_order={in_order})\n"
        "except StorageError as error: print(error.exit_code, error)\n"
        "else: print(source.storage, source.notices[0], source.rows('train', range(5))[1])"
    )
    done = run_python("-c", code)
    assert "--scratch_dir= (" in done.out, done.err
    assert "file too large while rows are kept there" in done.out
    if in_order:
        assert done.out.startswith("nowhere ")
        assert done.out.endswith("[2. 2. 2. 2. 2.]\n")
    else:
        assert done.out.startswith("6 ")
        assert "give a folder with more room, or use --shuffle=none" in done.out
    assert issubclass(StorageError, OSError)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_scratch_folder_that_cannot_be_written(tmp_path: Path, in_order: bool):
    path = _write(tmp_path / "t.csv", b"a,y\n" + b"1,2\n" * 2000)
    nowhere = str(tmp_path / "none")
    with pytest.raises(StorageError, match=rf"--scratch_dir={nowhere}: no such file or directory .*; give a folder"):
        open_table(path, target="y", memory_budget=1000, scratch_dir=nowhere, in_order=in_order)
    assert open_table(path, target="y", scratch_dir=nowhere).storage == "memory"


def test_checks_are_quick_and_need_no_tensorflow(tmp_path: Path, run_python):
    path = _write(tmp_path / "t.csv", GOOD)
    code = (
        "import sys; from tapedist.data.tables.table import check_table, open_table\n"
        f"check_table({path!r}, target='y'); open_table({path!r}, target='y', test_fraction=0.0)\n"
        "assert 'tensorflow' not in sys.modules; print('fine')"
    )
    done = run_python("-c", code)
    assert done.out == "fine\n", done.err
