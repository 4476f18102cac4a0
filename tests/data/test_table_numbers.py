"""A number is read as what it is: the float64 nearest to it, the same from every format, or it is refused by name."""

from __future__ import annotations

import datetime as dt
import random
import warnings
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tapedist.data.tables.parquet import decimals_to_floats
from tapedist.data.tables.table import check_table, open_table
from tapedist.errors import InputError

TYPES = [
    pa.decimal32(9, 2), pa.decimal32(9, 9), pa.decimal64(18, 5), pa.decimal64(18, 1), pa.decimal128(10, 1),
    pa.decimal128(38, 2), pa.decimal128(38, 22), pa.decimal128(38, 23), pa.decimal128(38, 38), pa.decimal256(76, 2),
    pa.decimal256(76, 50), pa.decimal128(20, -3),
]  # fmt: skip


def _opened(path: Path, **settings: object):
    return open_table(str(path), **{"target": "y", "test_fraction": 0.0, "dtype": "float64", **settings})


def _column(path: Path, **settings: object) -> list[float]:
    source = _opened(path, **settings)
    return source.rows("train", np.arange(source.num_rows("train")))[0][:, 0].tolist()


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_every_decimal_is_the_float_nearest_to_it(kind: pa.DataType):
    draw, cells = random.Random(0), []
    for _ in range(2000):
        digits = draw.randint(1, kind.precision)
        cell = Decimal(draw.randrange(-(10**digits) + 1, 10**digits)).scaleb(-kind.scale)
        cells.append(None if draw.random() < 0.1 else cell)
    expected = [np.nan if cell is None else float(str(cell)) for cell in cells]
    array = pa.array(cells, kind)
    for first in (0, 7):  # A slice shares its buffers with the whole.
        np.testing.assert_array_equal(decimals_to_floats(array.slice(first, 1500)), expected[first : first + 1500])
    assert decimals_to_floats(array.slice(0, 0)).tolist() == []
    assert np.isnan(decimals_to_floats(pa.array([None, None], kind))).all()


def test_all_prices_below_a_thousand():
    cells = [Decimal(cents).scaleb(-2) for cents in range(-100_000, 100_000)]
    found = decimals_to_floats(pa.array(cells, pa.decimal128(10, 2)))
    np.testing.assert_array_equal(found, [float(str(cell)) for cell in cells])


def test_decimals_have_the_digest_of_their_text(tmp_path: Path):
    prices, places = [Decimal(n).scaleb(-2) for n in range(1, 3000, 7)], pa.decimal128(10, 2)
    rows = {"a": [Decimal(n).scaleb(-1) for n in range(len(prices))], "y": prices}
    text = "a,y\n" + "".join(f"{a},{y}\n" for a, y in zip(*rows.values(), strict=True))
    (tmp_path / "t.csv").write_text(text)
    expected = _opened(tmp_path / "t.csv").fingerprint()
    for a, y in (
        (pa.decimal128(10, 1), places),
        (pa.decimal32(9, 1), pa.decimal64(18, 2)),
        (pa.decimal256(60, 1),) * 2,
    ):
        y = y if y.scale == 2 else places
        table = pa.table({"a": pa.array(rows["a"], a), "y": pa.array(rows["y"], y)})
        pq.write_table(table, tmp_path / "t.parquet", row_group_size=50)
        for budget in (2**29, 1000):  # From memory, and from a scratch file.
            source = _opened(tmp_path / "t.parquet", memory_budget=budget)
            assert source.fingerprint() == expected
            np.testing.assert_array_equal(source.rows("train", np.arange(9))[1], [float(str(p)) for p in prices[:9]])


