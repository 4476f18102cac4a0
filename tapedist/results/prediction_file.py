"""Predictions for a table, as a CSV or Parquet file that appears whole or not at all. Imports no TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tapedist.data.tables.listing import find_files
from tapedist.data.tables.table import TFDS_PREFIX
from tapedist.errors import InputError
from tapedist.storage.files import replacing
from tapedist.text import display

_SUFFIXES = (".csv", ".parquet", ".pq")


def check_output(output: str, *, data: str, overwrite: bool) -> None:
    """Checks the path of the output; touches nothing.

    Args:
        output: the file to make.
        data: the table that is read.
        overwrite: whether the file may exist.

    Raises:
        InputError: if it cannot be the output.
    """
    name = f"--output={display(output)}"
    if not output.isprintable():
        raise InputError(f"{name}: must not hold control characters; rename it")
    if os.path.splitext(output)[1].lower() not in _SUFFIXES:
        raise InputError(f"{name}: must end in .csv or .parquet, which says the format")
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder):
        raise InputError(f"{name}: its folder does not exist; make it first")
    if not data.startswith(TFDS_PREFIX):
        inputs = {os.path.realpath(file.path) for file in find_files(data).files}
        if os.path.realpath(output) in inputs:
            raise InputError(f"{name}: is the table that is read; give another file")
    if os.path.isdir(output) or (os.path.lexists(output) and not os.path.isfile(output)):
        raise InputError(f"{name}: is there already and is no regular file; give another name")
    if os.path.lexists(output) and not overwrite:
        raise InputError(f"{name}: is there already; --overwrite replaces it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{name}: its folder is not writable; give another")


def write_columns(output: str, blocks: Iterator[dict[str, np.ndarray]]) -> int:
    """Writes blocks of columns, block by block; the file takes its name when it is complete.

    Args:
        output: ends in .csv, .parquet or .pq.
        blocks: the same columns in each.

    Returns:
        The number of rows written.

    Raises:
        StorageError: if it cannot be written; an earlier file is kept.
    """
    path = Path(output)
    with replacing(path) as temporary:
        rows = _write(temporary, path.suffix.lower() == ".csv", blocks)
        # Before the rename at the end of the block: else a crash may leave the name of an empty file.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    return rows


def _write(temporary: Path, as_csv: bool, blocks: Iterator[dict[str, np.ndarray]]) -> int:
    import pyarrow as pa
    from pyarrow import csv, parquet

    rows, writer = 0, None
    try:
        for columns in blocks:
            table: Any = pa.table(columns)
            if writer is None:
                make = csv.CSVWriter if as_csv else parquet.ParquetWriter
                writer = make(str(temporary), table.schema)
            writer.write_table(table)
            rows += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    return rows
