"""One call of `train`, wired: objective, engine and trainer from a config, and what becomes of their work."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.cluster.environment import environment, numerics_class
from tapedist.cluster.strategies import Choice
from tapedist.cluster.team import SingleProcessTeam, Team
from tapedist.config import TrainConfig
from tapedist.data.catalog import check_sizes, open_source
from tapedist.data.ranges import Bounds, ranges
from tapedist.data.source import Source
from tapedist.data.synthetic import SyntheticSource
from tapedist.errors import DivergedError, FitWarning, StateError
from tapedist.process import StopSignals
from tapedist.results.monitor import Monitor
from tapedist.results.result import TrainResult, advice
from tapedist.run import learning_rate
from tapedist.run.engine_choice import choose_call_length, choose_engine, test_evaluator
from tapedist.run.objective import Objective
from tapedist.run.optimum import RunOptimum, stopping_rules
from tapedist.run.saved_run import SavedRun
from tapedist.storage.run_folder import RunFolder
from tapedist.text import display
from tapedist.training import losses, optimizers
from tapedist.training.engine_setup import Setup, memory_budget
from tapedist.training.engines import Engine, full_gradient
from tapedist.training.interfaces import check_stop
from tapedist.training.replicas import local_devices
from tapedist.training.schedule import Schedule
from tapedist.training.state import TrainingState, digest
from tapedist.training.steps import Problem
from tapedist.training.trainer import Trainer


def is_custom_rows(config: TrainConfig, source: Source | None) -> bool:
    """Whether the rows are the user's: a table, arrays or a source of their own."""
    return config.from_table or not (source is None or isinstance(source, SyntheticSource))


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
        team: Team | SingleProcessTeam,
        monitor: Monitor,
        folder: RunFolder | None,
        stop: StopSignals,
        model: Callable[[], Any] | None,
        loss: losses.Loss | None,
        source: Source | None,
    ):
        config = config.resolved(
            custom_rows=is_custom_rows(config, source), custom_model=model is not None, custom_loss=loss is not None
        ).with_arithmetic(choice.name)
        self._config, self._team, self._monitor, self._stop, self._folder = config, team, monitor, stop, folder
        monitor.log(f"Strategy: {choice.name} on {strategy.num_replicas_in_sync} replica(s) ({choice.reason})")
        if config.arithmetic == "fast":
            monitor.log("Arithmetic: fast; whatever sums are the fastest here: elsewhere the last digits may differ")
        self._source = (
            team.run_with_stop_agreement(stop, lambda check_stop: open_source(config, check_stop=check_stop))
            if source is None
            else source
        )
        idle = config.without_effect() if source is None else config.without_effect_beside(source)
        for notice in (*idle, *self._source.notices):
            monitor.notice(notice)
        where = numerics_class()
        if config.arithmetic == "exact" and model is None and loss is None:
            # Sums are the same in any version, on any processor, by any flags: the known-answer test sees to it.
            where = {"device_kinds": where["device_kinds"]}
        team.compare({**config.shared_fields(), "rows": self._source.fingerprint(), **where})
        self._objective = Objective.of(
            config,
            self._source,
            strategy=strategy,
            model=model,
            loss=loss,
            surveyed=is_custom_rows(config, self._source),
            check_stop=self._check_stop,
        )
        self._config = config = self._with_an_end(config)
        self._say_left_out()
        self._setup = _setup(
            config, self._objective, strategy,
            budget=team.smallest(memory_budget()), check_stop=self._check_stop, log=monitor.log,
        )  # fmt: skip
        self._optimum = RunOptimum(config, self._objective, log=monitor.log, check_stop=self._check_stop)
        self._kept = SavedRun(
            folder, config, objective=self._objective, team=team, monitor=monitor, stop=stop,
            environment=environment(
                strategy, choice=choice.name, devices=local_devices(strategy), arithmetic=config.arithmetic
            ),
            custom_source=source is not None,
        )  # fmt: skip

    def _with_an_end(self, config: TrainConfig) -> TrainConfig:
        """`config`, with a rate and a number of epochs where the rows are too wide to say what auto stands for."""
        if self._objective.survey or not self._objective.is_linear or not is_custom_rows(config, self._source):
            return config
        self._monitor.notice(
            f"{self._source.num_features} features are too many to look for linear combinations among them, "
            "and for standard errors; training ends by --num_epochs",
            FitWarning,
        )
        return config.without_survey()

    def _say_left_out(self) -> None:
        """Names the features that are left out, where no table of coefficients will."""
        objective, config = self._objective, self._config
        has_table = objective.is_squared and config.statistics != "false"
        if objective.survey and not has_table:
            reasons = objective.survey.fit.left_out()
        elif not objective.survey:
            names = (self._source.feature_names[feature] for feature in objective.units.left_out)
            reasons = [f"{display(name)} does not vary" for name in names]
        else:
            return
        if reasons:
            self._monitor.notice(f"left out, with weight 0: {'; '.join(reasons)}", FitWarning)

    def _check_stop(self) -> bool:
        """False; asked between the blocks of a pass over the rows.

        Raises:
            Interrupted: if a stop was asked for.
        """
        return check_stop(self._team, self._stop)

    def run(self) -> TrainResult:
        """Resumes, trains, and keeps what was found.

        Raises:
            TapedistError: see `train`.
        """
        try:
            result = self._run()
            for sentence in result.advice:
                self._monitor.notice(sentence, FitWarning)
            for line in result.lines(self._monitor.width):
                self._monitor.log(line)
            self._team.leave()
        except tf.errors.OpError:
            # What a source raises inside tf.data arrives without its type.
            if failure := self._source.failure:
                raise failure from None
            raise
        return result

    def _run(self) -> TrainResult:
        config = self._config
        state, progress = self._kept.resume(self._fresh())
        rate, self._setup = learning_rate.settle(
            config, self._objective, self._setup, progress, check_stop=self._check_stop, log=self._monitor.log
        )
        engine = choose_engine(
            config,
            self._setup,
            source=self._source,
            why_not_moments=self._objective.why_not_moments(config),
            log=self._monitor.log,
        )
        engine.restore(progress)
        self._check_epochs(state, engine)
        trainer = self._trainer(engine)
        losses = self._kept.finished(state, num_steps=config.most_epochs * engine.steps_per_epoch)
        if losses is None:
            self._kept.claim()
        self._kept.rewind_metrics(finished=losses is not None)
        if losses is not None:
            done = f"has done its {config.most_epochs} epochs; more --num_epochs continue it"
            self._monitor.log(f"Finished: this run {f'stopped early: {state.stopped}' if state.stopped else done}")
            return self._result(state, engine, *losses)
        try:
            losses = self._fit(trainer, state, engine)
        except DivergedError as error:
            raise learning_rate.divergence_advice(
                error, config, self._objective, self._setup, state, rate=rate, check_stop=self._check_stop
            ) from None
        result = self._result(state, engine, *losses)
        self._check_stop()  # Before the mark of success.
        self._kept.finish(result, state)
        return result

    def _fresh(self) -> TrainingState:
        slots = self._setup.problem.optimizer.fresh_slots(self._objective.model.num_parameters)
        return TrainingState(vector=np.concatenate([self._objective.initial, slots]))

    def _check_epochs(self, state: TrainingState, engine: Engine) -> None:
        done = state.step // engine.steps_per_epoch
        if state.step > self._config.most_epochs * engine.steps_per_epoch:
            raise StateError(
                f"--num_epochs={self._config.most_epochs}: the run in {self._config.run_dir} has done {done} already; "
                "ask for more, or give another --run_dir"
            )

    def _trainer(self, engine: Engine) -> Trainer:
        config, setup = self._config, self._setup
        evaluate = test_evaluator(config, setup, check_stop=self._check_stop)
        stopping = stopping_rules(
            config,
            engine,
            self._optimum,
            gradient=lambda passes: full_gradient(setup, engine, passes=passes, check_stop=self._check_stop),
            evaluate=evaluate,
        )
        return Trainer(
            engine=engine,
            schedule=Schedule(
                num_epochs=config.most_epochs,
                steps_per_epoch=engine.steps_per_epoch,
                log_every_epochs=config.log_every_epochs,
                eval_every_epochs=config.eval_every_epochs,
                checkpoint_every_steps=config.checkpoint_every_steps,
                check_every_epochs=stopping.every_epochs,
                slowing=config.num_epochs == "auto" and config.mode == "full_batch",
            ),
            observer=self._monitor,
            evaluate=evaluate,
            stopping=stopping,
            consensus=self._team,
            save=self._kept.save,
            save_every_secs=config.checkpoint_every_secs,
            call_length=choose_call_length(
                config, setup, engine, num_parameters=self._objective.model.num_parameters, log=self._monitor.log
            ),
            train_rows=self._source.num_rows("train"),
            stop=self._stop,
        )

    def _fit(self, trainer: Trainer, state: TrainingState, engine: Engine) -> tuple[float | None, float | None]:
        """Trains from `state` to the end, and measures there: `(train loss, test loss)`."""
        self._monitor.begin(
            epochs=self._config.most_epochs,
            first_epoch=state.step // engine.steps_per_epoch,
            train_rows=self._source.num_rows("train"),
            test_rows=self._source.num_rows("test"),
            steps_per_epoch=engine.steps_per_epoch,
        )
        with self._stop.deferred():
            trainer.fit(state)
            # Saved before the closing rows, so that a run that grows later has the rows of one that was longer at once.
            self._kept.save(state, engine.progress())
            if state.stopped:
                epochs = state.step // engine.steps_per_epoch
                self._monitor.log(f"Stopped after {epochs} epochs: {state.stopped}")
            losses = trainer.close(state)
            self._monitor.end()
            return losses

    def _result(
        self, state: TrainingState, engine: Engine, train_loss: float | None, test_loss: float | None
    ) -> TrainResult:
        objective, source = self._objective, self._source
        parameters, linear, d = objective.parameters(state.vector), objective.is_linear, source.num_features
        if not linear:
            objective.model.assign(parameters)
        center, bias_at_center = objective.units.at_center(state.vector[: len(parameters)]) if linear else (None, None)
        result = TrainResult(
            parameters=parameters,
            weights=parameters[:d] if linear else np.zeros(0),
            bias=float(parameters[d]) if linear and self._config.fit_intercept else 0.0,
            history=tuple(self._monitor.rows),
            train_loss=train_loss,
            test_loss=test_loss,
            epochs=state.step // engine.steps_per_epoch,
            steps=state.step,
            digest=digest(parameters),
            truth=source.truth,
            feature_names=source.feature_names,
            target_name=source.target_name,
            fit_intercept=self._config.fit_intercept,
            loss=objective.loss_name,
            statistics=self._optimum.statistics(parameters, engine, center, bias_at_center) if linear else None,
            stopped=state.stopped,
            run_dir=self._folder.root if self._folder else None,
            model=None if linear else objective.model.module,
            center=center,
            bias_at_center=bias_at_center,
        )
        sentences = advice(
            self._config, result, of_user=is_custom_rows(self._config, source), gap=self._optimum.gap(state)
        )
        return dataclasses.replace(result, advice=tuple(sentences))


def _setup(
    config: TrainConfig,
    objective: Objective,
    strategy: tf.distribute.Strategy,
    *,
    budget: int,
    check_stop: Callable[[], object],
    log: Callable[[str], None],
) -> Setup:
    """What engines need; `--learning_rate=auto` is settled before the first step."""
    source = objective.units.rows(objective.source)

    @functools.cache
    def bounds(split: str) -> Bounds:
        found = ranges(source, split, check_stop=check_stop, log=log)
        if objective.is_linear:
            largest = np.maximum(np.abs(found.low), np.abs(found.high))
            check_sizes(config, source, largest, squared=objective.is_squared)
        return Bounds.of(found, dtype=config.dtype)

    return Setup(
        source=source,
        strategy=strategy,
        problem=Problem(
            model=objective.model,
            loss=objective.loss,
            optimizer=optimizers.from_config(config, auto_rate=0.0),
            dtype=tf.as_dtype(config.dtype),
            l2=config.l2,
            arithmetic="plain" if isinstance(strategy, tf.distribute.TPUStrategy) else config.arithmetic,
        ),
        bounds=bounds,
        cache=config.cache,
        budget=budget,
    )
