"""What a Python program hands over: by name where there are names, and no number changes or is made up on its way."""

from __future__ import annotations

import decimal
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tapedist.data.array_source import ArraySource
from tapedist.errors import InputError
from tapedist.results.result import TrainResult

pd = pytest.importorskip("pandas")
sparse = pytest.importorskip("scipy.sparse")

N = 8
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(N, 2))
Y = X @ [1.0, 2.0] + 0.5
FRAME, TARGET = pd.DataFrame(X, columns=["a", "b"]), pd.Series(Y, name="price")


def taken(*arrays: Any, **settings: Any) -> tuple[np.ndarray, ...]:
    source = ArraySource(*arrays, **settings)
    return source.rows("train", range(source.num_rows("train")))


def fitted(*names: str) -> TrainResult:
    """A model whose weights are 1, 2, 4 and so on, by name."""
    weights = 2.0 ** np.arange(len(names))
    return TrainResult(
        parameters=np.append(weights, 0.5), weights=weights, bias=0.5, history=(), train_loss=None, test_loss=None,
        epochs=0, steps=0, digest="", truth=None, feature_names=names, target_name="y", fit_intercept=True,
        loss="squared", statistics=None, stopped="", run_dir=None,
    )  # fmt: skip


def structured() -> np.ndarray:
    rows = np.zeros(N, dtype=[("b", "f8"), ("when", "M8[s]"), ("a", "f8")])
    rows["a"], rows["b"] = X.T
    return rows


# The same two columns, in another order and with others between them that hold no numbers.
NAMED: dict[str, Callable[[], Any]] = {
    "pandas": lambda: FRAME.assign(city="Rome", when=pd.Timestamp("2024"))[["city", "b", "when", "a"]],
    "pandas, types of its own": lambda: FRAME.astype({"a": "Float64", "b": "double[pyarrow]"})[["b", "a"]],
    "arrow": lambda: pa.table({"t": ["q"] * N, "b": X[:, 1], "a": X[:, 0]}),
    "arrow in pieces": lambda: pa.concat_tables([pa.table({"b": X[i:, 1][:4], "a": X[i:, 0][:4]}) for i in (0, 4)]),
    "arrow batch": lambda: pa.record_batch({"b": X[:, 1], "a": X[:, 0], "t": [None] * N}),
    "dict": lambda: {"b": X[:, 1].tolist(), "t": ["q"] * N, "a": X[:, 0]},
    "dict of columns": lambda: {"b": FRAME.b, "a": pa.array(X[:, 0])},
    "structured": structured,
    "records": lambda: structured().view(np.recarray),
    "polars": lambda: pytest.importorskip("polars").DataFrame({"t": ["q"] * N, "b": X[:, 1], "a": X[:, 0]}),
}


@pytest.mark.parametrize("kind", NAMED)
def test_tables_go_by_name(kind: str):
    table = NAMED[kind]()
    assert np.array_equal(fitted("a", "b").predict(table), fitted("a", "b").predict(X))
    source = ArraySource(table, Y, feature_names=["a", "b"])
    assert source.feature_names == ("a", "b")
    x, y = source.rows("train", range(N))
    assert np.array_equal(x, X)
    assert np.array_equal(y, Y)


