"""In full batch the order of rows, the format of their file and its pieces change no bit of a fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import own_tables
import pytest

from tapedist.config import TrainConfig
from tapedist.run.train import train

FORMS = ("csv", "shuffled csv", "sorted csv", "parquet", "npz")
ALL = {
    "features": ("area", "rooms", "age"), "standardize": "true", "learning_rate": 0.05, "num_epochs": 25, "seed": 4,
    "init": "normal", "fit_intercept": True, "mode": "full_batch", "statistics": "true", "on_bad_rows": "error",
    "log_every_epochs": 5, "optimizer": "nesterov", "momentum": 0.8, "l2": 1e-9, "split": "index",
}  # fmt: skip
SETTINGS = {
    "defaults": {},
    "weights": {"weight": "times"},
    "huber": {"loss": "huber", "huber_delta": 500.0, "weight": "times"},
    "raw units": {"standardize": "false", "learning_rate": 1e-6, "num_epochs": 9},
    "no intercept": {"fit_intercept": False},
    "float64 stream": {"dtype": "float64", "full_batch_engine": "stream", "learning_rate": 0.3, "num_epochs": 9},
    "absolute": {"loss": "absolute", "learning_rate": 100.0, "num_epochs": 9},
    "all, by stream": {**ALL, "full_batch_engine": "stream"},
    "all, by moments": {**ALL, "full_batch_engine": "moments", "dtype": "float64"},
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Path]]:
    """`rows -> files` of the same rows in all forms."""
    root, known = tmp_path_factory.mktemp("orders"), {}

    def written(rows: int) -> list[Path]:
        if rows in known:
            return known[rows]
        table = own_tables.columns(rows)
        random = np.random.default_rng(8)
        orders = {"in order": np.arange(rows), "sorted": np.argsort(table["price"])}
        orders |= {f"shuffled {k}": random.permutation(rows) for k in range(3)}
        of = {name: {key: column[order] for key, column in table.items()} for name, order in orders.items()}
        folder = root / str(rows)
        folder.mkdir()
        known[rows] = [
            own_tables.write_csv(folder / "rows.csv", of["in order"]),
            own_tables.write_csv(folder / "shuffled.csv", of["shuffled 0"]),
            own_tables.write_csv(folder / "sorted.csv", of["sorted"]),
            own_tables.write_parquet(folder / "rows.parquet", of["shuffled 1"], row_group_size=61),
            own_tables.write_npz(folder / "rows.npz", of["shuffled 2"]),
        ]
        return known[rows]

    return written


def _fitted(path: Path, settings: dict[str, object]) -> tuple[object, ...]:
    config = TrainConfig(data=str(path), target="price", features=own_tables.NAMES[:3], test_fraction=0.0, plots=False)
    words = {field: getattr(config, field) for field in ("data", "target", "features", "test_fraction", "plots")}
    result = train(TrainConfig(**{**words, **settings}))
    errors = [c.standard_error for c in result.statistics.fit.coefficients] if result.statistics else []
    return result.digest, result.train_loss, result.steps, [row.loss for row in result.history], errors


@pytest.mark.parametrize("name", SETTINGS)
def test_one_digest_whatever_the_order_and_the_format(name: str, tables: Callable[[int], list[Path]]) -> None:
    first, *others = (_fitted(path, SETTINGS[name]) for path in tables(701))
    assert first[2] > 0
    for form, other in zip(FORMS[1:], others, strict=True):
        assert other == first, form


@pytest.mark.parametrize("name", ["defaults", "huber"])
def test_so_do_rows_in_many_blocks(
    name: str, tables: Callable[[int], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different blocks hold different rows."""
    wanted = _fitted(tables(701)[0], SETTINGS[name])
    monkeypatch.setattr("tapedist.data.orders.RESIDENT_BYTES", 0)
    for constant in ("TILE_ROWS", "LEAST_PRODUCT_ROWS", "MOST_PRODUCT_ROWS"):
        monkeypatch.setattr(f"tapedist.data.orders.{constant}", 48)
    monkeypatch.setattr("tapedist.data.orders.BLOCK_BYTES", 4096)
    for path, cache in zip(tables(701)[1:], ("none", "device", "none", "device"), strict=True):
        assert _fitted(path, {**SETTINGS[name], "cache": cache}) == wanted


def test_rows_that_are_another_set_have_another_digest(tables: Callable[[int], list[Path]]) -> None:
    assert _fitted(tables(701)[0], {})[0] != _fitted(tables(700)[0], {})[0]
