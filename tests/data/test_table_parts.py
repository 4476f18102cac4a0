"""Every file of a table is asked what its columns hold before any row is read, in every format."""

from __future__ import annotations

import datetime as dt
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tapedist.data.tables.table import check_table, open_table
from tapedist.errors import InputError
from tapedist.text import READERS

DAY = dt.datetime(2024, 1, 1)


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t").mkdir()


def _write(*parts: Any) -> None:
    """Files of the table `t`: text is CSV, a dict Parquet, an array NPY, a list of pairs NPZ."""
    for number, part in enumerate(parts):
        match part:
            case str():
                Path(f"t/p{number}.csv").write_text(part)
            case dict():
                pq.write_table(pa.table(part), f"t/p{number}.parquet")
            case np.ndarray():
                np.save(f"t/p{number}.npy", part)
            case _:
                np.savez(f"t/p{number}.npz", **dict(part))


def _opened(**settings: Any):
    return open_table("t", **{"target": "y", "test_fraction": 0.0, "dtype": "float64", **settings})


def _refused(**settings: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        check_table("t", **{"target": "y", **settings})
    return caught.value.problems


def _features(message: str) -> tuple[str, ...]:
    """The value of the `--features=...` that a message ends with."""
    return READERS["tuple[str, ...]"](shlex.split(message[message.rindex("--features=") :])[0].partition("=")[2])


def _f(*values: float | None) -> pa.Array:
    return pa.array(values, pa.float64())


GOOD = {"a": _f(1, 2), "b": _f(3, 5), "y": _f(1, 2)}


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([GOOD, {**GOOD, "a": ["u", "v"]}], "t/p1.parquet: column a holds string, and double in t/p0.parquet"),
        ([{**GOOD, "a": ["u", "v"]}, GOOD], "t/p1.parquet: column a holds double, and string in t/p0.parquet"),
        ([GOOD, GOOD, {**GOOD, "a": ["1", "2"]}], "t/p2.parquet: column a holds string, and double in t/p0.parquet"),
        ([GOOD, {**GOOD, "a": [DAY, DAY]}], "t/p1.parquet: column a holds timestamp[us], and double in t/p0.parquet"),
        ([GOOD, {**GOOD, "a": [True, False]}], "t/p1.parquet: column a holds bool, and double in t/p0.parquet"),
        ([GOOD, {**GOOD, "a": [[1.0], [2.0]]}], "t/p1.parquet: column a holds list"),
        ([GOOD, {"b": _f(1), "y": _f(2)}], "t/p1.parquet: its columns differ from those of t/p0.parquet: it lacks a"),
        (
            [{"b": _f(1), "y": _f(2)}, GOOD],
            "t/p1.parquet: its columns differ from those of t/p0.parquet: it has besides a",
        ),
        (
            ["a,b,y\n1,2,3\n", "a,b,y\nu,2,3\nv,3,4\n"],
            "t/p1.csv:1: column a holds text ('u'), and numbers in t/p0.csv:1",
        ),
        (
            ["a,b,y\nu,2,3\nv,3,4\n", "a,b,y\n1,2,3\n"],
            "t/p1.csv:1: column a holds numbers, and text ('u') in t/p0.csv:1",
        ),
        (["a,b,y\n1,2,3\n", "b,y\n2,3\n"], "t/p1.csv:1: its columns differ from those of t/p0.csv:1: it lacks a"),
        (
            ["b,y\n2,3\n", "y,b,a\n1,2,3\n"],
            "t/p1.csv:1: its columns differ from those of t/p0.csv:1: it has besides a",
        ),
        (
            [{"a": np.ones(2), "b": np.ones(2), "y": np.ones(2)}.items(), {"b": np.ones(2), "y": np.ones(2)}.items()],
            "t/p1.npz: its arrays differ from those of t/p0.npz: it lacks a",
        ),
        (
            [
                {"a": np.ones(2), "b": np.ones(2), "y": np.ones(2)}.items(),
                {"a": np.array(["1", "2"]), "b": np.ones(2), "y": np.ones(2)}.items(),
            ],
            "t/p1.npz: column a holds <U1, and numbers in t/p0.npz",
        ),
        (
            [{"a": 3, "b": np.ones(2), "y": np.ones(2)}.items()],
            "t/p0.npz:a: has shape []; a table needs [n] or [n, columns]",
        ),
        (
            [{"b": np.ones(2), "a": np.ones(3), "y": np.ones(2)}.items()],
            "t/p0.npz: b has 2 rows and a has 3; give all arrays the same length",
        ),
    ],
)
def test_a_file_that_differs_is_named_and_the_column_can_be_left_out(parts: list[Any], says: str):
    _write(*parts)
    (message,) = _refused()
    assert message.startswith(says)
    assert _features(message) == ("b",)
    assert _opened(features=("b",)).num_rows("train") > 0  # The fix.
    (message,) = _refused(features=("a", "b"))
    assert message.startswith(says)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([np.ones((3, 3)), np.ones((3, 4))],
         "t/p1.npy: its arrays differ from those of the first file: x has 4 columns"),
        ([np.ones((3, 3)), np.ones((3, 2))],
         "t/p1.npy: its arrays differ from those of the first file: x has 2 columns"),
        ([np.ones((2, 2)), np.array([["1", "2"]])], "t/p1.npy: column x1 holds <U1, and numbers in t/p0.npy"),
        ([{"x": np.ones((2, 2)), "y": np.ones(2)}.items(), {"x": np.ones((2, 3)), "y": np.ones(2)}.items()],
         "t/p1.npz: its arrays differ from those of the first file: x has 3 columns, not 2"),
    ],
)  # fmt: skip
def test_columns_without_names_are_never_taken_from_other_places(parts: list[Any], says: str):
    _write(*parts)
    for features in ((), ("x0",)):  # In the same words whether columns are named or not.
        assert _refused(target="y" if "npz" in says else "x1", features=features)[0].startswith(says)


