"""A table is the same rows in every format, at every memory budget, from any thread."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tapedist.data.permutations import epoch_rows
from tapedist.data.tables import csv_blocks, store
from tapedist.data.tables.csv import _Parser
from tapedist.data.tables.csv_blocks import Block
from tapedist.data.tables.files import TableFile
from tapedist.data.tables.parquet import ParquetReader
from tapedist.data.tables.scan import CHUNK_ROWS, row_hash
from tapedist.data.tables.table import check_table, open_table
from tapedist.errors import InputError

pytestmark = pytest.mark.usefixtures("all_cores")

N = 200_000
FORMATS = ("t.csv", "t.tsv", "t.parquet", "folder", "folder/*.parquet", "stored.npz", "packed.npz")
# Where rows are kept -> `memory_budget` that leads there; without room for a scratch file they are kept nowhere.
PLACES = {"memory": 2**29, "scratch file": 2**18, "nowhere": 2**18}


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "b": draw.normal(size=N),
        "a": draw.normal(size=N) * 10.0 ** draw.integers(-30, 30, N),
        "k": draw.integers(-(2**53), 2**53, N),
        "y": draw.normal(size=N).astype(np.float32),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, np.ndarray]) -> Path:
    """One table in every format."""
    root = tmp_path_factory.mktemp("tables")
    table = pa.table(rows)
    # As float64 in text, so that every digit is written.
    text = table.set_column(3, "y", table["y"].cast(pa.float64()))
    pa.csv.write_csv(text, root / "t.csv")
    pa.csv.write_csv(text, root / "t.tsv", pa.csv.WriteOptions(delimiter="\t"))
    pq.write_table(table, root / "t.parquet", row_group_size=30_000)
    (root / "folder" / "more").mkdir(parents=True)
    (root / "folder" / "_SUCCESS").touch()
    for part, name in enumerate(("p0.parquet", "p1.parquet", "p2.parquet")):
        pq.write_table(table.slice(part * 90_001, 90_001), root / "folder" / name, row_group_size=7_777)
    np.savez(root / "stored.npz", **rows)
    np.savez_compressed(root / "packed.npz", **rows)
    return root


def _matrix(rows: dict[str, np.ndarray]) -> np.ndarray:
    return np.column_stack([rows[name].astype(np.float64) for name in ("b", "a", "k", "y")])


def _taken(source, split: str, indices: np.ndarray) -> np.ndarray:
    x, y = source.rows(split, indices)
    return np.column_stack([x, y])


@pytest.fixture
def open_at(monkeypatch: pytest.MonkeyPatch):
    """`open_table`, made to keep the rows at a given place."""

    def opened(path: Path, place: str, **settings):
        with monkeypatch.context() as patch:
            if place == "nowhere":
                patch.setattr(store, "_SPARE_BYTES", 2**62)
            source = open_table(str(path), memory_budget=PLACES[place], **settings)
        assert source.storage == place
        return source

    return opened


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(folder: Path, rows: dict[str, np.ndarray], name: str, place: str, open_at):
    source = open_at(folder / name, place, target="y", seed=3, dtype="float64")
    test = row_hash(np.arange(N), 3) < np.uint64(int(0.2 * 2**64))
    assert source.feature_names == ("b", "a", "k")
    for split, chosen in (("train", ~test), ("test", test)):
        n = source.num_rows(split)
        expected = _matrix(rows)[chosen]
        assert n == len(expected)
        blocks = [_taken(source, split, np.arange(i, min(n, i + 7919))) for i in range(0, n, 7919)]
        np.testing.assert_array_equal(np.concatenate(blocks), expected)
        shuffled = epoch_rows(np.arange(5000), num_rows=n, seed=1, epoch=2)
        np.testing.assert_array_equal(_taken(source, split, shuffled), expected[shuffled])


def test_every_format_has_one_fingerprint(folder: Path, rows: dict[str, np.ndarray]):
    def fingerprint(name: str, **settings) -> str:
        return open_table(str(folder / name), **{"target": "y", "dtype": "float64", **settings}).fingerprint()

    one = fingerprint("t.csv")
    assert {fingerprint(name, memory_budget=budget) for name in FORMATS for budget in (2**29, 2**18)} == {one}
    other = [
        fingerprint("t.parquet", seed=1),
        fingerprint("t.parquet", test_fraction=0.3),
        fingerprint("t.parquet", split="index"),
        fingerprint("t.parquet", features=("a", "b", "k")),
        fingerprint("t.parquet", features=("b",)),
        fingerprint("t.parquet", target="k"),
        fingerprint("folder/p0.parquet"),
    ]
    assert len({one, *other}) == 1 + len(other)


@pytest.mark.parametrize("on_bad_rows", ["drop", "mean"])
def test_bad_rows_are_the_same_in_every_format(tmp_path: Path, on_bad_rows: str, open_at):
    draw = np.random.default_rng(5)
    x, y = draw.normal(size=(150_000, 2)) + 3, draw.normal(size=150_000)
    x[draw.random(x.shape) < 0.01] = np.nan
    y[draw.random(y.shape) < 0.01] = np.inf
    names = ("x0", "x1", "y")
    columns = dict(zip(names, (*x.T, y), strict=True))
    pa.csv.write_csv(pa.table(columns), tmp_path / "t.csv")
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=10_000)
    np.savez(tmp_path / "t.npz", x=x, y=y)
    hidden = row_hash(np.arange(len(y)), 0) < np.uint64(int(0.2 * 2**64))
    kept = np.isfinite(y) & (np.isfinite(x).all(1) if on_bad_rows == "drop" else True)
    means = np.nanmean(x[kept & ~hidden], axis=0)
    expected = np.where(np.isfinite(x), x, means)[kept & ~hidden]
    prints = set()
    for name in ("t.csv", "t.parquet", "t.npz"):
        for place in PLACES:
            source = open_at(tmp_path / name, place, target="y", on_bad_rows=on_bad_rows)
            got, target = source.rows("train", np.arange(source.num_rows("train")))
            np.testing.assert_allclose(got, expected, rtol=1e-12)
            np.testing.assert_array_equal(target, y[kept & ~hidden])
            assert source.num_dropped == len(y) - kept.sum()
            assert source.num_imputed == (on_bad_rows == "mean") * np.isnan(x[kept]).sum()
            prints.add((source.fingerprint(), got.tobytes()))
    assert len(prints) == 1


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64, 10_000])
def test_text_is_cut_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_end: str, final: bool, block_bytes: int
):
    lines = ["word,a,y", *(f'"say ""{i}"",{line_end}",{i},{-i}' for i in range(300))]
    path = tmp_path / "t.csv"
    path.write_bytes((line_end.join(lines) + line_end * final).encode())
    for name in ("BLOCK_BYTES", "HEADER_BYTES", "SAMPLE_BYTES"):
        monkeypatch.setattr(csv_blocks, name, block_bytes)
    source = open_table(str(path), target="y", features=("a",), test_fraction=0.0)
    numbers = np.arange(300.0)
    np.testing.assert_array_equal(_taken(source, "train", np.arange(300)), np.column_stack([numbers, -numbers]))


def test_index_split_holds_the_last_rows_out(folder: Path, rows: dict[str, np.ndarray]):
    source = open_table(str(folder / "t.parquet"), target="y", split="index", test_fraction=0.3, dtype="float64")
    assert (source.num_rows("train"), source.num_rows("test")) == (140_000, 60_000)
    np.testing.assert_array_equal(_taken(source, "test", np.arange(60_000)), _matrix(rows)[140_000:])
    with pytest.raises(IndexError, match="60000"):
        source.rows("test", np.array([60_000]))


@pytest.mark.parametrize("kind", ["hash", "index"])
@pytest.mark.parametrize("num_rows", [1, 999, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS + 17])
@pytest.mark.parametrize("test_fraction", [0.0, 0.05, 0.5])
def test_splits_cover_all_kept_rows_once(tmp_path: Path, kind: str, num_rows: int, test_fraction: float, open_at):
    draw = np.random.default_rng(num_rows)
    for share, place in ((0.0, "memory"), (0.3, "scratch file"), (0.3, "nowhere")):
        bad = draw.random(num_rows) < share
        bad[0] = False
        np.savez(tmp_path / "t.npz", x=np.where(bad, np.nan, np.arange(num_rows)), y=np.zeros(num_rows))
        place = place if (~bad).sum() * 16 > PLACES[place] else "memory"
        source = open_at(
            tmp_path / "t.npz", place, split=kind, test_fraction=test_fraction, seed=7, on_bad_rows="drop",
            dtype="float64",
        )  # fmt: skip
        train, test = (source.rows(name, range(source.num_rows(name)))[0][:, 0] for name in ("train", "test"))
        assert (np.diff(train) > 0).all()
        assert (np.diff(test) > 0).all()
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.flatnonzero(~bad))
        if kind == "index":
            assert len(test) == int((~bad).sum() * test_fraction)
        else:
            hidden = row_hash(np.arange(num_rows), 7) < np.uint64(int(test_fraction * 2**64))
            np.testing.assert_array_equal(test, np.flatnonzero(hidden & ~bad))
        if not test_fraction:
            np.testing.assert_array_equal(source.file_rows(np.arange(len(train))), train)
        some = draw.permutation(len(train))[:100]
        np.testing.assert_array_equal(source.rows("train", some)[0][:, 0], train[some])


def test_hash_is_stable():
    # Written down once: a release that changes these changes which rows every user's model was tested on.
    hashes = [hex(value) for value in row_hash(np.array([0, 1, 2**40]), 0)]
    assert hashes == [
        "0xa706dd2f4d197e6f",
        "0xb382a305f4414f5e",
        "0x249a9fa92118613f",
    ]
    assert len(set(row_hash(np.arange(100_000), 0)) & set(row_hash(np.arange(100_000), 1))) == 0


def test_arrays_x_y_w_need_no_flags(tmp_path: Path):
    x, y, w = np.arange(12.0).reshape(6, 2), np.arange(6), np.arange(6) + 1
    np.savez(tmp_path / "t.npz", x=x, y=y[:, None], w=w, note=np.array(list("abcdef")))
    source = open_table(str(tmp_path / "t.npz"), test_fraction=0.0)
    assert (source.feature_names, source.target_name, source.weighted) == (("x0", "x1"), "y", True)
    got = source.rows("train", np.array([5, 0, 3]))
    for values, expected in zip(got, (x, y, w), strict=True):
        np.testing.assert_array_equal(values, expected[[5, 0, 3]])
    np.savez(tmp_path / "u.npz", x=x[:, 0], y=y)
    assert check_table(str(tmp_path / "u.npz")).roles.names == ("x", "y")


def test_columns_that_are_left_out_are_named(tmp_path: Path):
    (tmp_path / "t.csv").write_text("word,a,day,y\nup,1,2024-01-01,3\ndown,2,2024-01-02,4\n")
    source = open_table(str(tmp_path / "t.csv"), target="y", test_fraction=0.0)
    assert source.feature_names == ("a",)
    assert source.notices == (f"{tmp_path}/t.csv: columns not used: word, day",)


def test_table_to_predict_from_needs_no_target(tmp_path: Path):
    (tmp_path / "t.csv").write_text("b,a\n1,2\n3,4\n")
    path = str(tmp_path / "t.csv")
    source = open_table(path, features=("a", "b"), need_target=False, test_fraction=0.0)
    x, y = source.rows("train", np.arange(2))
    assert x.tolist() == [[2, 1], [4, 3]]
    assert np.isnan(y).all()


def test_no_row_left_to_train_on(tmp_path: Path):
    (tmp_path / "t.csv").write_text("a,y\n1,2\n")
    with pytest.raises(InputError, match=r"leaves no row .* to train on"):
        open_table(str(tmp_path / "t.csv"), target="y", test_fraction=1 - 2**-40)


@pytest.mark.parametrize("place", PLACES)
def test_threads_read_the_same_rows(folder: Path, rows: dict[str, np.ndarray], place: str, open_at):
    source = open_at(folder / "folder", place, target="y", test_fraction=0.0, dtype="float64")
    expected = _matrix(rows)

    def check(seed: int) -> None:
        if place == "nowhere":  # Nearly in order, as elements are asked for.
            chosen = np.arange(seed * 6000, min(N, seed * 6000 + 9000))
        else:
            chosen = np.random.default_rng(seed).integers(0, N, 3000)
        np.testing.assert_array_equal(_taken(source, "train", chosen), expected[chosen])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(32)))


def test_rows_kept_nowhere_are_decoded_once_a_pass(folder: Path, open_at, monkeypatch: pytest.MonkeyPatch):
    source = open_at(folder / "t.parquet", "nowhere", target="y", dtype="float64")
    monkeypatch.setattr(store, "_HELD_BYTES", 2**20)
    begun: list[int] = []
    original = ParquetReader.batches
    monkeypatch.setattr(ParquetReader, "batches", lambda self, names: begun.append(0) or original(self, names))
    n = source.num_rows("train")
    order = list(range(0, n, 1000))
    for _ in range(2):
        for first in (place for pair in zip(order[1::2], order[::2], strict=False) for place in pair):
            source.rows("train", range(first, min(n, first + 1000)))
    assert len(begun) == 2
    assert "decoded anew in each pass" in source.notices[0]
    assert "--scratch_dir" in source.notices[0]


_READ_ALL = """
import re, sys
import numpy as np
from tapedist.data.tables import store
from tapedist.data.tables.table import open_table
if sys.argv[3] == "nowhere":
    store._SPARE_BYTES = 2**62
