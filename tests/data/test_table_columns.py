"""Columns that play no part stop nobody, row labels are no features, and what is refused can be left out as it says."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tapedist.config import TrainConfig
from tapedist.data.tables.csv import number
from tapedist.data.tables.table import open_table
from tapedist.errors import InputError
from tapedist.text import READERS, to_text

LABELS = "because they are row labels, as pandas and R write them: "


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _write(content: str | bytes, name: str = "t.csv") -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def _opened(data: str = "t.csv", **settings: Any):
    return open_table(data, **{"target": "y", "test_fraction": 0.0, "dtype": "float64", **settings})


def _x(data: str = "t.csv", **settings: Any) -> list[list[float]]:
    source = _opened(data, **settings)
    return source.rows("train", np.arange(source.num_rows("train")))[0].tolist()


def _refused(data: str = "t.csv", **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        _opened(data, **settings)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def _features(message: str) -> tuple[str, ...]:
    """The value of the `--features=...` that a message names."""
    return READERS["tuple[str, ...]"](shlex.split(message[message.rindex("--features=") :])[0].partition("=")[2])


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (",a,b,y\n0,1,2,3\n1,4,5,7\n", "(column 1)"),
        ('"","a","b","y"\n"1",1,2,3\n"2",4,5,7\n', "(column 1)"),
        ('"a","b","y"\n"1",1,2,3\n"2",4,5,7\n', "(column 1)"),  # R's `write.table`.
        ('"a","b","y"\n"Mazda RX4",1,2,3\n"Fiat 128",4,5,7\n', "(column 1)"),
        ("Unnamed: 0,a,b,y\n0,1,2,3\n1,4,5,7\n", "Unnamed: 0"),
        (",Unnamed: 0.1,Unnamed: 0,a,b,y\n0,0,0,1,2,3\n1,1,1,4,5,7\n", "(column 1), Unnamed: 0.1, Unnamed: 0"),
        ("__index_level_0__,a,b,y\n0,1,2,3\n1,4,5,7\n", "__index_level_0__"),
        ("rownames,a,b,y\nMazda,1,2,3\nFiat,4,5,7\n", "rownames"),
    ],
)
def test_row_labels_in_text_are_no_features(text: str, labels: str):
    _write(text)
    source = _opened()
    assert source.feature_names == ("a", "b")
    assert _x() == [[1, 2], [4, 5]]
    assert f"t.csv: columns not used, {LABELS}{labels}" in source.notices[0]
    assert _x(features=("b",)) == [[2], [5]]
    if source.notices[0].endswith("name them in --features to use them"):
        assert _x(features=(labels.rpartition(", ")[2], "a")) == [[0, 1], [1, 4]]
    elif source.notices[0].endswith("name them in the header to use them") and text.startswith(","):
        _write(f"id{text}")
        assert _opened().feature_names == ("id", "a", "b")


@pytest.mark.parametrize(
    "text", ["a,b,y\n0.1,2,3,9\n0.3,5,6,9\n", "a,b,y\n1,2,3,\n4,5,6,\n", "a,b,y\n1,2,3,4\n1,2,3,4\n"]
)
def test_rows_longer_than_the_header_are_not_always_labelled(text: str):
    _write(text)
    assert "has 4 fields where the header has 3" in _refused()


def test_an_index_of_pandas_is_no_feature_unless_it_is_asked_for():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [0.1, 0.2, 0.3], "b": [1.0, 5, 2], "y": [1.0, 2, 3]})
    frame.sort_values("b").to_parquet("sorted.parquet")
    source = _opened("sorted.parquet")
    assert source.feature_names == ("a", "b")
    assert f"{LABELS}__index_level_0__; name them in --features to use them" in source.notices[0]
    assert _x("sorted.parquet", features=("__index_level_0__",)) == [[0], [2], [1]]
    frame.set_index("a").to_parquet("named.parquet")
    source = _opened("named.parquet")
    assert source.feature_names == ("b",)
    assert "because they are an index that pandas wrote: a; name them in --features to use them" in source.notices[0]
    assert _x("named.parquet", features=("a", "b"))[1] == [0.2, 5]
    frame.set_index(["a", "b"]).to_parquet("multi.parquet")
    message = _refused("multi.parquet")
    assert "no numeric column is left to be a feature" in message
    assert _opened("multi.parquet", features=_features(message)).feature_names == ("a", "b")
    frame.set_index("y").to_parquet("target.parquet")
    assert _opened("target.parquet").feature_names == ("a", "b")
    frame.to_parquet("range.parquet")
    assert not _opened("range.parquet").notices
    for metadata in ("[nonsense", '{"index_columns": 3}', '{"columns": [{}]}', '["a"]'):
        table = pa.table({"a": [1.0, 2], "y": [1.0, 2]}).replace_schema_metadata({"pandas": metadata})
        pq.write_table(table, "odd.parquet")
        assert _opened("odd.parquet").feature_names == ("a",)


def test_a_column_without_any_number_is_no_feature():
    for cells in ("", "NA", "NaN", "?", '""'):
        _write(f"a,b,comment,y\n1,2,{cells},3\n4,5,{cells},7\n")
        for on_bad_rows in ("error", "drop", "mean"):
            source = _opened(on_bad_rows=on_bad_rows)
            assert source.feature_names == ("a", "b")
            assert source.num_rows("train") == 2
            assert source.notices == ("t.csv: columns not used, because they hold no number: comment",)
    message = _refused(features=("a", "comment"))
    assert message.endswith("correct it, or leave the column out by --features=a")
    nan = [np.nan, np.nan]
    np.savez("t.npz", a=[1.0, 2], b=nan, y=[1.0, 2])
    pq.write_table(pa.table({"a": [1.0, 2], "b": nan, "c": pa.array([None, None]), "y": [1.0, 2]}), "t.parquet")
    for name in ("t.npz", "t.parquet"):
        assert _opened(name).feature_names == ("a",)
    _write("b,y\n,2\n,4\n")
    assert "no feature is left, because no row holds a number in b" in _refused()


def test_one_number_late_in_a_column_makes_it_a_feature():
    _write("a,b,y\n" + "1,,2\n" * 70_000 + "2,5,3\n" + "1,,2\n")
    assert "t.csv:2:b: '' is blank" in _refused()
    assert _opened(on_bad_rows="drop").num_rows("train") == 1
    assert set(map(tuple, _x(on_bad_rows="mean"))) == {(1, 5), (2, 5)}


def test_fixes_of_bad_cells_work():
    _write("id,c,a,y\n9007199254740993,,1,2\n9007199254740995,,2,3\n")
    message = _refused()
    assert message.startswith("t.csv:2:id: '9007199254740993' is an integer beyond 2**53")
    assert "--on_bad_rows" not in message  # It would leave nothing.
    assert _x(features=_features(message)) == [[1], [2]]
    message = _refused(on_bad_rows="drop")
    assert "holds no good row among 2 below its header: no cell of id can be used; leave it out by " in message
    assert _x(features=_features(message)) == [[1], [2]]
    _write("a,b,y\n1,x,3\n2,5,4\n")
    message = _refused()
    assert message.endswith("correct it, use --on_bad_rows=drop, or leave the column out by --features=a")
    assert _x(features=_features(message)) == [[1], [2]]
    assert _x(on_bad_rows="drop") == [[2, 5]]
    (notice,) = _opened(on_bad_rows="drop").notices
    assert notice.endswith(
        "1 of 2 rows have bad cells and are left out; the first: t.csv:2:b: 'x' is text, not a number"
    )
    _write("a,b,y\n1,2,3\n1,2\n2,3,4\n")
    assert _refused().endswith("has 2 fields where the header has 3; correct it, or use --on_bad_rows=drop")
    _write("a,y\n1,\n2,\n")
    assert _refused().endswith("t.csv:2:y: '' is blank; correct it")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("b,a,a,y\n1,2,3,4\n2,3,4,5\n", "t.csv:1: duplicate column a in the header; rename one of them"),
        ("b,,y\n1,2,3\n2,4,6\n", "t.csv:1: column 2 has no name; name it in the header"),
        (b"b,pr\xe9,y\n1,2,3\n2,4,6\n", "t.csv:1: byte 0xe9 is not UTF-8; save the table as UTF-8"),
    ],
)
def test_odd_names_matter_only_where_they_play_a_part(text: str | bytes, says: str):
    _write(text)
    message = _refused()
    assert message.startswith(says)
    assert _x(features=_features(message)) == [[1], [2]]


@pytest.mark.parametrize(
    "text",
    [
        "a,note,note,y\n1,p,q,2\n3,p,q,4\n",
        "a,,y\n1,u,2\n3,v,4\n",
        "a,,y\n1,,2\n3,,4\n",
        "a,y,\n1,2,\n3,4,\n",
        "a,y,,\n1,2,,\n3,4,,\n",
        b"a,n\xf6te,y\n1,caf\xe9,2\n3,x,4\n",
        b"a,note,y\n1,\0,2\n3,\xff\xfe,4\n",
        'a,note,y\n1,"6"" x 4""",2\n3,7",4\n',
    ],
)
def test_columns_without_numbers_may_have_any_name_and_content(text: str | bytes):
    _write(text)
    assert _x() == [[1], [3]]
    assert "columns not used: " in _opened().notices[0]
    assert _x(features=("a",)) == [[1], [3]]
    assert not _opened(features=("a",)).notices


