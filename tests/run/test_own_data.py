"""A user's table through `train`: one digest in every format, the right optimum, and refusals that name the column."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import own_tables
import pytest
from conftest import Finished

from tapedist.config import TrainConfig
from tapedist.errors import InputError, StateError
from tapedist.run.train import train

pytestmark = pytest.mark.usefixtures("all_cores")

MODES: dict[str, dict[str, Any]] = {
    "full_batch": {"num_epochs": 300},
    "stream": {"num_epochs": 300, "full_batch_engine": "stream"},
    "mini_batch": {"mode": "mini_batch", "batch_size": 100, "num_epochs": 20},
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, table = tmp_path_factory.mktemp("tables"), own_tables.columns()
    return {
        "csv": own_tables.write_csv(folder / "t.csv", table),
        "parquet": own_tables.write_parquet(folder / "t.parquet", table),
        "npz": own_tables.write_npz(folder / "t.npz", table),
    }


def job(data: Path, **settings: Any) -> TrainConfig:
    base = {"target": "price", "features": own_tables.NAMES[:3], "learning_rate": 0.1, "statistics": "false"}
    return TrainConfig(data=data, **{**base, **settings})


@pytest.mark.parametrize(("mode", "weight"), [("full_batch", "times"), ("stream", ""), ("mini_batch", "times")])
def test_one_digest_in_every_format(tables: dict[str, Path], mode: str, weight: str):
    results = [train(job(path, weight=weight, **MODES[mode])) for path in tables.values()]
    assert len({result.digest for result in results}) == 1
    assert results[0].train_loss is not None
    assert results[0].test_loss is not None


def test_full_batch_reaches_the_weighted_optimum(tables: dict[str, Path]):
    expected = own_tables.solution(own_tables.columns(), weighted=True)
    for engine in ("moments", "stream"):
        result = train(
            job(tables["csv"], weight="times", test_fraction=0, dtype="float64", full_batch_engine=engine,
                num_epochs=400)
        )  # fmt: skip
        np.testing.assert_allclose(result.parameters, expected, rtol=1e-9)


def test_without_intercept(tables: dict[str, Path]):
    table = own_tables.columns()
    x = np.stack([table[name] for name in own_tables.NAMES[:3]], axis=1)
    result = train(
        job(tables["csv"], fit_intercept=False, test_fraction=0, dtype="float64", num_epochs=20_000, learning_rate=0.25)
    )
    expected = np.linalg.lstsq(x / x.max(axis=0), table["price"], rcond=None)[0] / x.max(axis=0)
    np.testing.assert_allclose(result.parameters, expected, rtol=1e-8)
    assert result.bias == 0.0


def test_the_order_of_rows_does_not_depend_on_where_they_are_kept(
    tables: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    from tapedist.data.tables import table as module

    settings = {**MODES["mini_batch"], "num_epochs": 3}
    kept = train(job(tables["parquet"], **settings))
    unpatched = module.open_table
    monkeypatch.setattr("tapedist.data.catalog.open_table", lambda *a, **k: unpatched(*a, **k, memory_budget=20_000))
    streamed = train(job(tables["parquet"], **settings))
    assert streamed.digest == kept.digest


def test_dropped_rows_are_counted_and_change_the_answer_only_by_being_gone(
    tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = tables["csv"].read_text().splitlines()
    lines[5] = lines[5].replace(",", ",oops", 1)
    bad = tmp_path / "bad.csv"
    bad.write_text("\n".join(lines))
    settings = {"num_epochs": 5, "test_fraction": 0}
    with pytest.raises(InputError, match=r"bad\.csv:6:"):
        train(job(bad, **settings))
    result = train(job(bad, on_bad_rows="drop", **settings), quiet=False)
    assert "1 of 700 rows have bad cells and are left out" in capsys.readouterr().out
    good = tmp_path / "good.csv"
    good.write_text("\n".join(lines[:5] + lines[6:]))
    np.testing.assert_allclose(result.parameters, train(job(good, **settings)).parameters, rtol=1e-9)


@pytest.mark.parametrize("kept", [True, False])
def test_a_table_that_changes_while_in_use(
    tables: dict[str, Path], tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
):
    """Rows that are kept are those of the file as it was; others are not those that the run began with."""
    from tapedist.data import catalog
    from tapedist.data.tables import store

    path = own_tables.write_parquet(tmp_path / "t.parquet", own_tables.columns(20_000), row_group_size=10_000)
    settings = {"num_epochs": 2, "mode": "mini_batch", "shuffle": "none", "batch_size": 5000, "learning_rate": 1e-9}
    unchanged = train(job(path, standardize=False, **settings)).digest
    unpatched = catalog.open_table

    def open_then_change(*args: Any, **settings: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(store, "_SPARE_BYTES", 2**26 if kept else 2**62)
            table = unpatched(*args, **settings, memory_budget=100_000)
        assert table.storage == ("scratch file" if kept else "nowhere")
        own_tables.write_parquet(path, own_tables.columns(20_000, seed=9), row_group_size=10_000)
        return table

    monkeypatch.setattr(catalog, "open_table", open_then_change)
    if kept:
        assert train(job(path, standardize=False, **settings)).digest == unchanged
        return
    with pytest.raises(StateError, match="changed while in use"):
        train(job(path, standardize=False, **settings), quiet=False)


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("a,y\n1,2\n", ["--target=z"], "--target=z: no such column in t.csv; present: a, y"),
        ("a,y\n1,2\n", ["--target=y", "--features=a,y"], "--target=y: is among --features"),
        ("a,a,y\n1,2,3\n", ["--target=y"], "duplicate column a"),
        ("", ["--target=y"], "t.csv: the file is empty"),
        ("a,y\n1,2\n", ["--target=y", "--weight=w"], "--weight=w: no such column"),
    ],
)
def test_headers_are_judged_before_tensorflow(
    tmp_path: Path, text: str, words: list[str], says: str, run_python: Callable[..., Finished]
):
    (tmp_path / "t.csv").write_text(text)
    script = "import sys; from tapedist.cli import main; code = main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    finished = run_python("-c", script, "train", "--data=t.csv", "--run_dir=out", *words)
    assert finished.code == 2
    assert len(finished.errors) == 1
    assert says in finished.errors[0]
    assert "tensorflow" not in finished.out.split()
    assert not (tmp_path / "out").exists()


def test_a_bad_cell_through_the_command(tmp_path: Path, tapedist_command: Callable[..., Finished]):
    (tmp_path / "t.csv").write_text("a,y\n1,2\n2,1e999\n3,4\n")
    finished = tapedist_command("train", "--data=t.csv", "--target=y", warm=True)
    assert finished.code == 2
    assert len(finished.errors) == 1
    assert "t.csv:3:y" in finished.errors[0]
    assert "1e999" in finished.errors[0]


_PEAK = """
import functools, re, sys
from tapedist.config import TrainConfig
from tapedist.data import catalog
catalog.open_table = functools.partial(catalog.open_table, memory_budget=2**24)
from tapedist.run.train import train
config = TrainConfig(
    data=sys.argv[1], target="y", cache="none", num_epochs=1, statistics="false", full_batch_engine="stream"
)
assert train(config).train_loss > 0
print(int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory in use from /proc")
def test_memory_does_not_grow_with_the_table(tmp_path: Path, run_python: Callable[..., Finished]):
    """But for the pages of the scratch file, which are the system's."""
    values = np.random.default_rng(0).standard_normal((61, 50_000))
    table = dict(zip([*(f"x{j}" for j in range(60)), "y"], values, strict=True))
    used = []
    for files in (4, 12):  # From the smaller on, blocks have their full size.
        folder = tmp_path / str(files)
        folder.mkdir()
        for number in range(files):
            own_tables.write_parquet(folder / f"{number:02}.parquet", table, row_group_size=5000)
        finished = run_python("-c", _PEAK, str(folder), warm=True)
        assert finished.code == 0, finished.err[-2000:]
        used.append(int(finished.out))
    assert used[1] - used[0] < 8 * values.nbytes / 2**20 / 3


def test_a_table_of_few_columns_has_statistics_however_long_it_is(
    tables: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tapedist.regression.summary._AFFORDABLE", 0)
    for settings, has in (({}, True), ({"statistics": "false"}, False)):
        result = train(job(tables["parquet"], **{"statistics": "auto", **settings}, num_epochs=2))
        assert (result.statistics is not None) == has
    monkeypatch.setattr("tapedist.regression.summary._FEW_COLUMNS", 4)
    # More columns are summed in float64, which is enough for these.
    found = train(job(tables["parquet"], statistics="auto", num_epochs=2)).statistics
    assert found
    assert result.statistics is None
