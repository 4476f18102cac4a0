"""Which files a table is: nothing that may hold rows is left out, or read twice, without a word; fixes work."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tapedist.data.tables.table import check_table, open_table
from tapedist.errors import InputError

ROWS = "a,b,y\n1,2,3\n4,5,7\n7,8,9\n"


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _write(path: str, content: str | bytes = ROWS) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def _parquet(path: str, **columns: object) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns or {"a": [1.0, 2], "b": [3.0, 1], "y": [1.0, 2]}), path)


def _opened(data: str, **settings: object):
    return open_table(data, **{"target": "y", "test_fraction": 0.0, **settings})


def _rows(data: str, **settings: object) -> int:
    return _opened(data, **settings).num_rows("train")


def _refused(data: str, **settings: object) -> str:
    """The one line that refuses a table before any row is read."""
    with pytest.raises(InputError) as caught:
        check_table(data, **{"target": "y", **settings})
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].isprintable()
    return caught.value.problems[0]


def _by_pattern(message: str) -> str:
    """The value of the `--data=...` that a message ends with."""
    word = shlex.split(message[message.rindex("--data=") :])[0]
    return word.removeprefix("--data=")


def _unpack(message: str) -> None:
    """Does what a message says after `unpack it: `."""
    command = message.split("unpack it: ")[1].split(", or give")[0]
    subprocess.run(command, shell=True, check=True, capture_output=True)


PACKERS: dict[str, tuple[str, str]] = {
    ".gz": ("gzip", "gzip {}"),
    ".bz2": ("bzip2", "bzip2 {}"),
    ".xz": ("xz", "xz {}"),
    ".zst": ("zstd", "zstd -q --rm {}"),
    ".lz4": ("lz4", "lz4 -q --rm {0} {0}.lz4"),
    ".zip": ("unzip", "python3 -m zipfile -c {0}.zip {0} && rm {0}"),
    ".tar": ("tar", "tar -cf {0}.tar {0} && rm {0}"),
}


@pytest.mark.parametrize("end", PACKERS)
@pytest.mark.parametrize("beside", [True, False])
def test_packed_files_are_named_with_the_command_that_unpacks_them(end: str, beside: bool):
    tool, pack = PACKERS[end]
    if not shutil.which(tool) or not shutil.which("python3"):
        pytest.skip(f"{tool} is not here")
    _write("our sales/part-1.csv")
    subprocess.run(pack.format("part-1.csv"), shell=True, check=True, cwd="our sales")
    if beside:
        _write("our sales/part-0.csv")
    message = _refused("our sales" if beside else f"our sales/part-1.csv{end}")
    assert f"our sales/part-1.csv{end}: is compressed; unpack it: " in message
    if beside:
        assert _rows(_by_pattern(message)) == 3
    _unpack(message)
    assert _rows("our sales" if beside else "our sales/part-1.csv") == 3 + 3 * beside


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz", ".zst", ".lz4"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_packed_bytes_under_a_tables_name(end: str, name: str):
    tool, pack = PACKERS[end]
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not here")
    if name == "t.parquet":
        _parquet(name)
    else:
        _write(name, ROWS.replace(",", "\t" if name == "t.tsv" else ","))
    rows = _rows(name)
    subprocess.run(pack.format(name), shell=True, check=True)
    os.rename(name + end, name)
    message = _refused(name)
    assert re.match(rf"--data={name}: holds data that is \w+-compressed, not what \.\w+ says", message)
    _unpack(message)
    assert _rows(name) == rows


def test_tables_under_the_name_of_another_format():
    _write("t.parquet")
    message = _refused("t.parquet")
    subprocess.run(message.split("rename it: ")[1], shell=True, check=True)
    assert _rows("t.csv") == 3
    _parquet("u.csv")
    message = _refused("u.csv")
    subprocess.run(message.split("rename it: ")[1], shell=True, check=True)
    assert _rows("u.parquet") == 2
    _write("v.csv", b"PK\3\4\0\0")
    assert "zip archive or a spreadsheet" in _refused("v.csv")


@pytest.mark.parametrize("name", ["b.xlsx", "b.feather", "b.orc", "b.avro", "b.jsonl", "B.XLS", "b.rar", "sub/b.7z"])
def test_files_that_hold_rows_for_certain_are_no_part_of_a_folder_unseen(name: str):
    _write("t/a.csv")
    _write(f"t/{name}", b"rows")
    message = _refused("t")
    assert f"--data=t/{name}: " in message
    assert _rows(_by_pattern(message)) == 3
    assert f"--data=t/{name}: " in _refused("t/*")


def test_files_that_may_hold_rows_are_named():
    names = ["part-00001", "b.csv.bak", "b.csv~", "b.json", "c.parquet.crc", "README.md", "notes.txt"]
    for name in ("A.CSV", "b.Csv", *names, ".a.csv.crc", "_SUCCESS"):
        _write(f"t/{name}")
    source = _opened("t")
    assert source.num_rows("train") == 6
    (notice,) = source.notices
    assert notice.startswith("t: files not read, because their names are no table's: ")
    for name in sorted(names)[:5]:
        assert f"t/{name}" in notice
    assert "and 2 more" in notice
    assert _opened("t/*").notices[0].split(": ")[-1] == notice.split(": ")[-1]
    _write("u/part-00000")
    assert "--data=u/part-00000: unknown kind of table" in _refused("u")
    os.rename("u/part-00000", "u/part-00000.csv")
    assert _rows("u") == 3


def test_hidden_names_are_passed_over_alike_in_folders_and_patterns():
    for name in ("_SUCCESS", ".part-0.csv.crc", "._part-0.csv", "_temporary/0/x.csv", ".ipynb_checkpoints/x.csv"):
        _write(f"out/{name}", "")
    _write("out/part-0.csv")
    _write("out/2020/part-1.csv")
    prints = set()
    for data in ("out", "out/", "out/*", "out/**", "out/**/*.csv", "./out"):
        source = _opened(data)
        assert not source.notices, data
        assert source.num_rows("train") == 6
        prints.add(source.fingerprint())
    assert len(prints) == 1
    _write("out/_more.csv")
    _write("out/_old/x.csv")
    for data in ("out", "out/*"):
        assert [notice.split(": ")[-1] for notice in _opened(data).notices] == ["out/_more.csv, out/_old"]
    assert _rows("out/_*.csv") == 3  # Asked for.
    _write("only/_a.csv")
    assert "names that begin with _ or . are passed over (only/_a.csv)" in _refused("only")
    assert "no file matches this pattern but names that begin with _ or ." in _refused("only/*")


def test_folders_that_a_pattern_matches_are_read():
    for year in (2019, 2020, 2021):
        _write(f"sales/{year}/a.csv")
    _write("sales.csv/part-0.csv")  # As Spark names its folders.
    assert _rows("sales/20[12]*") == 9
    assert _rows("sales/*1") == 3
    assert _rows("*.csv") == 3
    assert _rows("sales.csv") == 3


def test_linked_files_and_folders_are_read_once():
    _write("elsewhere/b.csv")
    _write("elsewhere/deep/c.csv")
    _write("t/a.csv")
    os.symlink("../elsewhere", "t/link")
    assert _rows("t") == _rows("t/**") == 9
    os.symlink("a.csv", "t/latest.csv")
    assert "--data=t/latest.csv: is the same file as t/a.csv, by a link" in _refused("t")
    os.unlink("t/latest.csv")
    assert _rows("t") == 9
    os.symlink("..", "elsewhere/up")
    assert "comes back to a folder above it through a link; remove the link" in _refused("t")
    os.unlink("elsewhere/up")
    os.symlink("none.csv", "t/broken.csv")
    assert "--data=t/broken.csv: no such file or directory" in _refused("t")


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        ("_delta_log/00000000000000000000.json", "Delta"),
        (".hoodie/hoodie.properties", "Hudi"),
        ("metadata/v2.metadata.json", "Iceberg"),
        ("_spark_metadata/0", "Spark streaming"),
    ],
)
@pytest.mark.parametrize("data", ["t", "t/", "t/*", "t/**/*.parquet", "t/data", "t/data/year=2020", "t/data/*"])
def test_tables_with_a_log_of_their_files(log: str, kind: str, data: str):
    _write(f"t/{log}", "{}")
    _parquet("t/data/year=2020/dead.parquet")
    _parquet("t/data/year=2020/live.parquet", a=[1.0], b=[3.0], y=[1.0])
    message = _refused(data)
    assert f"--data={data}: t/{log.split('/')[0]}" in message
    assert f" {kind} table" in message
    Path("own").mkdir()
    shutil.copy("t/data/year=2020/live.parquet", "own")
    assert _rows("own") == 1
    assert _rows("t/data/year=2020/live.parquet") == 1  # Who names one file means it.


@pytest.mark.parametrize("data", ["sales", "sales/*", "sales/year=*", "sales/**/*.parquet"])
def test_partition_columns(data: str):
    frame = pytest.importorskip("pandas").DataFrame(
        {"a": [0.1, 0.2, 0.3, 0.4], "year": [2019, 2019, 2020, 2020], "y": [1.0, 2, 3, 5]}
    )
    frame.to_parquet("sales", partition_cols=["year"])
    source = _opened(data)
    assert source.feature_names == ("a",)
    assert f"{data}: partition column year is not used" in source.notices[0]
    message = _refused(data, features=("a", "year"))
    assert message.startswith("--features=year: is a partition column: it stands in the names of the folders")
    pytest.importorskip("pandas").read_parquet("sales").to_parquet("whole.parquet")  # The fix that is named.
    whole = _opened("whole.parquet", features=("a", "year"), dtype="float64")
    np.testing.assert_array_equal(whole.rows("train", np.arange(4))[0], frame[["a", "year"]])
    assert not _opened("sales", features=("a",)).notices


def test_a_partition_column_that_the_files_hold_too_is_a_column():
    for year in (2019, 2020):
        _parquet(f"sales/year={year}/a.parquet", a=[1.0, 2], year=[year, year], y=[1.0, 2])
    source = _opened("sales")
    assert source.feature_names == ("a", "year")
    assert not source.notices


def test_formats_and_empty_parts():
    _write("mixed/a.csv")
    _parquet("mixed/b.parquet")
    message = _refused("mixed")
    assert "mixes csv and parquet files; keep one format" in message
    assert _rows(_by_pattern(message)) == 3
    _write("t/a.csv")
    _write("t/b.csv", "")
    assert "--data=t/b.csv: the file is empty; write it again, or remove it" in _refused("t")
    _write("t/b.csv", "a,b,y\n")
    assert _rows("t") == 3


@pytest.mark.parametrize("data", ["t.csv.gz", "sales"])
def test_through_the_command(data: str, run_python: Callable):
    _write("t.csv.gz", b"\x1f\x8b")
    _write("sales/part-0.csv")
    _write("sales/part-1.csv.gz", b"\x1f\x8b")
    finished = run_python("-m", "tapedist", "train", f"--data={data}", "--target=y", "--run_dir=out")
    assert finished.code == 2
    assert len(finished.errors) == 1
    assert ".csv.gz: is compressed; unpack it: gzip -d " in finished.errors[0]
    assert not Path("out").exists()
