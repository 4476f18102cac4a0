"""A CSV file: train on it, evaluate, predict with intervals: `python examples/own_table.py`."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import tapedist


def write_houses(path: Path, rows: int, seed: int) -> None:
    """Writes houses whose price follows from area and age but for noise; `town` is text, which is no feature."""
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["town", "area", "age", "price"])
        for _ in range(rows):
            area, age = rng.randrange(40, 250), rng.randrange(0, 100)
            price = round(50_000 + 2_000 * area - 300 * age + rng.gauss(0, 10_000))
            writer.writerow([rng.choice(["Ashby", "Corby"]), area, age, price])


def tapedist_command(*words: str) -> None:
    """Runs `tapedist WORDS`, and shows what it prints."""
    subprocess.run([sys.executable, "-m", "tapedist", *words], check=True)


with tempfile.TemporaryDirectory() as folder:
    houses, sold, run = Path(folder, "houses.csv"), Path(folder, "sold.csv"), Path(folder, "run")
    write_houses(houses, 2_000, seed=1)
    write_houses(sold, 200, seed=2)

    # The same as: tapedist train --data=houses.csv --target=price --run_dir=run
    result = tapedist.train(tapedist.TrainConfig(data=str(houses), target="price", run_dir=str(run), plots=False))
    print("coefficients:", *(f"{n} {w:.0f}" for n, w in zip(result.feature_names, result.weights, strict=True)))
    print(f"digest: {result.digest}", flush=True)

    # These two read the run folder only, so any later process may run them; neither imports TensorFlow.
    tapedist_command("evaluate", f"--run_dir={run}", f"--data={sold}")
    predicted = Path(folder, "predicted.csv")
    tapedist_command("predict", f"--run_dir={run}", f"--data={sold}", f"--output={predicted}", "--interval")

    with sold.open() as prices, predicted.open() as predictions:
        pairs = list(zip(csv.DictReader(prices), csv.DictReader(predictions), strict=True))
    inside = sum(float(p["low"]) <= float(house["price"]) <= float(p["high"]) for house, p in pairs)
    print(f"{inside} of {len(pairs)} prices lie in their 95 % interval")