source = open_table(sys.argv[1], target="y", memory_budget=int(sys.argv[2]))
n = source.num_rows("train")
for first in range(0, n, 65536):
    source.rows("train", np.arange(first, min(n, first + 65536)))
anonymous = re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())
print(source.storage, int(anonymous[1]) / 1024, sep=",")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory in use from /proc")
def test_memory_stays_constant(tmp_path: Path, run_python):
    """A table of 96 MB takes that in memory; elsewhere its pages are the system's, which drops them when it likes."""
    draw = np.random.default_rng(0)
    for part in range(12):
        columns = {name: draw.normal(size=250_000) for name in ("a", "b", "c", "y")}
        pq.write_table(pa.table(columns), tmp_path / f"{part:02}.parquet", row_group_size=25_000)
    found = {}
    for place, budget in PLACES.items():
        done = run_python("-c", _READ_ALL, str(tmp_path), str(budget), place)
        assert done.code == 0, done.err
        storage, found[place] = done.out.split(",")
        assert storage == place
    assert float(found["scratch file"]) < float(found["memory"]) - 50
    assert float(found["nowhere"]) < float(found["scratch file"]) + 90  # What a pass holds.


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_take_in_a_tf_data_map(folder: Path, name: str):
    import tensorflow as tf

    source = open_table(str(folder / name), target="y", dtype="float64")
    n = source.num_rows("train") // 1000 * 1000
    data = tf.data.Dataset.range(0, n, 1000).map(
        lambda first: source.take("train", first + tf.range(1000, dtype=tf.int64)), num_parallel_calls=4
    )
    assert [tuple(spec.shape) for spec in data.element_spec] == [(1000, 3), (1000,)]
    got = [np.column_stack([x, y]) for x, y in data.as_numpy_iterator()]
    np.testing.assert_array_equal(np.concatenate(got), _taken(source, "train", np.arange(n)))


