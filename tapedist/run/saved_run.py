"""What a run keeps in its folder: taken up when it starts, saved on its way, made whole when it is finished."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from tapedist.cluster.environment import numerics_class
from tapedist.cluster.team import SingleProcessTeam, Team
from tapedist.config import TrainConfig
from tapedist.errors import InputError, StateError
from tapedist.process import StopSignals
from tapedist.results.monitor import Monitor
from tapedist.results.result import TrainResult
from tapedist.run import run_files
from tapedist.run.objective import Objective
from tapedist.run.persistence import RunStore, from_arrays, identity, to_arrays
from tapedist.storage.run_folder import RunFolder
from tapedist.training.state import TrainingState, digest


class SavedRun:
    """A run and its folder; without a folder nothing is kept. Only the chief has one, and what it finds is everybody's.

    Args:
        folder: where, or None.
        config: the run's settings.
        objective: what is fitted.
        team: all workers of the run.
        monitor: writes the rows of metrics.
        stop: whether a signal asked to stop; held back while the folder changes hands.
        environment: see `results.environment`.
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
        custom_source: bool = False,
    ):
        self._folder = folder
        self._config = config
        self._objective = objective
        self._team = team
        self._monitor = monitor
        self._stop = stop
        self._environment = environment
        self._own_source = custom_source
        self._metrics_position: int | None = None  # Where a resumed run's rows end; None for a fresh run.
        self._store = folder and RunStore(
            folder.checkpoints,
            identity=identity(config, rows=objective.source.fingerprint(), model=objective.name),
            # What no environment changes needs no warning.
            environment={} if objective.has_one_answer(config) else numerics_class(),
            warn=lambda line: print(f"tapedist: warning: {line}", file=sys.stderr),
        )

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
            return fresh, {}  # The run that is there goes when nothing can keep this one from training any more.
        stored = self._store.load()
        if stored is None:
            if self._folder.done.exists():
                raise StateError(f"{self._folder.root}: its checkpoints are gone; --resume=never starts anew")
            if self._config.resume == "must":
                raise InputError(f"--resume=must: {self._folder.root} holds no checkpoint yet; use --resume=auto")
            return fresh, {}
        state, progress, self._metrics_position = stored
        self._monitor.log(f"Resuming after {state.step} updates from {self._folder.root}")
        return state, progress

    def finished(self, state: TrainingState, *, num_steps: int) -> tuple[float | None, float | None] | None:
        """`(train loss, test loss)` if the folder holds this run, finished; `state` is then told why it stopped early.

        Args:
            state: the one that the folder holds.
            num_steps: updates that the run has when it is finished.
        """

        def look() -> dict[str, np.ndarray]:
            if not (self._folder and self._folder.done.exists()) or self._config.resume == "never":
                return {}
            summary = run_files.done_summary(self._folder.done)
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
        """Makes the folder that of this run under way. From here on only training can fail."""

        def claim() -> dict[str, np.ndarray]:
            if self._folder:
                with self._stop.deferred():
                    if self._config.resume == "never":
                        self._folder.clear()
                    self._folder.done.unlink(missing_ok=True)  # There is more to do.
                    run_files.begin(self._folder, config=self._config, environment=self._environment)
            return {}

        self._team.broadcast(claim)

    def rewind_metrics(self, *, finished: bool) -> None:
        """Forgets the rows of metrics that the state does not know; those of a finished run all count."""
        if self._folder and self._metrics_position is not None:
            metrics = self._folder.metrics
            end = metrics.stat().st_size if finished and metrics.exists() else 0
            self._monitor.rewind(max(end, self._metrics_position))

    def save(self, state: TrainingState, progress: Mapping[str, np.ndarray]) -> None:
        """Commits a state, with the engine's sums of the step under way.

        Raises:
            StorageError: if it cannot be written.
        """
        if self._store:
            self._store.save(state, progress=progress, position=self._monitor.position())

    def finish(self, result: TrainResult, state: TrainingState) -> None:
        """Writes what was found; the mark of success comes last.

        Raises:
            StorageError: if something cannot be written.
        """
        if self._folder:
            run_files.keep(
                self._folder,
                result,
                config=self._config,
                source=self._objective.source,
                environment=self._environment,
                custom_source=self._own_source,
                path=[(epoch, self._objective.units.to_raw(parameters)) for epoch, parameters in state.path],
            )