def test_arrays_and_lists_go_by_position():
    wanted = Y  # Which is X's columns with the weights of `fitted`.
    for x in (X, X.tolist(), list(X), np.asfortranarray(X), X[::-1][::-1], X.astype(">f8"), np.ma.array(X)):
        np.testing.assert_allclose(fitted("a", "b").predict(x), wanted, rtol=1e-15)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (FRAME[["a"]], "x: lacks the columns b; present: a; "),
        (pd.DataFrame(X), "x: lacks the columns a, b; present: 0, 1; "),
        ({"a": X[:, 0]}, "x: lacks the columns b"),
        (pd.DataFrame(np.c_[X, X], columns=["a", "b", "a", "c"]), "x: has more than one column named a; rename"),
        (pa.Table.from_arrays([pa.array(Y)] * 3, ["a", "b", "b"]), "x: has more than one column named b; rename"),
        (X[0], r"x: has shape \[2\]; must be \[rows, 2\].*reshape\(1, -1\)"),
        (FRAME.iloc[0], r"x: has shape \[2\]; must be \[rows, 2\]"),
        (X[:, :1], r"x: has shape \[8, 1\]; must be \[rows, 2\]"),
        (X[np.newaxis], r"x: has shape \[1, 8, 2\]"),
        ([], r"x: has shape \[0\]"),
        ({"a": 1.0, "b": 2.0}, r"x: its columns have the shapes \[\]; must be \[rows\]"),
        ({"a": [1.0], "b": [2.0, 3.0]}, r"x: its columns have the shapes \[1\], \[2\]"),
        (FRAME.assign(b="1.5"), "column 'b' of x: holds str; must be integers, float32 or float64"),
        (FRAME.assign(b=pd.array([1, None] * 4, "Int64")), "column 'b' of x: holds 4 missing values"),
        ([["1", "2"]], "x: holds <U1, such as '1'"),
        ([[1.0, None]], "x: holds object, such as '1.0'"),
        (X * 1j, "x: holds complex128.*.real and .imag"),
        (np.full((2, 2), np.datetime64("2024-01-01")), "x: holds datetime64"),
        ([[2**53 + 1, 1]], "x: holds the integer 9007199254740993, which float64 has not"),
        ([FRAME.iloc[0]], "x: is a list of rows with names"),
        ([{"a": 1.0, "b": 2.0}], "x: is a list of rows with names"),
        (None, "x: is of type NoneType; give an array"),
        ((row for row in X), "x: is of type generator"),
        (sparse.csr_array(X), r"x: is a sparse matrix; give x.toarray\(\)"),
        ({"a": FRAME.a, "b": FRAME.b[::-1]}, r"x\['a'\] and x\['b'\]: their row labels differ"),
    ],
)
def test_rows_to_predict_that_are_refused(x: Any, said: str):
    with pytest.raises(InputError, match=said):
        fitted("a", "b").predict(x)


def test_columns_that_play_no_part_may_be_anything():
    table = pd.DataFrame(np.c_[X, X], columns=["a", "b", "c", "c"])
    assert np.array_equal(fitted("a", "b").predict(table), fitted("a", "b").predict(X))
    assert np.array_equal(taken(table, Y, feature_names=["b"])[0][:, 0], X[:, 1])


def test_no_rows_and_numbers_that_are_none():
    assert fitted("a", "b").predict(np.zeros((0, 2))).shape == (0,)
    assert fitted("a", "b").predict(FRAME[:0]).shape == (0,)
    assert np.isnan(fitted("a", "b").predict([[np.nan, 1.0], [0.0, 0.0]])).tolist() == [True, False]
    assert fitted("a", "b").predict([[np.inf, 1.0]]).tolist() == [np.inf]


def test_names_are_kept_as_text():
    source = ArraySource(FRAME, TARGET)
    assert (source.feature_names, source.target_name) == (("a", "b"), "price")
    assert ArraySource(pd.DataFrame(X), pd.Series(Y, name=7)).feature_names == ("0", "1")
    assert ArraySource(pd.DataFrame(X), pd.Series(Y, name=7)).target_name == "7"
    many = pd.MultiIndex.from_tuples([("a", 1), ("a", 2)])
    assert ArraySource(pd.DataFrame(X, columns=many), Y).feature_names == ("('a', 1)", "('a', 2)")
    for names in (np.array(["u", "v"]), pd.Index(["u", "v"]), ["u", np.str_("v")], pd.Series(["u", "v"])):
        kept = ArraySource(X, Y, feature_names=names).feature_names
        assert kept == ("u", "v")
        assert {type(name) for name in kept} == {str}
    assert ArraySource(X[:, :1], Y, feature_names="size").feature_names == ("size",)
    assert ArraySource(X, Y).feature_names == ("x0", "x1")
    assert ArraySource(pa.table({"a": Y}), pa.array(Y)).target_name == "y"


def test_a_target_is_never_named_as_a_feature():
    """`evaluate --data` finds both by name."""
    assert ArraySource(pd.DataFrame(X, columns=["x", "y"]), Y).target_name == "target"
    assert ArraySource(pd.DataFrame(X, columns=["target", "y"]), Y).target_name == "y2"


