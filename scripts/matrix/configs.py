"""The runs of the matrix, as words of `tapedist train`, and the tables that some of them are of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

_QUIET = ["--statistics=false", "--plots=false"]
_TYPES = ("float32", "float64")
_RULES = ("sgd", "momentum", "nesterov", "adam")
# Of a config that is expensive where processes are many, one of each kind.
CORE = (
    "stream d=1 float32", "stream d=17 float64", "moments d=3 float32", "moments d=64 float64", "batches d=3 float64",
    "batches d=17 float32", "huber adam", "absolute nesterov", "table", "table huber", "table weights", "above 4 MiB",
)  # fmt: skip


def configs(tables: Path) -> dict[str, list[str]]:
    """Name -> words; tables are those of `write_tables`."""
    found = _engines() | _losses_and_rules() | _of_tables(tables) | _sizes(tables)
    return {name: [*words, *_QUIET] for name, words in found.items()}


def _engines() -> dict[str, list[str]]:
    """Every engine, by width and type."""
    found = {}
    rules = {1: "sgd", 3: "nesterov", 17: "adam", 64: "momentum"}
    orders = {1: "batches", 3: "rows", 17: "none", 64: "batches"}
    for d, rule in rules.items():
        for dtype in _TYPES:
            rows = [f"--num_features={d}", f"--dtype={dtype}", "--learning_rate=0.01", f"--optimizer={rule}"]
            full = [*rows, "--n_samples=3203"]
            found[f"stream d={d} {dtype}"] = [*full, "--full_batch_engine=stream", "--num_epochs=5"]
            found[f"moments d={d} {dtype}"] = [*full, "--full_batch_engine=moments", "--num_epochs=40"]
            batches = ["--mode=mini_batch", "--batch_size=96", f"--shuffle={orders[d]}", "--num_epochs=2"]
            found[f"batches d={d} {dtype}"] = [*rows, "--n_samples=1203", *batches]
    return found


def _losses_and_rules() -> dict[str, list[str]]:
    """Every loss with every rule, with penalties and without intercepts, in turns."""
    found = {}
    modes = (["--full_batch_engine=stream", "--num_epochs=5"], ["--mode=mini_batch", "--batch_size=77"])
    for i, loss in enumerate(("squared", "absolute", "huber")):
        for j, rule in enumerate(_RULES):
            words = [f"--loss={loss}", f"--optimizer={rule}", "--n_samples=1501", "--num_features=2", "--num_epochs=2"]
            words += [f"--dtype={_TYPES[(i + j) % 2]}", "--learning_rate=0.02", *modes[(i + j // 2) % 2]]
            words += ["--l2=0.05"] if j % 2 else []
            words += ["--fit_intercept=false"] if j == 2 else []
            found[f"{loss} {rule}"] = words
    return found


def _of_tables(tables: Path) -> dict[str, list[str]]:
    """Tables, with the defaults and with single settings."""
    plain, wide, aliased = (f"--data={tables / name}" for name in ("plain.csv", "wide.parquet", "aliased.parquet"))
    y, w = "--target=y", "--weight=w"
    return {
        "table": [plain, y],
        "table weights": [wide, y, w],
        "table float64": [plain, y, "--dtype=float64"],
        "table huber": [plain, y, "--loss=huber"],
        "table huber weights": [wide, y, w, "--loss=huber", "--dtype=float64"],
        "table absolute": [plain, y, "--loss=absolute", "--num_epochs=40"],
        "table batches": [plain, y, "--mode=mini_batch", "--num_epochs=3"],
        "table batches weights": [wide, y, w, "--mode=mini_batch", "--batch_size=100", "--num_epochs=3"],
        "table no intercept": [plain, y, "--fit_intercept=false"],
        "table l2": [wide, y, "--l2=0.1"],
        "table raw": [plain, y, "--standardize=false", "--learning_rate=1e-5", "--num_epochs=30"],
        "table stream": [plain, y, "--full_batch_engine=stream", "--learning_rate=0.3", "--num_epochs=30"],
        "table patience": [plain, y, "--early_stop_patience=3", "--learning_rate=0.4", "--num_epochs=400"],
        "table gradient": [plain, y, "--early_stop_gradient_norm=1e-3", "--learning_rate=0.4", "--num_epochs=400"],
        "table no test": [plain, y, "--test_fraction=0"],
        "table index split": [plain, y, "--split=index", "--test_fraction=0.3"],
        "aliased": [aliased, y],
        "aliased batches": [aliased, y, "--mode=mini_batch", "--num_epochs=3", "--dtype=float64"],
        "offset": [f"--data={tables / 'offset.npz'}", y],
        "offset float64": [f"--data={tables / 'offset.npz'}", y, "--dtype=float64", "--full_batch_engine=stream"],
    }


def _sizes(tables: Path) -> dict[str, list[str]]:
    """Splits of few rows and of many."""
    few = ["--learning_rate=0.01", "--num_epochs=6", "--test_fraction=0", "--num_features=3"]
    large = [f"--data={tables / 'large.npz'}", "--target=y", "--num_epochs=3", "--learning_rate=0.3"]
    return {
        "one row": [*few, "--n_samples=1", "--full_batch_engine=stream"],
        "two rows moments": [*few, "--n_samples=2", "--full_batch_engine=moments", "--dtype=float64"],
        "seven rows": [*few, "--n_samples=7", "--mode=mini_batch", "--batch_size=3"],
        "above 4 MiB": [*large, "--full_batch_engine=stream", "--dtype=float64"],
        "above 4 MiB moments": [*large, "--full_batch_engine=moments"],
        "above 4 MiB batches": [*large, "--mode=mini_batch", "--batch_size=50000", "--dtype=float64"],
        "synthetic above 4 MiB": ["--n_samples=700001", "--num_epochs=2", "--full_batch_engine=stream"],
        "tutorial": ["--num_epochs=30"],
    }


def write_tables(folder: Path) -> None:
    """The tables that `configs` names, of the same rows each time."""
    random = np.random.Generator(np.random.Philox(20))
    x = random.normal(size=(2003, 3)) * [1, 20, 0.5] + [0, 100, -3]
    rows = {f"x{j}": x[:, j] for j in range(3)} | {"y": x @ [2.0, -0.5, 7.0] + random.normal(size=len(x))}
    pa.csv.write_csv(pa.table(rows), folder / "plain.csv")
    x = random.normal(size=(1201, 17))
    y = x.sum(1) + random.normal(size=len(x))
    weights = np.where(np.arange(len(x)) % 9 == 0, 0.0, 10.0 ** random.uniform(-6, 6, len(x)))
    columns = {f"x{j}": x[:, j] for j in range(17)} | {"y": y, "w": weights}
    pa.parquet.write_table(pa.table(columns), folder / "wide.parquet", row_group_size=200)
    x = random.integers(0, 50, (901, 5)).astype(float)
    x[:, 3], x[:, 4] = x[:, 0] - 2 * x[:, 1], 4.0
    columns = {f"x{j}": x[:, j] for j in range(5)} | {"y": x[:, 0] + x[:, 2] + random.normal(size=len(x))}
    pa.parquet.write_table(pa.table(columns), folder / "aliased.parquet")
    x = random.normal(size=(1501, 2)) + 1e6
    np.savez(folder / "offset.npz", x=x, y=x @ [1.0, -2.0] + random.normal(size=len(x)))
    x = random.normal(size=(250_007, 3))
    np.savez(folder / "large.npz", x=x, y=x.sum(1) + random.normal(size=len(x)))
