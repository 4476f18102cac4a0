"""One call of `train`, wired: source, model, engine and trainer from a config, and what becomes of their work."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist import rates, run_files
from tapedist.cluster.strategies import Choice
from tapedist.cluster.team import Solo, Team
from tapedist.config import TrainConfig
from tapedist.data.blocks import Source
from tapedist.data.sources import check_squares, open_source
from tapedist.data.standardize import RawUnits, StandardUnits
from tapedist.engine_choice import choose_call_length, choose_engine, test_evaluator
from tapedist.errors import DivergedError, InputError, StateError
from tapedist.results.environment import environment, numerics_class
from tapedist.results.model_file import warm_start
from tapedist.results.monitor import Monitor
from tapedist.results.outcome import TrainResult, digest
from tapedist.run_folder import RunFolder
from tapedist.run_optimum import RunOptimum, stopping_rules
from tapedist.signals import StopSignals
from tapedist.text_values import shown
from tapedist.training import engines, losses, optimizers
from tapedist.training.consensus import heed
from tapedist.training.engines import Engine, Setup
from tapedist.training.model import LinearModel, ModuleModel
from tapedist.training.moments import Moments
from tapedist.training.persistence import RunStore, from_arrays, identity, to_arrays
from tapedist.training.schedule import Schedule
from tapedist.training.state import TrainingState
from tapedist.training.trainer import Trainer


class Session:
    """One call of `train`: the parts, wired.

    Args:
        config: the run's settings.
        strategy: where replicas live.
        choice: why it is that one.
        team: all workers of the run.
        monitor: told about everything.
        folder: where state and results go, or None.
        stop: whether a signal asked to stop.
        model: see `train`.
        loss: see `train`.
        source: see `train`.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        strategy: tf.distribute.Strategy,
        choice: Choice,
        team: Team | Solo,
        monitor: Monitor,
        folder: RunFolder | None,
        stop: StopSignals,
        model: Callable[[], Any] | None,
        loss: losses.Loss | None,
        source: Source | None,
    ):
        self.config = config
        self.monitor = monitor
        self.folder = folder
        self.stop = stop
        self.strategy, self.choice, self.team = strategy, choice, team
        monitor.say(
            f"Strategy: {self.choice.name} on {self.strategy.num_replicas_in_sync} replica(s) ({self.choice.reason})"
        )
        self.source = source if source is not None else open_source(config)
        for notice in getattr(self.source, "notices", ()):
            monitor.say(f"Notice: {notice}")
        team.compare({**config.shared_fields(), "rows": self.source.fingerprint(), **numerics_class()})
        self.dtype = tf.as_dtype(config.dtype)
        self.rate = 0.0 if isinstance(config.learning_rate, str) else config.learning_rate
        self.units = self._choose_units(own_model=model is not None, own_loss=loss is not None)
        self.metrics_position: int | None = None  # Where a resumed run's rows end; None for a fresh run.
        self.start = ""  # The digest of the run that this one starts from.
        self.model, self.initial = self._build_model(model)
        self.setup = Setup(
            source=self.units.rows(self.source),
            programs={
                "strategy": self.strategy,
                "model": self.model,
                "loss": loss or losses.by_name(config.loss, huber_delta=config.huber_delta),
                "optimizer": optimizers.from_config(config, auto_rate=0.0),  # Settled before the first step.
                "num_shards": config.virtual_shards,
                "l2": config.l2,
                "dtype": self.dtype,
            },
            num_shards=config.virtual_shards,
            cache=config.cache,
            fit_intercept=config.fit_intercept,
            budget=team.smallest(engines.memory_budget()),
        )
        self.optimum = RunOptimum(
            config, self.source, is_linear=model is None, own_loss=loss is not None, units=self.units,
            say=monitor.say, heed=self._heed,
        )  # fmt: skip
        self.model_name = self.start + getattr(loss, "__name__", "") + self.model.name

    def _choose_units(self, *, own_model: bool, own_loss: bool) -> RawUnits | StandardUnits:
        """The units that the masters are in."""
        config = self.config
        if own_model and config.standardize == "true":
            raise InputError("--standardize=true: needs the linear model; scale the columns inside your own model")
        if not (own_model or own_loss or config.standardizes) and config.loss == "squared":
            check_squares(config, self.source)
        if own_model or not config.standardizes:
            return RawUnits()
        # The target may only be shifted where the loss is known to depend on the difference alone.
        return StandardUnits.of(
            self.source, fit_intercept=config.fit_intercept, center_target=not own_loss, heed=self._heed
        )

    def _heed(self) -> bool:
        """False; asked between the blocks of a pass over the rows.

        Raises:
            Interrupted: if a stop was asked for.
        """
        return heed(self.team, self.stop)

    def _build_model(self, build: Callable[[], Any] | None) -> tuple[Any, np.ndarray]:
        config = self.config
        if build is None:
            linear = LinearModel(self.source.num_features, fit_intercept=config.fit_intercept)
            linear.penalized = self.units.penalized(linear.penalized)
            if config.init_from:
                start, self.start = warm_start(
                    config.init_from, feature_names=self.source.feature_names, fit_intercept=config.fit_intercept
                )
                return linear, self.units.from_raw(start)
            return linear, linear.initial_parameters(init=config.init, seed=config.seed)
        with self.strategy.scope():
            module = ModuleModel(build(), num_features=self.source.num_features, dtype=self.dtype)
        return module, module.initial_parameters()

    def run(self) -> TrainResult:
        """Resumes, trains, and keeps what was found.

        Raises:
            TapedistError: see `train`.
        """
        try:
            result = self._run()
            self.team.leave()
        except tf.errors.OpError:
            # What a source raises inside tf.data arrives without its type.
            if failure := getattr(self.source, "failure", None):
                raise failure from None
            raise
        return result

    def _run(self) -> TrainResult:
        config, store = self.config, self._store()
        state, progress = from_arrays(self.team.from_chief(lambda: to_arrays(*self._resume(store))))
        self._settle_rate(progress)
        engine = choose_engine(
            config,
            self.setup,
            source=self.source,
            moments_obstacle=self._moments_obstacle(),
            say=self.monitor.say,
        )
        engine.restore(progress)
        if state.step > config.num_epochs * engine.steps_per_epoch:
            raise StateError(
                f"--num_epochs={config.num_epochs}: the run in {config.run_dir} has done "
                f"{state.step // engine.steps_per_epoch} already; ask for more, or give another --run_dir"
            )
        trainer = self._trainer(engine, store)
        losses = self._losses_if_done(state, engine)
        if losses is None:
            self._take_over()
        self._take_up_rows(done=losses is not None)
        if losses:
            done = f"has done its {config.num_epochs} epochs; more --num_epochs continue it"
            self.monitor.say(f"Finished: this run {f'stopped early: {state.stopped}' if state.stopped else done}")
            return self._told(self._result(state, engine, *losses))
        rows = {split: self.source.num_rows(split) for split in ("train", "test")}
        self.monitor.begin(
            epochs=config.num_epochs,
            first_epoch=state.step // engine.steps_per_epoch,
            train_rows=rows["train"],
            test_rows=rows["test"],
            steps_per_epoch=engine.steps_per_epoch,
        )
        try:
            with self.stop.noted():
                trainer.fit(state)
                if store:
                    # Saved before the closing rows, so that a run that grows later has the rows of one that was longer
                    # at once.
                    store.save(state, progress=engine.progress(), position=self.monitor.position())
                if state.stopped:
                    epochs = state.step // engine.steps_per_epoch
                    self.monitor.say(f"Stopped after {epochs} epochs: {state.stopped}")
                losses = trainer.close(state)
                self.monitor.end()
        except DivergedError as error:
            if state.step == 0 and np.isnan(state.first_loss) and isinstance(self.model, LinearModel):
                raise self._overflow() from None
            raise self._explained(error) from None
        result = self._result(state, engine, *losses)
        self._heed()  # Before the mark of success.
        return self._told(self._kept(result, state))

    def _store(self) -> RunStore | None:
        if not self.folder:
            return None
        return RunStore(
            self.folder.checkpoints,
            identity=identity(self.config, rows=self.source.fingerprint(), model=self.model_name),
            environment=numerics_class(),
            warn=lambda line: print(f"tapedist: warning: {line}", file=sys.stderr),
        )

    def _resume(self, store: RunStore | None) -> tuple[TrainingState, dict[str, np.ndarray]]:
        """The state to start from, and the engine's sums of a step under way."""
        optimizer = self.setup.programs["optimizer"]
        slots = np.zeros(optimizer.num_slots * self.model.num_parameters)
        fresh = TrainingState(vector=np.concatenate([self.initial, slots]))
        if not (store and self.folder):
            return fresh, {}
        if self.config.resume == "never":
            return fresh, {}  # The run that is there goes when nothing can keep this one from training any more.
        stored = store.load()
        if stored is None:
            if self.folder.done.exists():
                raise StateError(f"{self.folder.root}: its checkpoints are gone; --resume=never starts anew")
            if self.config.resume == "must":
                raise InputError(f"--resume=must: {self.folder.root} holds no checkpoint yet; use --resume=auto")
            return fresh, {}
        state, progress, position = stored
        self.metrics_position = position
        self.monitor.say(f"Resuming after {state.step} updates from {self.folder.root}")
        return state, progress

    def _take_up_rows(self, *, done: bool) -> None:
        """Forgets the rows of metrics that the state does not know; those of a finished run all count."""
        if self.folder and self.metrics_position is not None:
            end = self.folder.metrics.stat().st_size if done and self.folder.metrics.exists() else 0
            self.monitor.rewind(max(end, self.metrics_position))

    def _settle_rate(self, progress: dict[str, np.ndarray]) -> None:
        """Turns `--learning_rate=auto` into a number, by a pass over the rows where no pass is stored."""
        if self.config.learning_rate != "auto":
            return
        obstacle = self._moments_obstacle()
        if obstacle:
            raise InputError(f"--learning_rate=auto: is known only where moments are, and {obstacle}; give a number")
        if "moments" not in progress:
            known = engines.moments(self.setup)
            known.restore(progress)
            known.moments(self._heed)
            progress.update(known.progress())
            progress.pop("blocks", None)
            progress.pop("sums", None)
        self.rate = rates.auto_rate(Moments.from_vector(progress["moments"]), self.config)
        self.monitor.say(f"Learning rate: {self.rate:.6g} = 2 / (lambda_min + lambda_max) of these rows")
        optimizer = optimizers.from_config(self.config, auto_rate=self.rate)
        self.setup = dataclasses.replace(self.setup, programs={**self.setup.programs, "optimizer": optimizer})

    def _overflow(self) -> InputError:
        """Why a linear model's first loss is not finite: no step was taken, so it is the rows."""
        config = self.config
        fixes = [] if config.standardizes else ["--standardize"]
        fixes += ["--dtype=float64"] if config.dtype == "float32" else []
        return InputError(
            f"--data={shown(config.data)}: the loss overflows {config.dtype} before the first update; "
            f"use {' or '.join([*fixes, 'smaller units'])}"
        )

    def _explained(self, error: DivergedError) -> DivergedError:
        """`error` with the bound that the learning rate broke, where the loss has one."""
        linear = isinstance(self.model, LinearModel) and self.setup.programs["loss"] is losses.squared
        if not linear or self.source.num_rows("train") == 0:
            return error
        moments = None if self._moments_obstacle() else engines.moments(self.setup).moments(self._heed)
        return rates.explained(error, self.config, moments=moments, source=self.setup.source, rate=self.rate)

    def _moments_obstacle(self) -> str:
        return engines.moments_obstacle(
            self.config,
            num_features=self.source.num_features,
            is_linear=isinstance(self.model, LinearModel),
            own_loss=self.setup.programs["loss"] is not losses.squared,
        )

    def _trainer(self, engine: Engine, store: RunStore | None) -> Trainer:
        config = self.config

        def save(state: TrainingState, progress: Mapping[str, np.ndarray]) -> None:
            if store:
                store.save(state, progress=progress, position=self.monitor.position())

        evaluate = test_evaluator(config, self.setup, heed=self._heed)
        stopping = stopping_rules(config, self.setup, engine, self.optimum, evaluate=evaluate, heed=self._heed)
        return Trainer(
            engine=engine,
            schedule=Schedule(
                num_epochs=config.num_epochs,
                steps_per_epoch=engine.steps_per_epoch,
                log_every_epochs=config.log_every_epochs,
                eval_every_epochs=config.eval_every_epochs,
                checkpoint_every_steps=config.checkpoint_every_steps,
                check_every_epochs=stopping.every_epochs,
            ),
            observer=self.monitor,
            evaluate=evaluate,
            stopping=stopping,
            consensus=self.team,
            save=save,
            save_every_secs=config.checkpoint_every_secs,
            call_length=choose_call_length(
                config, self.setup, engine, num_parameters=self.model.num_parameters, say=self.monitor.say
            ),
            train_rows=self.source.num_rows("train"),
            stop=self.stop,
        )

    def _losses_if_done(self, state: TrainingState, engine: Engine) -> tuple[float | None, float | None] | None:
        """`(train loss, test loss)` if the folder holds this run, finished."""

        def look() -> dict[str, np.ndarray]:
            if not (self.folder and self.folder.done.exists()) or self.config.resume == "never":
                return {}
            summary = run_files.done_summary(self.folder.done)
            parameters = self.units.to_raw(state.vector[: self.model.num_parameters])
            is_ours = summary.get("digest") == digest(parameters)  # Else the mark is older than the checkpoint.
            if is_ours and (summary["stopped"] or state.step == self.config.num_epochs * engine.steps_per_epoch):
                return {"summary": np.array(json.dumps(summary))}
            return {}

        found = self.team.from_chief(look)
        if not found:
            return None
        summary = json.loads(str(found["summary"]))
        state.stopped = summary["stopped"]
        return summary["train_loss"], summary["test_loss"]

    def _take_over(self) -> None:
        """Makes the folder that of this run under way. From here on only training can fail."""

        def take_over() -> dict[str, np.ndarray]:
            if self.folder:
                with self.stop.noted():
                    if self.config.resume == "never":
                        self.folder.forget_run()
                    self.folder.done.unlink(missing_ok=True)  # There is more to do.
                    run_files.begin(self.folder, config=self.config, environment=self._environment())
            return {}

        self.team.from_chief(take_over)

    def _environment(self) -> dict[str, Any]:
        devices = engines.local_devices(self.strategy)
        return environment(self.strategy, choice=self.choice.name, devices=devices)

    def _result(
        self, state: TrainingState, engine: Engine, train_loss: float | None, test_loss: float | None
    ) -> TrainResult:
        parameters = self.units.to_raw(state.vector[: self.model.num_parameters])
        linear = isinstance(self.model, LinearModel)
        d = self.source.num_features
        if not linear:
            self.model.assign(parameters)
        return TrainResult(
            parameters=parameters,
            weights=parameters[:d] if linear else np.zeros(0),
            bias=float(parameters[d]) if linear and self.config.fit_intercept else 0.0,
            history=tuple(self.monitor.rows),
            train_loss=train_loss,
            test_loss=test_loss,
            epochs=state.step // engine.steps_per_epoch,
            steps=state.step,
            digest=digest(parameters),
            truth=getattr(self.source, "truth", None),
            feature_names=self.source.feature_names,
            target_name=self.source.target_name,
            fit_intercept=self.config.fit_intercept,
            loss=self.setup.programs["loss"].__name__,
            statistics=self.optimum.statistics(parameters, engine) if linear else None,
            stopped=state.stopped,
            run_dir=self.folder.root if self.folder else None,
            model=None if linear else self.model.module,
        )

    def _kept(self, result: TrainResult, state: TrainingState) -> TrainResult:
        if self.folder:
            run_files.keep(
                self.folder,
                result,
                config=self.config,
                source=self.source,
                environment=self._environment(),
                path=[(epoch, self.units.to_raw(parameters)) for epoch, parameters in state.path],
            )
        return result

    def _told(self, result: TrainResult) -> TrainResult:
        for line in result.lines():
            self.monitor.say(line)
        return result
