"""Ranges of columns hold every row of their split, by whatever way they are found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_oracle as oracle
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from own_tables import write_csv

from tapedist.data import generator
from tapedist.data.array_source import ArraySource
from tapedist.data.ranges import ranges
from tapedist.data.source import Ranges, as_source, interruptible
from tapedist.data.standardize import StandardUnits
from tapedist.data.synthetic import SyntheticSource
from tapedist.data.tables.table import TableSource, open_table
from tapedist.errors import InputError

TUTORIAL: dict[str, Any] = {
    "n_samples": 10_000, "test_fraction": 0.2, "seed": 0, "m": (9.0,), "c": -2.0, "mean": 0.0, "std": 1.0,
    "noise_std": 1.0,
}  # fmt: skip


def _equal(found: Ranges, wanted: Ranges) -> None:
    np.testing.assert_array_equal(found.low, wanted.low)
    np.testing.assert_array_equal(found.high, wanted.high)
    assert found.weight == wanted.weight
    assert not np.signbit(found.low[found.low == 0]).any()


def _by_hand(source: Any, split: str) -> Ranges:
    """From all rows at once."""
    if not source.num_rows(split):
        return Ranges.none(source.num_features)
    x, y, *w = source.rows(split, np.arange(source.num_rows(split)))
    columns = np.concatenate([x, y[:, np.newaxis]], axis=1)
    columns = columns[w[0] > 0] if w else columns
    if not len(columns):
        return Ranges.none(source.num_features)
    weight = float(w[0].max() / 2.0**source.weight_exponent) if w else 1.0
    return Ranges(columns.min(axis=0) + 0.0, columns.max(axis=0) + 0.0, weight)


# The generator.


def test_no_normal_is_larger_than_the_largest():
    """All radii, and all angles near those where sine and cosine are 1; the others are far below."""
    first = np.arange(2**18, dtype=np.uint32)
    turned = {}
    for turn in (0, 2**31 - 1):
        turned[turn] = np.abs(oracle.normals32(first, np.full_like(first, turn))).max()
    assert turned[0] == np.float32(6.660437107086182)
    assert max(turned.values()) <= generator.MOST
    # Radii fall with the word; beyond 2**24 words the float32 values are fewer, and all of them were tried once.
    radii = oracle.normals32(np.arange(2**22, dtype=np.uint32) << np.uint32(10), np.zeros(2**22, np.uint32))[0]
    assert np.abs(radii[1:]).max() < 5.6
    angles = np.unique(np.concatenate([2**31 - 1 - np.arange(0, 2**27, 61), np.arange(0, 2**27, 61)])).astype(np.uint32)
    for sign in (angles, -angles.view(np.int32).astype(np.int64) & 0xFFFFFFFF):
        pair = oracle.normals32(np.zeros(len(angles), np.uint32), sign.astype(np.uint32))
        assert np.abs(pair).max() <= generator.MOST
    assert generator.MOST < 6.660439 < generator.BOUND < 1.005 * generator.MOST


@pytest.mark.parametrize(
    "changes",
    [{}, {"m": (3.3, -2.1, 0.7), "c": 1e3, "mean": 17.3, "std": 0.01}, {"std": 0.0, "mean": 0.1, "m": (0.3, 0.7)}],
)
def test_no_synthetic_row_leaves_the_closed_form(changes: dict[str, Any]):
    source = SyntheticSource(**(TUTORIAL | changes))
    for split in ("train", "test"):
        found = ranges(source, split)
        _equal(found, ranges(source, "train"))
        x, y = source.take(split, tf.range(2000, dtype=tf.int64))
        columns = np.concatenate([x, y[:, tf.newaxis]], axis=1).astype(np.float64)
        assert (found.low <= columns.min(axis=0)).all()
        assert (found.high >= columns.max(axis=0)).all()
        assert found.weight == 1.0
    assert not source.holds_tiny
    assert SyntheticSource(**(TUTORIAL | {"std": 1e-30})).holds_tiny


def test_the_closed_form_holds_the_largest_normals():
    """Rows made of extremes, with every rounding against the bound, stay within; and it is not wide."""
    source = SyntheticSource(**(TUTORIAL | {"m": (3.3, 2.1, 0.7), "c": 1e3, "mean": 17.3, "std": 0.37}))
    z = np.float32(generator.BOUND)
    x = z * np.float32(0.37) + np.float32(17.3)
    y = np.float32(1e3)
    for weight, column in zip([3.3, 2.1, 0.7, 1.0], [x, x, x, z], strict=True):
        y = y + np.float32(weight) * column
    found = ranges(source, "train")
    assert x <= found.high[0] < x * (1 + 2e-6)
    assert y <= found.high[-1] < y * (1 + 2e-5)


# Tables.


def _table(rows: int, seed: int = 0, *, weighted: bool) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    table = {name: draw.standard_cauchy(rows) for name in ("a", "b", "y")}
    table["b"] = np.sort(table["b"])
    return table | ({"w": draw.integers(0, 4, rows).astype(float)} if weighted else {})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("split", "fraction"), [("hash", 0.2), ("index", 0.2), ("index", 0.55), ("hash", 0.0)])
@pytest.mark.parametrize("bad", ["error", "drop", "mean"])
def test_ranges_of_tables_are_found_while_they_are_scanned(
    tmp_path: Path, split: str, fraction: float, weighted: bool, bad: str, monkeypatch: pytest.MonkeyPatch
):
    for module in ("scan", "table"):
        monkeypatch.setattr(f"tapedist.data.tables.{module}.CHUNK_ROWS", 512)
    table = _table(5000, weighted=weighted)
    if bad != "error":
        table["a"][[3, 700, 701, 4999]] = np.nan
        table["y"][[4, 705]] = np.inf
        table["b"][4] = 1e9
    source = open_table(
        str(write_csv(tmp_path / "t.csv", table)), target="y", weight="w" if weighted else "", split=split,
        test_fraction=fraction, on_bad_rows=bad,
    )  # fmt: skip
    read: list[Any] = []
    original = TableSource.rows

    def deferred(self: TableSource, split: str, indices: Any) -> Any:
        read.append(indices)
        return original(self, split, indices)

    with monkeypatch.context() as patch:
        patch.setattr(TableSource, "rows", deferred)
        found = {name: ranges(source, name) for name in ("train", "test")}
        assert sum(map(len, read)) <= 512
    for name, one in found.items():
        _equal(one, _by_hand(source, name))
        _equal(source.ranges(name) if source.num_rows(name) else one, one)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_ranges_of_arrays(data: st.DataObject):
    d, n = data.draw(st.sampled_from([1, 2, 20])), data.draw(st.integers(2, 50))
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    x, y = draw.normal(size=(n, d)).astype(dtype), draw.normal(size=n).astype(dtype)
    w = draw.integers(0, 2, n) * 7.0 if data.draw(st.booleans()) else None
    test_rows = data.draw(st.integers(0, n // 2))
    try:
        source = ArraySource(x, y, w, test_rows=test_rows)
    except InputError:  # All rows of a split weigh 0.
        return
    for split in ("train", "test"):
        _equal(ranges(source, split), _by_hand(source, split))


# Other sources.


@dataclasses.dataclass
class Own:
    """A source with nothing but what a source must have."""

    x: np.ndarray
    y: np.ndarray
    w: np.ndarray | None = None

    feature_names = ("a", "b")
    num_features = 2
    target_name = "y"

    @property
    def weighted(self) -> bool:
        return self.w is not None

    def num_rows(self, split: str) -> int:
        return len(self.y) if split == "train" else 0

    def fingerprint(self) -> str:
        return "own"

    def take(self, split: str, indices: Any) -> tuple[Any, ...]:
        return tuple(tf.gather(column, indices) for column in (self.x, self.y, self.w) if column is not None)


def _own(**changes: Any) -> Own:
    draw = np.random.default_rng(0)
    return Own(draw.normal(size=(100, 2)), draw.normal(size=100), **changes)


def _ranges(source: Own, split: str, **settings: Any) -> Ranges:
    return ranges(as_source(source), split, **settings)


def test_an_own_source_is_passed_over_once_and_that_is_said():
    source, said = _own(w=np.arange(100.0) % 3), list[str]()
    source.x[0] = 1e9  # Of weight 0.
    found = _ranges(source, "train", log=said.append)
    counts = source.w > 0
    _equal(found, Ranges(*(end(np.c_[source.x, source.y][counts], axis=0) for end in (np.min, np.max)), 2.0))
    assert len(said) == 1
    assert "ranges(split)" in said[0]
    _equal(ranges(source, "test", log=said.append), Ranges.none(2))
    assert len(said) == 1


def test_an_own_source_may_know_its_ranges():
    source, wanted = _own(), Ranges(np.zeros(3), np.ones(3))
    source.ranges = lambda split: wanted
    assert _ranges(source, "train", log=pytest.fail) is wanted


def test_an_own_source_is_made_one_of_the_package_once():
    own = _own(w=np.arange(100.0))
    source = as_source(own)
    assert as_source(source) is source
    assert (source.weighted, source.num_rows("train"), source.fingerprint()) == (True, 100, "own")
    assert (source.truth, source.notices, source.weight_exponent, source.dtype) == (None, (), 0, None)
    for found, wanted in zip(source.rows("train", range(5, 9)), (own.x, own.y, own.w), strict=True):
        np.testing.assert_array_equal(found, wanted[5:9])
    x, *_ = source.take_runs("train", tf.constant([90, 97], tf.int64), length=4)
    rows = [90, 91, 92, 93, 97, 98, 99, 99]
    np.testing.assert_array_equal(x, own.x[rows])
    out = np.zeros((3, 2), np.float32), np.zeros(3, np.float32), np.zeros(3, np.float32)
    source.read_into(out, "train", range(3))
    np.testing.assert_array_equal(out[0], own.x[:3].astype(np.float32))
    own.take_runs = lambda split, first, *, length: "runs"
    own.truth = ((1.0, 2.0), 3.0)
    assert as_source(own).take_runs("train", None, length=1) == "runs"
    assert as_source(own).truth == own.truth


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_named(value: float):
    source = _own(w=np.ones(100))
    source.x[3, 1], source.w[3] = value, 0.0
    _ranges(source, "train")  # Its row does not count.
    source.x[70, 1] = value
    with pytest.raises(InputError, match=r"column b of train row 70 is -?(nan|inf); must be finite"):
        _ranges(source, "train")
    source.x[70, 1], source.y[5] = 0, value
    with pytest.raises(InputError, match=r"column y of train row 5 is"):
        _ranges(source, "train")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_weights_that_are_none_are_named(value: float):
    source = _own(w=np.ones(100))
    source.w[9] = value
    with pytest.raises(InputError, match=r"the weight of train row 9 is .*at least 0"):
        _ranges(source, "train")


def test_a_pass_can_be_broken_off():
    def check_stop() -> bool:
        raise KeyboardInterrupt

    with interruptible(check_stop), pytest.raises(KeyboardInterrupt):
        _ranges(_own(), "train")
    _ranges(_own(), "train")  # Asked inside the block only.


@pytest.mark.parametrize("left_out", [(), (1,)])
@pytest.mark.parametrize("intercept", [True, False])
def test_ranges_in_standard_units_are_those_of_the_rows(intercept: bool, left_out: tuple[int, ...]):
    draw = np.random.default_rng(0)
    raw = ArraySource(draw.normal(5, 3, size=(500, 3)), draw.normal(-1e3, 7, size=500), test_rows=50)
    source = StandardUnits.of(raw, fit_intercept=intercept, left_out=left_out).rows(raw)
    for split in ("train", "test"):
        found, (x, y) = ranges(source, split), source.take(split, tf.range(source.num_rows(split), dtype=tf.int64))
        columns = np.concatenate([x, y[:, tf.newaxis]], axis=1)
        _equal(found, Ranges(columns.min(axis=0) + 0.0, columns.max(axis=0) + 0.0))


def test_tiny_numbers_are_known(tmp_path: Path):
    x, y, w = np.ones((10, 1)), np.arange(10.0), np.ones(10)
    tiny, faint = np.where(y == 3, 1e-40, x[:, 0]), np.where(y == 3, 1e-40, w)
    for columns, wanted in [((x, y, w), False), ((tiny[:, np.newaxis], y, w), True), ((x, y, faint), True)]:
        np.savez(tmp_path / "t.npz", x=columns[0], y=columns[1], w=columns[2])
        for fraction in (0.0, 0.2):
            for split in ("hash", "index"):
                table = open_table(str(tmp_path / "t.npz"), test_fraction=fraction, split=split)
                assert table.holds_tiny == wanted
        assert ArraySource(*columns).holds_tiny == wanted
        units = StandardUnits(np.array([1e-3]), np.array([2.0]), 5.0, True)
        assert units.rows(ArraySource(*columns)).holds_tiny == wanted
    units = StandardUnits(np.array([1e-3]), np.array([1e30]), 5.0, True)
    assert units.rows(ArraySource(x, y)).holds_tiny
