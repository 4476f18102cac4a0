"""The files that a run leaves in its folder: what it is, when it begins; what it found, when it is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tapedist import flags, runtime_flags
from tapedist.config import TrainConfig
from tapedist.data.source import Source
from tapedist.errors import InputError, StateError
from tapedist.results.report_data import report_page
from tapedist.results.result import TrainResult
from tapedist.storage.files import write_atomic
from tapedist.storage.run_folder import RunFolder


def begin(folder: RunFolder, *, config: TrainConfig, environment: Mapping[str, Any]) -> None:
    """Writes what the run is, so that one that is killed can still be told and repeated.

    Nothing reads these files on resume: whatever a crash leaves of them, the run goes on.

    Args:
        folder: where.
        config: the run's settings.
        environment: see `results.environment`.

    Raises:
        StorageError: if one cannot be written.
    """
    write_atomic(folder.flags, flags.config_to_flagfile(config))
    write_atomic(folder.environment, _json(environment))


def keep(
    folder: RunFolder,
    result: TrainResult,
    *,
    config: TrainConfig,
    source: Source,
    environment: Mapping[str, Any],
    custom_source: bool,
    path: Sequence[tuple[int, np.ndarray]],
) -> None:
    """Writes what a finished run found; the mark of success comes last.

    Args:
        folder: where.
        result: what was found.
        config: the run's settings.
        source: the rows.
        environment: see `results.environment`.
        custom_source: whether the rows are the caller's own, which no setting names.
        path: `(epoch, parameters in raw units)` over time.

    Raises:
        StorageError: if one cannot be written.
    """
    model = result.as_model_json() | {"rows": source.fingerprint(), "own_source": custom_source}
    write_atomic(folder.model, _json(model))
    if config.plots:
        with runtime_flags.matplotlib_importable():
            from tapedist.results import figures

        figures.draw(folder.plots, result, source=source, path=path)
        page = report_page(config=config, model=model, environment=environment, history=result.history, source=source)
        write_atomic(folder.report, page)
    write_atomic(folder.done, _json(result.summary()))


def read_config(folder: RunFolder) -> TrainConfig:
    """The settings that the run was trained with.

    Raises:
        StateError: if they cannot be read.
    """
    try:
        return flags.CommandLine(TrainConfig, [f"--flagfile={folder.flags}"], of_older=True).options()
    except InputError as error:
        raise StateError(f"{folder.flags}: cannot be used ({error.problems[0]}); restore it") from None


def done_summary(path: Path) -> dict[str, Any]:
    """What `done.json` says; nothing if it is damaged, because all of it can be found anew."""
    try:
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    complete = isinstance(summary, dict) and {"digest", "stopped", "train_loss", "test_loss"} <= set(summary)
    return summary if complete else {}


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