def test_parts_that_may_differ():
    _write(GOOD, {"y": pa.array([7, 8], pa.int8()), "b": pa.array([1, 2], pa.float32()), "a": pa.array([4, 5])})
    x, y = _opened().rows("train", np.arange(4))
    assert x.tolist() == [[1, 3], [2, 5], [4, 1], [5, 2]]
    assert y.tolist() == [1, 2, 7, 8]
    Path("t/p1.parquet").unlink()
    Path("t/p0.parquet").unlink()
    _write("a,b,note,y\n1,2,u,3\n", '\ufeffy,"note", b,a\n6,,5,4\n', "a,b,y,note\n", "a,b,y\n7,8,9\n")
    source = _opened()
    assert source.rows("train", np.arange(3))[0].tolist() == [[1, 2], [4, 5], [7, 8]]
    assert source.notices == ("t: columns not used: note",)


@pytest.mark.parametrize("first", [True, False])
def test_a_part_whose_column_is_all_null(first: bool):
    nulls = {**GOOD, "a": pa.array([None, None])}
    _write(*((nulls, GOOD) if first else (GOOD, nulls)))
    with pytest.raises(InputError, match=rf"t/p{1 - first}\.parquet:row 1:a is blank; correct it, use --on_bad_rows"):
        _opened()
    assert _opened(on_bad_rows="drop").rows("train", np.arange(2))[0].tolist() == [[1, 3], [2, 5]]
    assert sorted(_opened(on_bad_rows="mean").rows("train", np.arange(4))[0][:, 0]) == [1, 1.5, 1.5, 2]
    assert _opened(features=("b",)).num_rows("train") == 4


def test_parts_without_rows():
    _write(GOOD, {name: _f() for name in GOOD}, {name: pa.array([], pa.null()) for name in GOOD})
    assert _opened().num_rows("train") == 2


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("1,2,3\n4,5,6\n", "t/p1.csv:1: the first line holds numbers, not column names; add a header line"),
        ("1,u,3\n4,v,6\n", "t/p1.csv:1: the first line holds '1', where t/p0.csv:1 has column names; add the header"),
        ("a;b;y\n1;2;3\n", "t/p1.csv:1: a table needs at least two columns; columns seem to be separated by ';'"),
        ("\n", "t/p1.csv:1: a table needs at least two columns"),
    ],
)
def test_csv_parts_without_a_header(second: str, says: str):
    _write("a,b,y\n1,2,3\n", second)
    for features in ((), ("a",)):
        assert _refused(features=features)[0].startswith(says)
    Path("t/p1.csv").write_text(f"a,b,y\n{second}")
    if says.endswith("header line"):
        assert _opened().num_rows("train") == 3
