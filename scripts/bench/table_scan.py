"""Passes over a Parquet folder several times larger than the memory limit, beside pyarrow's own scan of it.

    python scripts/bench/table_scan.py --limit_gib=2 --times=4

Each job runs in a process of its own whose private memory the kernel limits (RLIMIT_DATA: heap, arenas and thread
stacks, but neither libraries nor the page cache). The folder holds random float64 columns, a few files of them again
and again. The opening reads all rows once and keeps them in a scratch file, from which the passes come. Scans by
pyarrow are timed before and after every job, because a
shared machine drifts; where others compute too, the share by processor time is the one to trust. Prints one line a job:

    job  seconds of its passes over the rows  million rows/s  shares of pyarrow's scan  peak resident memory
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from pyarrow import dataset, parquet

REPO = Path(__file__).resolve().parents[2]
FEATURES = tuple(f"x{j}" for j in range(8))
COLUMNS = (*FEATURES, "y")
FILE_ROWS, GROUP_ROWS, DISTINCT_FILES = 1_250_000, 250_000, 8

_OPENING = """
import sys, time
import psutil
from tapedist.data.tables.table import open_table
for pass_ in range(2):
    times = psutil.Process().cpu_times()
    print("Epoch: ", time.perf_counter(), times.user + times.system, flush=True)
    source = None if pass_ else open_table(sys.argv[1], target="y", test_fraction=0.0)
"""
JOBS = {
    "opening": [],
    "full batch, moments": ["--full_batch_engine=moments"],
    "full batch, stream": ["--full_batch_engine=stream"],
    "mini-batch, rows in order": ["--mode=mini_batch", "--batch_size=8192", "--shuffle=none"],
    "mini-batch, rows shuffled": ["--mode=mini_batch", "--batch_size=8192", "--shuffle=rows"],
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one job took.

    Attributes:
        passes: `(seconds, processor seconds)` of each pass over the rows.
        peak_mib: peak resident memory, libraries included.
    """

    passes: list[tuple[float, float]]
    peak_mib: float


def write_folder(folder: Path, rows: int) -> int:
    """Fills `folder` with at least so many rows; returns how many."""
    files = -(-rows // FILE_ROWS)
    random = np.random.default_rng(0)
    for number in range(files):
        path = folder / f"{number:04}.parquet"
        if number >= DISTINCT_FILES:
            shutil.copyfile(folder / f"{number % DISTINCT_FILES:04}.parquet", path)
            continue
        x = random.standard_normal((len(FEATURES), FILE_ROWS))
        y = x.T @ np.arange(1, len(FEATURES) + 1) + random.standard_normal(FILE_ROWS)
        parquet.write_table(pa.table(dict(zip(COLUMNS, (*x, y), strict=True))), path, row_group_size=GROUP_ROWS)
    return files * FILE_ROWS


def scan(folder: Path) -> tuple[float, float]:
    """Seconds of pyarrow's scan of all columns, and processor seconds."""
    begun, processor = time.perf_counter(), time.process_time()
    for _ in dataset.dataset(folder).to_batches(columns=list(COLUMNS)):
        pass
    return time.perf_counter() - begun, time.process_time() - processor


def run_job(folder: Path, flags: list[str], *, epochs: int, limit: int) -> Result:
    """Trains in a process with limited memory; the passes are timed from outside, by the lines that it prints.

    Without flags it only opens the table.
    """
    command = [sys.executable, "-c", _OPENING, str(folder)] if not flags else [
        sys.executable, "-m", "tapedist", "train", f"--data={folder}", "--target=y", "--test_fraction=0",
        "--cache=none", "--learning_rate=0.01", "--statistics=false", "--plots=false", "--log_every_epochs=1",
        f"--num_epochs={epochs}", *flags,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPO)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )  # fmt: skip
    assert process.stdout
    marks: list[tuple[float, float]] = []
    job = psutil.Process(process.pid)
    for line in process.stdout:
        if re.match(r"(Training samples|Epoch): ", line):
            times = job.cpu_times()
            marks.append((time.perf_counter(), times.user + times.system))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}")
    passes = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
    # The moments need one pass; the first pass of the others compiles.
    return Result(passes[:1] if not flags or "moments" in flags[0] else passes[1:] or passes, usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit_gib", type=float, default=2.0, help="private memory of a job")
    parser.add_argument("--times", type=float, default=4.0, help="size of the decoded table in limits")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where the table is written; a temporary folder by default")
    arguments = parser.parse_args()
    limit = int(arguments.limit_gib * 2**30)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        rows = write_folder(folder, int(arguments.times * limit) // (8 * len(COLUMNS)))
        size = rows * 8 * len(COLUMNS) / 2**30
        print(f"{rows} rows, {size:.2f} GiB decoded, limit {arguments.limit_gib} GiB, {os.cpu_count()} cores")
        scan(folder)
        for job, flags in JOBS.items():
            scans = [scan(folder)]
            found = run_job(folder, flags, epochs=arguments.epochs, limit=limit)
            scans.append(scan(folder))
            seconds, processor = map(statistics.median, zip(*found.passes, strict=True))
            reference, reference_processor = map(statistics.mean, zip(*scans, strict=True))
            print(
                f"{job:26s} {seconds:7.2f} s {rows / seconds / 1e6:6.2f} M rows/s "
                f"{reference / seconds:5.0%} of pyarrow's {rows / reference / 1e6:.1f} "
                f"({reference_processor / processor:.0%} by processor time), "
                f"peak {found.peak_mib:.0f} MiB, load {os.getloadavg()[0]:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
