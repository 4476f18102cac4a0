"""The commands on a finished run: evaluate, predict, report, export. Each works from the run folder alone.

TensorFlow is imported only for synthetic rows and SavedModels.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tapedist import process
from tapedist.command_options import EvaluateOptions, PredictOptions, RunOptions
from tapedist.config import TrainConfig
from tapedist.data import catalog
from tapedist.data.source import Source, row_arrays, row_blocks
from tapedist.data.tables import files
from tapedist.data.tables.columns import listed
from tapedist.data.tables.table import TableSource, column_names, open_table
from tapedist.errors import InputError, StateError, TapedistError
from tapedist.process import check_fork
from tapedist.regression.prediction import evaluate_rows
from tapedist.results.prediction_file import check_output, write_columns
from tapedist.run.saved_run import read_config
from tapedist.storage.files import write_atomic
from tapedist.storage.model_file import FittedModel, read_content, read_model
from tapedist.storage.run_folder import RunFolder
from tapedist.text import display

_PREDICT_ROWS = 65_536
_FAR = 0.1  # Standard errors from the optimum, above which its intervals do not describe the model.


def evaluate(options: EvaluateOptions) -> None:
    """Prints the errors of a run's model on its own rows, or on a table.

    Raises:
        InputError: if there is no such run or table, or they do not fit.
        StateError: if the run's model is damaged, or its rows have changed.
    """
    folder, model = _find(options.run_dir)
    if options.data:
        _check_columns(options.data, (*model.feature_names, model.target_name))
        own: Source = open_table(
            options.data, target=model.target_name, features=model.feature_names, weight=options.weight,
            on_bad_rows=options.on_bad_rows, test_fraction=0, dtype="float64", of_run=True,
            scratch_dir=options.scratch_dir,
        )  # fmt: skip
        names = {"train": "data"}
    else:
        try:
            config = read_config(folder)
            own = _own_source(dataclasses.replace(config, scratch_dir=options.scratch_dir), model.content)
        except _OtherRowsError as error:
            raise StateError(f"{folder.root}: {error}; evaluate by --data=PATH") from None
        names = {"train": "train", "test": "test"}
    _print_notices(own)
    for split, name in names.items():
        metrics = evaluate_rows(row_blocks(own, split), model.weights, model.bias_at_center, model.center)
        if metrics:
            print(metrics.line(name, fit_intercept=model.fit_intercept))


def predict(options: PredictOptions) -> None:
    """Writes a prediction for every row of a table, in the order of its rows.

    Raises:
        InputError: if there is no such run or table, they do not fit, or the output cannot be made.
        StateError: if the run's model is damaged, or the table changes while it is read.
        StorageError: if the output cannot be written.
    """
    _, model = _find(options.run_dir)
    check_output(options.output, data=options.data, overwrite=options.overwrite)
    _check_columns(options.data, model.feature_names)
    interval = _with_interval(options, model)
    table = open_table(
        options.data, features=model.feature_names, need_target=False, test_fraction=0, dtype="float64",
        on_bad_rows=options.on_bad_rows, of_run=True, scratch_dir=options.scratch_dir,
    )  # fmt: skip
    _print_notices(table)
    rows = write_columns(options.output, _predictions(table, model, options, interval=interval))
    print(f"Predicted {rows} rows: {options.output}")


def report(options: RunOptions) -> None:
    """Makes a run's `report.html` again.

    Raises:
        InputError: if there is no such run.
        StateError: if its files are damaged.
        StorageError: if the page cannot be written.
    """
    from tapedist.results.report_data import report_page
    from tapedist.storage.metrics_file import read_rows

    folder = RunFolder.find(options.run_dir)
    content, config = read_content(folder.model, run_dir=folder.root), read_config(folder)
    source: Source | None
    try:
        source = _own_source(config, content)
    except TapedistError as error:
        print(f"tapedist: warning: the rows are left out of the report: {error}", file=sys.stderr)
        source = None
    page = report_page(
        config=config,
        model=content,
        environment=_read_environment(folder),
        history=read_rows(folder.metrics),
        source=source,
    )
    write_atomic(folder.report, page)
    print(f"Report: {folder.report}")


def _read_environment(folder: RunFolder) -> Any:
    """The content of `env.json`."""
    try:
        return json.loads(folder.environment.read_text())
    except (OSError, ValueError) as error:
        raise StateError(f"{folder.environment}: cannot be read ({error}); restore it, or train again") from None


def export(options: RunOptions) -> None:
    """Saves a run's model as the next version of its SavedModel.

    Raises:
        InputError: if there is no such run.
        StateError: if its model is damaged.
        StorageError: if it cannot be written.
    """
    folder, model = _find(options.run_dir)

    _start_tensorflow()
    from tapedist.results.export import export_model

    print(f"Exported: {export_model(model, folder.export)}")


def _find(run_dir: str) -> tuple[RunFolder, FittedModel]:
    folder = RunFolder.find(run_dir)
    return folder, read_model(folder.model, run_dir=folder.root)


class _OtherRowsError(StateError):
    """A run's settings no longer give the rows that it was trained on."""