@pytest.mark.parametrize(
    ("x", "settings", "said"),
    [
        (pd.DataFrame(X, columns=["a", "a"]), {}, "x: has more than one column named a"),
        (pd.DataFrame(X, columns=[0, "0"]), {}, "x: has more than one column named 0"),
        (pd.DataFrame(X, columns=["a", ""]), {}, "x: column 2 has no name"),
        (X, {"feature_names": ["a", "a"]}, "feature_names: names a more than once"),
        (X, {"feature_names": {"a", "b"}}, "feature_names: is a set, which has no order"),
        (X, {"feature_names": ["a"]}, "1 names for 2 columns"),
        (FRAME, {"feature_names": ["u", "v"]}, "x: lacks the columns u, v; present: a, b"),
        (FRAME.assign(price=Y), {}, "x: holds the target price too, which would predict itself"),
        (FRAME.assign(c="x"), {}, "column 'c' of x: holds str.*feature_names"),
        (FRAME.assign(c=pd.Categorical([1, 2] * 4)), {}, "column 'c' of x: holds category"),
        (FRAME.assign(c=pd.Series(range(N)).astype(object)), {}, "column 'c' of x: holds object, such as '0'"),
        (FRAME.assign(c=pd.array([True] * 7 + [None], "boolean")), {}, "column 'c' of x: holds 1 missing value"),
        (FRAME.assign(c=pd.array([1.0] * 7 + [None], "double[pyarrow]")), {}, "column 'c' of x: holds 1 missing"),
        (FRAME.assign(c=pd.Timestamp("2024")), {}, "column 'c' of x: holds datetime64"),
        (FRAME.assign(c=pd.Timestamp("2024", tz="UTC")), {}, "column 'c' of x: holds datetime64"),
        (FRAME.assign(c=pd.Timedelta("1s")), {}, r"column 'c' of x: holds timedelta64.*t / np.timedelta64\(1, 's'\)"),
        (FRAME.assign(c=[np.nan, *[1.0] * 7]), {}, "x: holds numbers that are not finite, first in row 0, column c"),
        (pa.table({"a": pa.array([None, *[1.0] * 7])}), {}, "column 'a' of x: holds 1 missing value"),
        (pa.table({"a": pa.nulls(N)}), {}, "column 'a' of x: holds null"),
        (pa.table({"a": pa.array(["u"] * N).dictionary_encode()}), {}, "column 'a' of x: holds dictionary"),
        (pa.table({"a": [2**53 + 1] * N}), {}, "column 'a' of x: holds the integer 9007199254740993"),
        (np.full((N, 1), 2**64 - 1, np.uint64), {}, "x: holds the integer 18446744073709551615"),
        (X.astype(np.longdouble) / 3, {}, "x: holds (float128|longdouble) numbers that float64 has not"),
        ([[1.0, 2.0], [3.0]], {}, "x: is no array.*give rows of equal length"),
        (FRAME[[]], {}, r"arrays of shapes \[0, 0\], \[8\]: must be"),
        (FRAME[:0], {}, r"arrays of shapes \[0, 2\], \[8\]: must be"),
        (Y, {}, r"arrays of shapes \[8\], \[8\]: must be.*give np.asarray\(x\).reshape\(-1, 1\)"),
        (X, {"test_rows": 2.5}, "test_rows=2.5: must be a whole number of rows"),
    ],
)
def test_tables_to_train_on_that_are_refused(x: Any, settings: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        ArraySource(x, TARGET, **settings)


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (TARGET.to_frame(), r"y: is a table of 1 columns; give one of them, as y\['price'\]"),
        ({"p": Y}, r"y: is a table of 1 columns; give one of them, as y\['p'\]"),
        (Y[:, np.newaxis], r"arrays of shapes \[8, 2\], \[8, 1\].*give np.ravel\(y\)"),
        (TARGET.astype("Float64").mask(TARGET > 0), "y: holds . missing value"),
        (pd.array([1] * 7 + [None], "Int64"), "y: holds 1 missing value"),
        (TARGET.astype(str), "y: holds str"),
        (pd.Series(pd.Categorical([1, 2] * 4)), "y: holds category"),
        ([np.nan, *[1.0] * 7], "y: holds numbers that are not finite, first in row 0;"),
        ("abcdefgh", "y: holds <U8"),
    ],
)
def test_targets_that_are_refused(y: Any, said: str):
    with pytest.raises(InputError, match=said):
        ArraySource(FRAME, y)
    if said.startswith(("y: holds", "arrays")):
        with pytest.raises(InputError, match=said.replace("y", "w", 1) if said[0] == "y" else r"np.ravel\(w\)"):
            ArraySource(X, Y, y)