def test_columns_of_numbers_that_are_not_asked_for_may_hold_anything():
    _write(b"a,id,id,,y\n1,9007199254740993,1e999,nan,2\n3,\xff,1.2.3,0x10,4\n")
    assert _x(features=("a",)) == [[1], [3]]
    with pytest.raises(InputError, match="duplicate column id"):
        _opened(features=("a", "id"))
    names = ["a", "n", "n", "", "a.b", "y"]
    pq.write_table(pa.Table.from_arrays([pa.array([1.0, 3])] * 6, names=names), "t.parquet")
    assert _x("t.parquet", features=("a",)) == [[1], [3]]
    assert _x("t.parquet", features=("a.b",)) == [[1], [3]]
    np.savez("t.npz", a=[1.0, 3], y=[2.0, 4], seed=7, note=np.array(["u", "v"]), other=np.array([None, 1]))
    assert _x("t.npz", features=("a",)) == [[1], [3]]


@pytest.mark.parametrize(
    ("cell", "rule", "mended"),
    [
        ("1,234", "has a thousands comma", "1234"),
        ("1,234.50", "has a thousands comma", "1234.50"),
        ("-12,345,678", "has a thousands comma", "-12345678"),
        ("1,23,456.00", "has a thousands comma", "123456.00"),
        ("1.234,50", "has a decimal or thousands comma", "1234.50"),
        ("1,5", "has a decimal or thousands comma", "1.5"),
        ("1.234.567", "has thousands points", "1234567"),
        ("$1,234.50", "has a currency sign", "1234.50"),
        ("\u20ac 5", "has a currency sign", "5"),
        ("5,00 EUR", "has a currency sign", "5.00"),
        ("-$5", "has a currency sign", "-5"),
        ("12.5%", "has a percent sign", "12.5"),
        ("(1,234)", "has brackets for a negative number", "-1234"),
        ("\u22125.5", "has a minus sign that is not the keyboard's", "-5.5"),
        ("1 234,5", "is text, because of the marks between its digits", "1234.5"),
        ("1'234.5", "is text, because of the marks between its digits", "1234.5"),
        ("#DIV/0!", "is a spreadsheet's error", "0"),
    ],
)
@pytest.mark.parametrize("share", ["all", "some"])
def test_columns_that_are_nearly_numbers_do_not_drop_out(cell: str, rule: str, mended: str, share: str):
    others = [cell, cell] if share == "all" else ["7", "8"]
    rows = [*others, cell]
    _write("income,b,y\n" + "".join(f'"{text}",{i},{i * i}\n' for i, text in enumerate(rows)))
    message = _refused()
    assert message.startswith(f"t.csv:{2 if share == 'all' else 4}:income: {cell!r} {rule}")
    assert _opened(features=_features(message)).feature_names == ("b",)
    assert number(mended)[1] == ""
    _write("income,b,y\n" + "".join(f"{mended},{i},{i * i}\n" for i, text in enumerate(rows)))
    assert _x()[0] == [float(mended), 0]


