"""What a run keeps in its folder: resumed when it starts, saved on its way, completed when it is finished.

The settings that decide the answer, the rows and the model are a run's identity: a stored state is continued only under
the same one. Imports no TensorFlow, because commands and `verify` read runs without it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tapedist import flags
from tapedist.config import TrainConfig
from tapedist.data.source import interruptible
from tapedist.errors import InputError, StateError
from tapedist.process import StopSignals
from tapedist.results.monitor import Monitor
from tapedist.results.report_data import report_page
from tapedist.results.result import TrainResult
from tapedist.runtime_flags import matplotlib_importable
from tapedist.storage.checkpoints import Checkpoint, CheckpointStore, OlderCheckpoint
from tapedist.storage.files import write_atomic
from tapedist.storage.run_folder import RunFolder
from tapedist.training.state import TrainingState, digest

if TYPE_CHECKING:  # They import TensorFlow.
    from tapedist.cluster.team import SingleProcessTeam, Team
    from tapedist.run.objective import Objective

_PROGRESS = "progress."
_ABSENT = object()
_MAX_SHOWN = 60

Losses = tuple[float | None, float | None]


class SavedRun:
    """A run and its folder; without a folder nothing is kept. Only the chief has one, and what it finds is everybody's.

    Args:
        folder: where, or None.
        config: the run's settings.
        objective: what is fitted.
        team: all workers of the run.
        monitor: writes the rows of metrics.
        stop: whether a signal asked to stop; held back while the folder changes hands.
        environment: the content of `env.json`.
        numerics: versions and devices on which the bits depend; empty if they depend on none. Another one than that of
            a stored state is warned about.
        custom_source: whether the rows are the caller's own, which no setting names.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        config: TrainConfig,
        *,
        objective: Objective,
        team: Team | SingleProcessTeam,
        monitor: Monitor,
        stop: StopSignals,
        environment: Mapping[str, Any],
        numerics: Mapping[str, Any],
        custom_source: bool = False,
    ):
        self._folder = folder
        self._config = config
        self._objective = objective
        self._team = team
        self._monitor = monitor
        self._stop = stop
        self._environment = environment
        self._custom_source = custom_source
        self._metrics_position: int | None = None  # Where a resumed run's rows end; None for a fresh run.
        self._meta = {
            "identity": identity(config, rows=objective.source.fingerprint(), model=objective.name),
            "environment": dict(numerics),
        }
        self._store = folder and CheckpointStore(directory=folder.checkpoints, warn=_warn)

    def resume(self, fresh: TrainingState) -> tuple[TrainingState, dict[str, np.ndarray]]:
        """The state to start from, `fresh` if none is stored, and the engine's sums of a step under way.

        Raises:
            InputError: if `--resume=must` and nothing is stored.
            StateError: if what is stored cannot be trusted or has another answer.
        """
        return from_arrays(self._team.broadcast(lambda: to_arrays(*self._stored(fresh))))

    def _stored(self, fresh: TrainingState) -> tuple[TrainingState, dict[str, np.ndarray]]:
        if not (self._store and self._folder):
            return fresh, {}
        if self._config.resume == "never":
            return fresh, {}  # The run that is there is removed when nothing can keep this one from training any more.
        stored = self._checkpoint(self._store, self._folder)
        if stored is None:
            if self._folder.done.exists():
                raise StateError(f"{self._folder.root}: its checkpoints are gone; --resume=never starts anew")
            if self._config.resume == "must":
                raise InputError(f"--resume=must: {self._folder.root} holds no checkpoint yet; use --resume=auto")
            return fresh, {}
        state, progress = from_arrays(stored.arrays)
        self._metrics_position = int(stored.arrays["metrics_position"])
        self._monitor.log(f"Resuming after {state.step} updates from {self._folder.root}")
        return state, progress

    def _checkpoint(self, store: CheckpointStore, folder: RunFolder) -> Checkpoint | None:
        """The newest good checkpoint, of a run with the same answer; None if none was ever saved."""
        try:
            checkpoint = store.load()
        except OlderCheckpoint as error:
            raise StateError(f"{error}; {_way_on(folder)}") from None
        if checkpoint is None:
            return None
        differences = answer_differences(checkpoint.meta["identity"], self._meta["identity"])
        if differences:
            raise StateError(
                f"{checkpoint.path.parent.parent}: holds a run with another answer ({'; '.join(differences)}); "
                "repeat its settings to continue it, give another --run_dir, or begin anew by --resume=never"
            )
        changed = answer_differences(checkpoint.meta["environment"], self._meta["environment"])
        if changed:
            _warn(f"the run was begun in another environment ({'; '.join(changed)}): bits may differ")
        return checkpoint

    def finished(self, state: TrainingState, *, num_steps: int) -> Losses | None:
        """`(train loss, test loss)` if the folder holds this run, finished; `state` is then told why it stopped early.

        Args:
            state: the one that the folder holds.
            num_steps: updates that the run has when it is finished.
        """

        def look() -> dict[str, np.ndarray]:
            if not (self._folder and self._folder.done.exists()) or self._config.resume == "never":
                return {}
            summary = done_summary(self._folder.done)
            # Another digest: the mark is older than the checkpoint.
            is_ours = summary.get("digest") == digest(self._objective.parameters(state.vector))
            if is_ours and (summary["stopped"] or state.step == num_steps):
                return {"summary": np.array(json.dumps(summary))}
            return {}

        found = self._team.broadcast(look)
        if not found:
            return None
        summary = json.loads(str(found["summary"]))
        state.stopped = summary["stopped"]
        return summary["train_loss"], summary["test_loss"]

    def claim(self) -> None:
        """Makes the folder that of this run under way. From here on only training can fail.

        Raises:
            StorageError: if it cannot be written.
        """

        def claim() -> dict[str, np.ndarray]:
            if self._folder:
                with self._stop.deferred():
                    if self._config.resume == "never":
                        self._folder.clear()
                    self._folder.done.unlink(missing_ok=True)  # There is more to do.
                    _write_settings(self._folder, self._config, self._environment)
            return {}

        self._team.broadcast(claim)

    def rewind_metrics(self, *, finished: bool) -> None:
        """Drops the rows of metrics that the state does not know; those of a finished run all count."""
        if self._folder and self._metrics_position is not None:
            metrics = self._folder.metrics
            end = metrics.stat().st_size if finished and metrics.exists() else 0
            self._monitor.rewind(max(end, self._metrics_position))

    def save(self, state: TrainingState, progress: Mapping[str, np.ndarray]) -> None:
        """Commits a state of whole steps, with the engine's sums of the step under way.

        Raises:
            StorageError: if it cannot be written; the previous one stays valid.
        """
        if self._store:
            position = np.array(self._monitor.position(), np.int64)  # Of `metrics.jsonl`: what belongs to the state.
            arrays = {**to_arrays(state, progress), "metrics_position": position}
            self._store.save(arrays, step=state.step, meta=self._meta)

    def finish(self, result: TrainResult, state: TrainingState) -> None:
        """Writes what was found; the mark of success comes last.

        Raises:
            StorageError: if something cannot be written.
        """
        if self._folder:
            # The chief alone reads rows here, and a check for a stop is a question to all workers.
            with interruptible(lambda: False):
                self._write_results(self._folder, result, state)

    def _write_results(self, folder: RunFolder, result: TrainResult, state: TrainingState) -> None:
        source = self._objective.source
        model = result.as_model_json() | {"rows": source.fingerprint(), "own_source": self._custom_source}
        write_atomic(folder.model, _json(model))
        if self._config.plots:
            path = [(epoch, self._objective.units.to_raw(parameters)) for epoch, parameters in state.path]
            with matplotlib_importable():
                from tapedist.results import figures

            figures.draw(folder.plots, result, source=source, path=path)
            page = report_page(
                config=self._config, model=model, environment=self._environment, history=result.history, source=source
            )
            write_atomic(folder.report, page)
        write_atomic(folder.done, _json(result.summary()))