EXACT: dict[str, tuple[Any, list[float]]] = {
    "float16": (np.array([0.1, 2.0], np.float16), [float(np.float16(0.1)), 2.0]),
    "float32": (np.array([0.1, 2.0], np.float32), [float(np.float32(0.1)), 2.0]),
    "big-endian": (np.array([0.1, 2.0], ">f8"), [0.1, 2.0]),
    "big-endian integers": (np.array([3, -2], ">i2"), [3.0, -2.0]),
    "long double": (np.array([0.5, 2.0], np.longdouble), [0.5, 2.0]),
    "bool": (np.array([True, False]), [1.0, 0.0]),
    "large integers": (np.array([2**53, -(2**62)]), [2.0**53, -(2.0**62)]),
    "unsigned": (np.array([2**63, 0], np.uint64), [2.0**63, 0.0]),
    "Int64": (pd.array([3, 4], "Int64"), [3.0, 4.0]),
    "boolean": (pd.Series([True, False], dtype="boolean"), [1.0, 0.0]),
    "sparse column": (pd.arrays.SparseArray([0.0, 1.5]), [0.0, 1.5]),
    "arrow decimal": (pa.array([decimal.Decimal("12.1"), decimal.Decimal("19.9")]), [12.1, 19.9]),
    "arrow bool": (pa.array([True, False]), [1.0, 0.0]),
    "arrow half": (pa.array(np.array([0.1, 2.0], np.float16)), [float(np.float16(0.1)), 2.0]),
    "arrow chunks": (pa.chunked_array([[1], [2]]), [1.0, 2.0]),
    "lists": ([1, 2.5], [1.0, 2.5]),
    "backwards": (np.array([1.0, 2.0])[::-1], [2.0, 1.0]),
}


@pytest.mark.parametrize("kind", EXACT)
def test_numbers_are_taken_as_they_are(kind: str):
    column, wanted = EXACT[kind]
    x, y, w = taken({"a": column}, column, np.abs(wanted) + 1)
    assert x[:, 0].tolist() == y.tolist() == wanted
    assert x.dtype in (np.float32, np.float64)
    assert x.dtype.isnative
    assert fitted("a").predict({"a": column}).tolist() == [value + 0.5 for value in wanted]
    assert (w > 0).all()


def test_arrays_are_not_copied():
    x = np.ones((4, 2))
    assert np.shares_memory(taken(x, np.ones(4))[0], x)


# Rows by label or by position: both are one step away, and neither is guessed.


@pytest.mark.parametrize("which", ["y", "w"])
def test_row_labels_that_differ(which: str):
    shuffled = TARGET.abs()[::-1]
    tables = {"y": TARGET, "w": None} | {which: shuffled}
    said = f"x and {which}: their row labels differ, first in row 0: '0' and '7'; give {which}.loc\\[x.index\\]"
    with pytest.raises(InputError, match=said):
        ArraySource(FRAME, tables["y"], tables["w"])
    position = 1 if which == "y" else 2
    by_label = {**tables, which: shuffled.loc[FRAME.index]}
    assert taken(FRAME, by_label["y"], by_label["w"])[position].tolist() == np.abs(Y).tolist()
    by_position = {**tables, which: shuffled.to_numpy()}
    assert taken(FRAME, by_position["y"], by_position["w"])[position].tolist() == np.abs(Y)[::-1].tolist()


def test_row_labels_that_agree_or_are_nobodys():
    days = pd.date_range("2024-01-01", periods=N)
    taken(FRAME.set_axis(days), TARGET.set_axis(days))
    taken(FRAME.set_axis(days), Y, np.ones(N))
    taken(X, TARGET.set_axis(days), TARGET.abs().set_axis(days))
    with pytest.raises(InputError, match="y and w: their row labels differ"):
        ArraySource(X, TARGET.set_axis(days), TARGET.abs())
    with pytest.raises(InputError, match="first in row 5: '5' and '9'"):
        ArraySource(FRAME, TARGET.rename({5: 9}))


# Masks.


@pytest.mark.parametrize("which", ["x", "y", "w"])
def test_a_mask_is_refused_and_its_fixes_work(which: str):
    arrays = {"x": np.ma.array(X), "y": np.ma.array(Y), "w": np.ma.array(np.ones(N))}
    taken(*arrays.values())  # A mask that hides nothing is fine.
    arrays[which][2:4] = np.ma.masked
    count = 4 if which == "x" else 2
    rows = r"\.any\(axis=1\)" if which == "x" else ""
    said = rf"{which}: {count} of its numbers are under a mask; .* ~np\.ma\.getmaskarray\({which}\){rows}, or"
    with pytest.raises(InputError, match=said):
        ArraySource(*arrays.values())
    mask = np.ma.getmaskarray(arrays[which])
    keep = ~(mask.any(axis=1) if which == "x" else mask)
    kept = taken(*(array[keep] for array in arrays.values()))
    assert np.array_equal(kept[0], X[[0, 1, 4, 5, 6, 7]])
    taken(*{**arrays, which: np.ma.filled(arrays[which], 1.0)}.values())