def test_text_that_a_user_may_take_for_numbers_is_told():
    _write("a,size,load,y\n" + "".join(f"{i},{i} kg,{'unknown' if i % 3 else i},{i * i}\n" for i in range(9)))
    source = _opened()
    assert source.feature_names == ("a",)
    assert source.notices == (
        "t.csv: column size is not used: its cells have words beside the numbers, like '0 kg'",
        "t.csv: column load is not used: 3 of its first 9 cells are numbers, but most are not, like 'unknown'",
    )


NAMES = ["price\u00a0USD", "a\u2003b", "x\u200by", "p\u3000q", "\u4ef7\u683c", "a\u2028b", "\ue000", 'say "x"', "a, b"]


@pytest.mark.parametrize("name", NAMES)
def test_the_target_may_have_any_name_that_a_feature_may_have(name: str, parse_flags: Callable):
    pq.write_table(pa.table({"a": [1.0, 3], name: [2.0, 4], "w": [1.0, 1]}), "t.parquet")
    Path("given.flags").write_text(f"--data=t.parquet\n--target={name}\n--weight=w\n")
    for words in (["--data=t.parquet", f"--target={name}", "--weight=w"], ["--flagfile=given.flags"]):
        config = parse_flags(words)
        source = _opened(config.data, target=config.target, weight=config.weight)
        assert (source.target_name, source.feature_names) == (name, ("a",))
    config = parse_flags(["--data=t.parquet", "--target=a", f"--weight={name}", f"--features={to_text(('w',))}"])
    assert _opened(config.data, target="a", weight=config.weight, features=config.features).weighted
    config = parse_flags(["--data=t.parquet", "--target=a", f"--features={to_text((name,))}"])
    assert _opened(config.data, target="a", features=config.features).feature_names == (name,)
    assert TrainConfig(data="t.parquet", target="a", features=(name,)).features == (name,)