def _warn(line: str) -> None:
    print(f"tapedist: warning: {line}", file=sys.stderr)


def _way_on(folder: RunFolder) -> str:
    """What to do with a run of version 0.1, whose parameters are at hand if it has finished once."""
    if folder.model.exists():
        start = f"go on from its parameters by --init_from={folder.root} and a new --run_dir"
        return f"{start}, or begin anew by --resume=never"
    return "the run never finished, so that no other can start from it; begin anew by --resume=never"


def _write_settings(folder: RunFolder, config: TrainConfig, environment: Mapping[str, Any]) -> None:
    """Writes what the run is, so that one that is killed can still be told and repeated.

    Nothing reads these files on resume: whatever a crash leaves of them, the run goes on.
    """
    write_atomic(folder.flags, flags.config_to_flagfile(config))
    write_atomic(folder.environment, _json(environment))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


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


def to_arrays(state: TrainingState, progress: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state and the engine's sums of the step under way as one set of arrays."""
    return {**state.to_arrays(), **{_PROGRESS + name: value for name, value in progress.items()}}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[TrainingState, dict[str, np.ndarray]]:
    """The inverse of `to_arrays`; other arrays are left alone."""
    progress = {name.removeprefix(_PROGRESS): v for name, v in arrays.items() if name.startswith(_PROGRESS)}
    return TrainingState.from_arrays(arrays), progress


def identity(config: TrainConfig, *, rows: str, model: str) -> dict[str, Any]:
    """What a run's answer depends on.

    Args:
        config: the run's settings.
        rows: the source's fingerprint.
        model: names the model and its shape.
    """
    return {**config.answer_fields(), "rows": rows, "model": model}


def answer_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compares the settings that decide the answer; empty if a stored run may be continued under `current`.

    Args:
        stored: by name, as JSON gave them back.
        current: by name, of any types that JSON holds (a tuple equals its list).

    Returns:
        One `name: stored value, asked value` for each difference, in the order of `current`, then of `stored`. Of the
        rows, whose value is a hash, only that they differ.
    """
    names = [*current, *(name for name in stored if name not in current)]
    pairs = ((name, _as_text(stored.get(name, _ABSENT)), _as_text(current.get(name, _ABSENT))) for name in names)
    return [
        "the rows are not the same" if name == "rows" else f"{name}: stored {_short(old)}, asked {_short(new)}"
        for name, old, new in pairs
        if old != new
    ]


def _as_text(value: Any) -> str:
    # Compared as text: 1 and 1.0 and true are equal in Python, and give different answers.
    return "nothing" if value is _ABSENT else json.dumps(value, sort_keys=True)


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]}...{text[-_MAX_SHOWN // 2 :]}"