def test_failure_inside_a_map_keeps_its_type(tmp_path: Path, open_at):
    import tensorflow as tf

    from tapedist.errors import StateError

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": np.arange(100_000.0), "y": np.zeros(100_000)}), path, row_group_size=1000)
    source = open_at(path, "nowhere", target="y")
    path.unlink()
    data = tf.data.Dataset.range(1).map(lambda first: source.take("train", tf.reshape(first, [1])))
    with pytest.raises(tf.errors.OpError, match="while in use"):
        list(data)
    assert isinstance(source.failure, StateError)


def test_three_readings_of_text_agree(tmp_path: Path):
    """Arrow's, the patched and the cell-by-cell reading of one cell give the same bits, whatever stands there."""
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,1\n")
    parser = _Parser(TableFile.of(str(path)), ("a", "b"), ("a", "b"))
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choice("0123456789.eE+- \tx_n") for _ in range(draw.randint(1, 7)))
        if draw.random() < 0.5:
            text = f"{draw.choice(['', '-', '+'])}{draw.random():.17g}e{draw.randint(-330, 330)}"
        block = Block(f"{text},1\n".encode(), 1)
        exact = parser._slow(block)[0]
        for reading in (parser._fast(block), parser._patched(block)):
            if reading is not None:
                found = np.where(np.isfinite(reading[0]), reading[0], np.nan)
                np.testing.assert_array_equal(found, exact, err_msg=repr(text))