def _own_source(config: TrainConfig, content: Mapping[str, Any]) -> Source:
    """The training rows of the run whose `model.json` is `content`.

    Raises:
        InputError: if they cannot be read.
        StateError: if they change while they are read, or have changed since.
    """
    if content.get("own_source"):
        raise _OtherRowsError("it was trained from Python on a source of its own, which no command can open")
    if not config.from_table:
        _start_tensorflow()
    source = catalog.open_source(config, in_order=True)
    if source.fingerprint() != content.get("rows"):
        raise _OtherRowsError("its rows have changed since it was trained")
    return source


def _check_columns(data: str, needed: Sequence[str]) -> None:
    """Raises if a table lacks a column that a run was trained on; its numbers are checked later."""
    present = column_names(data)
    missing = [name for name in needed if name not in present]
    if missing:
        raise InputError(
            f"--data={files.display(data)}: lacks {listed(missing)}, which the run was trained on; "
            f"present: {listed(present)}"
        )


def _start_tensorflow() -> None:
    """Imports TensorFlow and finds the devices, without the messages of native libraries."""
    check_fork()
    with process.quiet_start():
        import tensorflow as tf

        tf.config.list_logical_devices()


def _print_notices(source: Source) -> None:
    for notice in source.notices:
        print(f"Notice: {notice}")


def _with_interval(options: PredictOptions, model: FittedModel) -> bool:
    if options.interval == "false":
        return False
    if model.interval is None:
        if options.interval == "auto":
            return False
        fit = model.statistics or {}
        why = "; train with --statistics=true"
        if fit and not fit["degrees_of_freedom"]:
            why = f": {fit['num_rows']} rows leave none for {fit['rank']} parameters; train on more rows"
        raise InputError(
            f"--interval=true: the run in {display(options.run_dir)} has no standard errors{why}, or drop --interval"
        )
    far = ((model.statistics or {}).get("learned") or {}).get("max_standard_errors")
    if far is None or far > _FAR:
        away = "an unknown number of" if far is None else f"{far:.3g}"
        print(
            f"Notice: the model is {away} standard errors from the optimum that the intervals belong to; train longer"
        )
    return True


def _predictions(
    table: TableSource, model: FittedModel, options: PredictOptions, *, interval: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Columns of the output, block by block."""
    shape = model.interval if interval else None
    n = table.num_rows("train")
    for first in range(0, n, _PREDICT_ROWS):
        indices = np.arange(first, min(first + _PREDICT_ROWS, n))
        x = row_arrays(table, "train", indices)[0]
        columns = {"row": table.file_rows(indices)} if options.on_bad_rows == "drop" else {}
        columns["prediction"] = model.predict(x)
        if shape is not None:
            margins = shape.margins(x, level=options.level)
            columns |= {"low": columns["prediction"] - margins, "high": columns["prediction"] + margins}
        yield columns