def test_masks_of_rows_to_predict():
    model, x = fitted("a", "b"), np.ma.array(X)
    assert np.array_equal(model.predict(x), model.predict(X))
    x[1, 0] = np.ma.masked
    with pytest.raises(InputError, match="x: 1 of its numbers is under a mask"):
        model.predict(x)
    with pytest.raises(InputError, match=r"x: 1 .* ~np.ma.getmaskarray\(np.ma.array\(x\)\).any\(axis=1\)"):
        model.predict(list(x))
    keep = ~np.ma.getmaskarray(np.ma.array(list(x))).any(axis=1)
    assert np.array_equal(model.predict(x[keep]), model.predict(np.delete(X, 1, axis=0)))
    with pytest.raises(InputError, match="column 'a' of x: 1 of its numbers is under a mask"):
        model.predict({"a": x[:, 0], "b": X[:, 1]})
    rows = np.ma.array(structured(), mask=[(0, 1, 0)] * N)
    assert len(model.predict(rows)) == N  # The mask is on a column that plays no part.
    rows = np.ma.array(structured(), mask=[(0, 0, 1)] * N)
    with pytest.raises(InputError, match="column 'a' of x: 8 of its numbers are under a mask"):
        model.predict(rows)


def test_fixes_that_messages_offer():
    text, codes = FRAME.assign(c="1.5"), FRAME.assign(c=pd.Categorical([1, 2] * 4))
    assert taken(text.assign(c=np.asarray(text.c, float)), Y)[0][0, 2] == 1.5
    assert taken(codes.assign(c=np.asarray(codes.c, float)), Y)[0][:2, 2].tolist() == [1, 2]
    assert taken(text, Y, feature_names=["a", "b"])[0].shape == (N, 2)
    gaps = FRAME.assign(price=Y, c=pd.array([1.0, None] * 4, "Float64"))
    rest = gaps.dropna()
    assert len(taken(rest.drop(columns="price"), rest.price)[1]) == 4
    assert taken(gaps.fillna(0.0).drop(columns="price"), gaps.price)[0][1, 2] == 0
    nulls = pa.table({"a": [1.0, None], "b": [3.0, 4.0]})
    assert fitted("a", "b").predict(nulls.drop_null()).tolist() == [7.5]
    filled = nulls.set_column(0, "a", nulls["a"].fill_null(0.0))
    assert fitted("a", "b").predict(filled).tolist() == [7.5, 8.5]
    times = pd.Series(pd.date_range("2024-01-01", periods=2, freq="min"))
    for t in (times, times.dt.tz_localize("UTC"), times.to_numpy()):
        assert fitted("t").predict({"t": (t - t.min()) / np.timedelta64(1, "s")}).tolist() == [0.5, 60.5]
    large = np.array([[2**53 + 1], [2**53 + 3]])
    assert fitted("t").predict(large - large.min()).tolist() == [0.5, 2.5]
    assert fitted("t").predict(np.asarray(large, float)).shape == (2,)
    assert fitted("a", "b").predict(np.asarray(FRAME.iloc[0]).reshape(1, -1)).shape == (1,)
    assert fitted("a", "b").predict(sparse.csr_array(X).toarray()).shape == (N,)
    assert fitted("a", "b").predict(pd.DataFrame([{"a": 1.0, "b": 2.0}])).tolist() == [5.5]
    assert fitted("a", "b").predict(pd.DataFrame(X).to_numpy()).shape == (N,)
    assert taken(np.asarray(Y).reshape(-1, 1), np.ravel(Y[:, np.newaxis]))[0].shape == (N, 1)
    with_target = FRAME.assign(price=Y)
    assert ArraySource(with_target.drop(columns="price"), with_target.price).target_name == "price"
    assert ArraySource(with_target, with_target.price.rename("later")).target_name == "later"


def test_arrays_that_change_between_two_uses():
    """What was read from them at the first use is kept in memory, so the second would mix old rows and new ones."""
    x = X.copy()
    source = ArraySource(x, Y)
    before = source.fingerprint()
    x[0, 0] += 1
    with pytest.raises(InputError, match="source: its arrays have changed since it was first used; make a new"):
        source.fingerprint()
    assert ArraySource(x, Y).fingerprint() != before