def test_whole_decimals_follow_the_rule_of_integers(tmp_path: Path):
    for name, cells in (("t", [2**53 + 1, 2]), ("u", [2**53 + 2, 2])):
        column = pa.array([Decimal(cell) for cell in cells], pa.decimal128(38, 0))
        pq.write_table(pa.table({"a": column, "y": [1.0, 2.0]}), tmp_path / f"{name}.parquet")
        (tmp_path / f"{name}.csv").write_text(f"a,y\n{cells[0]},1\n{cells[1]},2\n")
    for end in ("csv", "parquet"):
        with pytest.raises(InputError, match=r"9007199254740993'? is an integer beyond 2"):
            _opened(tmp_path / f"t.{end}")
        assert _column(tmp_path / f"t.{end}", on_bad_rows="drop") == [2]
        assert _column(tmp_path / f"u.{end}") == [2.0**53 + 2, 2]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(np.array([0.1, 65504, -(2.0**-24)], np.float16)), [float(np.float16(0.1)), 65504, -(2.0**-24)]),
        (pa.array([2**63, 2**64 - 2048, 5], pa.uint64()), [2.0**63, 2.0**64 - 2048, 5]),
        (pa.array([-(2**63), 2**62, 5]), [-(2.0**63), 2.0**62, 5]),
        (pa.array([0.5, 1.5, 0.5]).dictionary_encode(), [0.5, 1.5, 0.5]),
        (pa.array([3, 3, 5], pa.int16()).dictionary_encode(), [3, 3, 5]),
        (pa.array([Decimal("0.1"), Decimal("0.3"), Decimal("0.1")]).dictionary_encode(), [0.1, 0.3, 0.1]),
    ],
    ids=["float16", "uint64", "int64", "dictionary", "dictionary of integers", "dictionary of decimals"],
)
def test_other_numbers_are_exact(tmp_path: Path, column: pa.Array, expected: list[float]):
    pq.write_table(pa.table({"a": column, "y": [1.0, 2.0, 3.0]}), tmp_path / "t.parquet")
    assert _column(tmp_path / "t.parquet") == expected
    assert _column(tmp_path / "t.parquet", memory_budget=1) == expected


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**53 + 1]), pa.array([2**64 - 1], pa.uint64()), pa.array([-(2**53) - 1]),
        pa.array([2**53 + 1]).dictionary_encode(), pa.array([2**63 - 1]),
    ],
    ids=str,
)  # fmt: skip
def test_integers_that_no_float_holds_are_refused(tmp_path: Path, column: pa.Array):
    pq.write_table(pa.table({"a": column, "b": [1.0], "y": [1.0]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"row 1:a: .* is an integer beyond 2.* leave the column out by --features=b"):
        _opened(tmp_path / "t.parquet")
    assert _column(tmp_path / "t.parquet", features=("b",)) == [1]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([1, 2], pa.duration("s")), "duration"),
        (pa.array([dt.time(1), dt.time(2)]), "time64"),
        (pa.array([dt.date(2024, 1, 1)] * 2), "date32"),
        (pa.array([dt.datetime(2024, 1, 1)] * 2), "timestamp"),
        (pa.array([True, False]), "bool"),
        (pa.array(["1.5", "2.5"]), "string"),
        (pa.array([b"1", b"2"]), "binary"),
        (pa.array(["u", "v"]).dictionary_encode(), "dictionary"),
        (pa.array([[1.0], [2.0]]), "list"),
        (pa.array([{"x": 1.0}, {"x": 2.0}]), "struct"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_number_is_refused_by_name_and_left_out_with_a_notice(tmp_path: Path, column: pa.Array, kind: str):
    pq.write_table(pa.table({"a": column, "b": [1.0, 2.0], "y": [1.0, 2.0]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=rf"--features=a: holds {kind}.*, not numbers"):
        check_table(str(tmp_path / "t.parquet"), target="y", features=("a",))
    (notice,) = _opened(tmp_path / "t.parquet").notices
    if kind == "string":
        assert "column a is not used: its cells are numbers written as text, like '1.5'" in notice
    else:
        assert notice.endswith("columns not used: a")


def test_pandas_types(tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"a": pandas.array([1, None, 3], "Int64"), "b": pandas.array([0.1, 2, 3], "Float64"),
         "c": pandas.Categorical([1, 2, 1]), "y": [1.0, 2, 3]}
    )  # fmt: skip
    frame.to_parquet(tmp_path / "t.parquet")
    source = _opened(tmp_path / "t.parquet", on_bad_rows="drop")
    assert source.rows("train", np.arange(2))[0].tolist() == [[1, 0.1], [3, 3]]
    assert "because they are categories, as pandas wrote them: c; name them in --features" in source.notices[1]
    assert _column(tmp_path / "t.parquet", features=("c",)) == [1, 2, 1]


def test_nothing_warns_of_extreme_decimals(tmp_path: Path):
    cells = [Decimal(10) ** 75, -(Decimal(10) ** 75), Decimal(0), None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decimals_to_floats(pa.array(cells, pa.decimal256(76, 0)))
    assert found[2] == 0
    assert np.isnan(found[3])