def test_blanks_in_names_need_not_be_typed():
    _write('" a","Price\n(USD)"\n1,2\n3,4\n')
    source = _opened(target="Price (USD)")
    assert (source.feature_names, source.target_name) == (("a",), "Price\n(USD)")
    pq.write_table(pa.table({" a ": [1.0, 3], "y ": [2.0, 4]}), "t.parquet")
    assert _opened("t.parquet", features=("a",)).feature_names == (" a ",)
    pq.write_table(pa.table({"a b": [1.0, 3], "a  b": [2.0, 4], "y": [1.0, 2]}), "t.parquet")
    with pytest.raises(InputError, match="no such column"):
        _opened("t.parquet", features=("a\u2003b",))


@pytest.mark.parametrize("flag", ["data", "target"])
def test_a_word_that_is_no_utf8_is_told_so(flag: str, parse_flags: Callable):
    words = {"data": "t.csv", "target": "y", flag: "caf\udce9"}
    with pytest.raises(InputError, match=rf"--{flag}='caf\\udce9': is not UTF-8; rename it"):
        parse_flags([f"--{name}={value}" for name, value in words.items()])


@pytest.mark.parametrize(
    ("text", "rows"),
    [("a\n1\n2\n3\n", 3), ("a\r\n1\r\n\r\n2\r\n", 2), ('"a"\n"1"\n2', 2), ("a\n1", 1), ("price|a\n1\n", 1)],
)
def test_one_column_is_enough_to_predict(text: str, rows: int):
    _write(text)
    name = text.split()[0].strip('"')
    source = _opened(target="", features=(name,), need_target=False)
    assert source.num_rows("train") == rows
    assert f"{'t.csv'}: a table needs at least two columns" in _refused(target=name)


def test_columns_of_a_run_are_named_without_flags_that_predict_has_not():
    run: dict[str, Any] = {"target": "", "features": ("a",), "need_target": False, "of_run": True}
    _write(b"junk,a,junk,\nx,1,9007199254740993,\n\xe9,2,oops,\n")
    assert _x(**run) == [[1], [2]]
    _write("a,b\nu,1\nv,2\n")
    assert _refused(**run) == "--data=t.csv: column a: holds text ('u'), not numbers; encode it as numbers first"
    _write("a,b\n,1\n,2\n")
    assert _refused(**run) == "t.csv:2:a: '' is blank; correct it"
    assert "--features" not in _refused(**run, on_bad_rows="drop")


def test_a_run_with_such_names_through_the_commands(tmp_path: Path, tapedist_command: Callable):
    target = "price\u00a0USD"
    rows = "".join(f"{i},{i % 7},{3 * i - 2 * (i % 7) + 1}\n" for i in range(40))
    _write(f",a,{target}\n{rows}")
    fixed = ("--learning_rate=auto", "--test_fraction=0", "--num_epochs=5")
    finished = tapedist_command("train", "--data=t.csv", f"--target={target}", "--run_dir=r", *fixed, warm=True)
    assert finished.code == 0, finished.err
    assert "(column 1)" in finished.out
    finished = tapedist_command("evaluate", "--run_dir=r", warm=True)
    assert finished.code == 0, finished.err
    assert "40 rows" in finished.out
    _write("a\n1\n2\n", "new.csv")
    finished = tapedist_command("predict", "--run_dir=r", "--data=new.csv", "--output=o.csv", warm=True)
    assert finished.code == 0, finished.err
    assert len(Path("o.csv").read_text().splitlines()) == 3
    _write("b\n1\n", "new.csv")
    finished = tapedist_command("predict", "--run_dir=r", "--data=new.csv", "--output=p.csv", warm=True)
    assert finished.code == 2
    assert "--data=new.csv: lacks a, which the run was trained on; present: b" in finished.errors[0]
