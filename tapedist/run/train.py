"""One run: from its settings to its result, in the order in which things happen.

`train` looks at the program around and opens the run folder, `train_in` joins the cluster, `fit` is the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist import process
from tapedist.cluster import resolve
from tapedist.cluster.environment import environment, numerics_class
from tapedist.cluster.join import joined
from tapedist.cluster.strategies import Choice
from tapedist.cluster.team import SingleProcessTeam, Team
from tapedist.config import TrainConfig
from tapedist.data.catalog import check_sizes, open_source
from tapedist.data.ranges import Bounds, ranges
from tapedist.data.source import Source, as_source, interruptible
from tapedist.data.synthetic import SyntheticSource
from tapedist.errors import DivergedError, FitWarning, InputError, Interrupted, StateError
from tapedist.process import StopSignals
from tapedist.results.monitor import Monitor
from tapedist.results.result import TrainResult, advice
from tapedist.run import learning_rate, surroundings
from tapedist.run.engine_choice import choose_call_length, choose_engine, test_evaluator
from tapedist.run.objective import Objective
from tapedist.run.optimum import RunOptimum, stopping_rules
from tapedist.run.saved_run import Losses, SavedRun
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

__all__ = ["TrainResult", "train"]


def train(
    config: TrainConfig,
    *,
    model: Callable[[], Any] | None = None,
    loss: losses.Loss | None = None,
    source: Source | None = None,
    quiet: bool = True,
) -> TrainResult:
    """Fits a model as `config` says.

    Args:
        config: the run's settings.
        model: builds a `tf.Module` that maps `[k, d]` to `[k]`; called once, under the strategy's scope. By default the
            linear model.
        loss: per-example loss `(y_hat [k], y [k]) -> [k]`; by default the one that `config.loss` names.
        source: the rows; by default the ones that `config.data` names.
        quiet: whether to print nothing; notices are then `UserWarning`s.

    Returns:
        What was found.

    Raises:
        InputError: if the config does not fit the devices or the rows, or the program around is not fit for it (a fork
            of one that has used TensorFlow, a strategy's scope, a graph, functions that run eagerly); nothing was
            touched.
        StateError: if the run folder's state cannot be trusted or belongs to another run.
        DivergedError: if the loss or the parameters left the finite numbers; the last checkpoint stays.
        StorageError: if the run folder cannot be written.
        PeerLostError: if another worker of the cluster was lost, hangs or never came.
        Interrupted: if SIGINT or SIGTERM came, or SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU where nobody handles or ignores
            it; the state is saved. Handlers are installed only in the main thread, and restored.
        MemoryError: if the rows do not fit.
    """
    surroundings.check()
    _check_arguments(config, model=model, source=source)
    spec = resolve.of_run(config, os.environ)
    # The chief alone reads, writes and speaks.
    folder = RunFolder.open(config.run_dir) if config.run_dir and spec.is_chief else None
    try:
        with folder or contextlib.nullcontext():
            rows = None if source is None else as_source(source)
            return train_in(folder, config, spec=spec, model=model, loss=loss, source=rows, quiet=quiet)
    finally:
        process.release_memory()


def _check_arguments(config: Any, *, model: Any, source: Any) -> None:
    """Says what a caller mixed up, before any of it is used."""
    if not isinstance(config, TrainConfig):
        raise InputError(f"config: is of type {type(config).__name__}; give a TrainConfig(...)")
    if model is not None and not _builds(model):
        raise InputError(
            f"model: is a {type(model).__name__}, where a function that builds one is needed, because its variables "
            "must be made under the strategy; give the class, or lambda: ..."
        )
    if source is not None and not hasattr(source, "num_rows"):
        raise InputError(
            f"source: is of type {type(source).__name__}, which has no rows to take; give arrays as ArraySource(x, y)"
        )


def _builds(model: Any) -> bool:
    """Whether `model` may be called for a module, rather than being one: of TensorFlow, of Keras, or any callable."""
    if isinstance(model, type) or inspect.isroutine(model):
        return True
    if not callable(model) or hasattr(model, "trainable_variables"):
        return False
    try:
        inspect.signature(model).bind()
    except TypeError:
        return False
    except ValueError:  # Some callables do not say what they take.
        return True
    return True


def train_in(
    folder: RunFolder | None,
    config: TrainConfig,
    *,
    spec: resolve.ClusterSpec,
    model: Callable[[], Any] | None = None,
    loss: losses.Loss | None = None,
    source: Source | None = None,
    quiet: bool = True,
) -> TrainResult:
    """`train` in a folder that is open already, and under a cluster that is known; see there."""
    with contextlib.ExitStack() as stack:
        # Several processes leave together: the others must hear of a signal first.
        stop = stack.enter_context(StopSignals(always_noted=spec.num_workers > 1))
        monitor = Monitor.of_run(
            folder,
            log_every_epochs=config.log_every_epochs,
            quiet=quiet or not spec.is_chief,
            warns=quiet and spec.is_chief,
        )
        stack.callback(monitor.close)
        strategy, choice, team = stack.enter_context(joined(config, spec, stop_signal=lambda: stop.signum, quiet=quiet))
        stack.enter_context(surroundings.left_aside())  # It starts TensorFlow, whose devices are chosen by now.
        place = Place(strategy=strategy, choice=choice, team=team, monitor=monitor, folder=folder, stop=stop)
        try:
            return fit(config, place, model=model, loss=loss, source=source)
        except (DivergedError, Interrupted):  # All workers agree on these.
            team.leave()
            raise
        except tf.errors.OpError as error:
            if lost := team.lost(error):
                raise lost from error
            if isinstance(error, tf.errors.ResourceExhaustedError):
                raise MemoryError(error.message) from error
            raise


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where a run happens.

    Attributes:
        strategy: where replicas live.
        choice: why it is that one.
        team: all workers of the run.
        monitor: told about everything.
        folder: where state and results go, or None.
        stop: whether a signal asked to stop.
    """

    strategy: tf.distribute.Strategy
    choice: Choice
    team: Team | SingleProcessTeam
    monitor: Monitor
    folder: RunFolder | None
    stop: StopSignals

    def check_stop(self) -> bool:
        """False; asked between the blocks of a pass over the rows.

        Raises:
            Interrupted: if a stop was asked for, on all workers alike.
        """
        return check_stop(self.team, self.stop)


def fit(
    config: TrainConfig,
    place: Place,
    *,
    model: Callable[[], Any] | None = None,
    loss: losses.Loss | None = None,
    source: Source | None = None,
) -> TrainResult:
    """Fits a model in a place; all workers call it alike. See `train` for the other arguments and what is raised."""
    config = config.resolved(
        custom_rows=is_custom_rows(config, source), custom_model=model is not None, custom_loss=loss is not None
    ).with_arithmetic(place.choice.name)
    rows = _open_rows(config, place, source)
    with _errors_of(rows), interruptible(place.check_stop):
        objective = _objective(config, place, rows, model=model, loss=loss)
        config = _with_an_end(config, objective, place.monitor)
        result = _fit(config, place, objective, custom_source=source is not None)
    for sentence in result.advice:
        place.monitor.notice(sentence, FitWarning)
    for line in result.lines(place.monitor.width):
        place.monitor.log(line)
    place.team.leave()
    return result


def _fit(config: TrainConfig, place: Place, objective: Objective, *, custom_source: bool) -> TrainResult:
    """From what is fitted to what was found: learning rate, engine, resume, training, results."""
    log = place.monitor.log
    setup = _setup(config, place, objective)
    optimum = RunOptimum(config, objective, log=log)
    saved = _saved_run(config, place, objective, custom_source=custom_source)
    state, progress = saved.resume(_fresh_state(objective, setup))
    rate, setup = learning_rate.settle(config, objective, setup, progress, log=log)
    why_not_moments = objective.why_not_moments(config)
    engine = choose_engine(config, setup, source=objective.source, why_not_moments=why_not_moments, log=log)
    engine.restore(progress)
    _check_epochs(config, state, engine)
    trainer = _trainer(config, place, objective, setup, engine, optimum, saved)
    result = functools.partial(_result, config, place, objective, engine, optimum, state)
    losses = saved.finished(state, num_steps=config.most_epochs * engine.steps_per_epoch)
    if losses is not None:
        saved.rewind_metrics(finished=True)
        done = f"has done its {config.most_epochs} epochs; more --num_epochs continue it"
        log(f"Finished: this run {f'stopped early: {state.stopped}' if state.stopped else done}")
        return result(losses)
    saved.claim()
    saved.rewind_metrics(finished=False)
    _begin(config, place, objective, engine, state)
    try:
        with place.stop.deferred():
            trainer.fit(state)
            # Saved before the closing rows, so that a run that grows later has those of one that was longer at once.
            saved.save(state, engine.progress())
            if state.stopped:
                log(f"Stopped after {state.step // engine.steps_per_epoch} epochs: {state.stopped}")
            losses = trainer.close(state)
            place.monitor.end()
    except DivergedError as error:
        raise learning_rate.divergence_advice(error, config, objective, setup, state, rate=rate) from None
    finished = result(losses)
    place.check_stop()  # Before the mark of success.
    saved.finish(finished, state)
    return finished


def is_custom_rows(config: TrainConfig, source: Source | None) -> bool:
    """Whether the rows are the user's: a table, arrays or a source of their own."""
    return config.from_table or not (source is None or isinstance(source, SyntheticSource))


def _open_rows(config: TrainConfig, place: Place, source: Source | None) -> Source:
    """The rows that `config` names, or the caller's; says what the user should see first."""
    monitor, strategy = place.monitor, place.strategy
    monitor.log(f"Strategy: {place.choice.name} on {strategy.num_replicas_in_sync} replica(s) ({place.choice.reason})")
    if config.arithmetic == "fast":
        monitor.log("Arithmetic: fast; whatever sums are the fastest here: elsewhere the last digits may differ")
    idle = config.without_effect() if source is None else config.without_effect_beside(source)
    if source is None:
        source = place.team.run_with_stop_agreement(place.stop, lambda check: _opened(config, check))
    for notice in (*idle, *source.notices):
        monitor.notice(notice)
    return source


def _opened(config: TrainConfig, check: Callable[[], object]) -> Source:
    """The rows that `config` names; of several workers each opens them on a thread of its own."""
    with interruptible(lambda: bool(check())):
        return open_source(config)


@contextlib.contextmanager
def _errors_of(source: Source) -> Iterator[None]:
    """What a source raises inside tf.data arrives without its type, and gets it back here."""
    try:
        yield
    except tf.errors.OpError:
        if failure := source.failure:
            raise failure from None
        raise


def _objective(
    config: TrainConfig,
    place: Place,
    source: Source,
    *,
    model: Callable[[], Any] | None,
    loss: losses.Loss | None,
) -> Objective:
    """What is fitted, once all workers have the same rows and settings."""
    where = numerics_class()
    if config.arithmetic == "exact" and model is None and loss is None:
        # Sums are the same in any version, on any processor, by any flags: the known-answer test sees to it.
        where = {"device_kinds": where["device_kinds"]}
    place.team.compare({**config.shared_fields(), "rows": source.fingerprint(), **where})
    return Objective.of(
        config, source,
        strategy=place.strategy, model=model, loss=loss, surveyed=is_custom_rows(config, source),
    )  # fmt: skip


def _with_an_end(config: TrainConfig, objective: Objective, monitor: Monitor) -> TrainConfig:
    """`config`, with a rate and a number of epochs where the rows are too wide to say what auto stands for.

    Names the features that are left out too, where no table of coefficients will.
    """
    source, survey = objective.source, objective.survey
    if not survey and objective.is_linear and is_custom_rows(config, source):
        monitor.notice(
            f"{source.num_features} features are too many to look for linear combinations among them, "
            "and for standard errors; training ends by --num_epochs",
            FitWarning,
        )
        config = config.without_survey()
    reasons: list[str] = []
    if not survey:
        names = (source.feature_names[feature] for feature in objective.units.left_out)
        reasons = [f"{display(name)} does not vary" for name in names]
    elif not objective.is_squared or config.statistics == "false":
        reasons = list(survey.fit.left_out())
    if reasons:
        monitor.notice(f"left out, with weight 0: {'; '.join(reasons)}", FitWarning)
    return config


def _saved_run(config: TrainConfig, place: Place, objective: Objective, *, custom_source: bool) -> SavedRun:
    devices = local_devices(place.strategy)
    return SavedRun(
        place.folder,
        config,
        objective=objective,
        team=place.team,
        monitor=place.monitor,
        stop=place.stop,
        environment=environment(
            place.strategy, choice=place.choice.name, devices=devices, arithmetic=config.arithmetic
        ),
        # Bits that depend on no version and no device need no warning.
        numerics={} if objective.has_one_answer(config) else numerics_class(),
        custom_source=custom_source,
    )


def _setup(config: TrainConfig, place: Place, objective: Objective) -> Setup:
    """What engines need; `--learning_rate=auto` is settled before the first step."""
    source, strategy = objective.units.rows(objective.source), place.strategy

    @functools.cache
    def bounds(split: str) -> Bounds:
        found = ranges(source, split, log=place.monitor.log)
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
        budget=place.team.smallest(memory_budget()),
    )


def _fresh_state(objective: Objective, setup: Setup) -> TrainingState:
    slots = setup.problem.optimizer.fresh_slots(objective.model.num_parameters)
    return TrainingState(vector=np.concatenate([objective.initial, slots]))


def _check_epochs(config: TrainConfig, state: TrainingState, engine: Engine) -> None:
    if state.step > config.most_epochs * engine.steps_per_epoch:
        raise StateError(
            f"--num_epochs={config.most_epochs}: the run in {config.run_dir} has done "
            f"{state.step // engine.steps_per_epoch} already; ask for more, or give another --run_dir"
        )


def _trainer(
    config: TrainConfig,
    place: Place,
    objective: Objective,
    setup: Setup,
    engine: Engine,
    optimum: RunOptimum,
    saved: SavedRun,
) -> Trainer:
    evaluate = test_evaluator(config, setup)
    stopping = stopping_rules(
        config,
        engine,
        optimum,
        gradient=lambda passes: full_gradient(setup, engine, passes=passes),
        evaluate=evaluate,
    )
    call_length = choose_call_length(
        config, setup, engine, num_parameters=objective.model.num_parameters, log=place.monitor.log
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
        observer=place.monitor,
        evaluate=evaluate,
        stopping=stopping,
        consensus=place.team,
        save=saved.save,
        save_every_secs=config.checkpoint_every_secs,
        call_length=call_length,
        train_rows=objective.source.num_rows("train"),
        stop=place.stop,
    )


def _begin(config: TrainConfig, place: Place, objective: Objective, engine: Engine, state: TrainingState) -> None:
    """Tells the monitor how far the run is and goes."""
    place.monitor.begin(
        epochs=config.most_epochs,
        first_epoch=state.step // engine.steps_per_epoch,
        train_rows=objective.source.num_rows("train"),
        test_rows=objective.source.num_rows("test"),
        steps_per_epoch=engine.steps_per_epoch,
    )


def _result(
    config: TrainConfig,
    place: Place,
    objective: Objective,
    engine: Engine,
    optimum: RunOptimum,
    state: TrainingState,
    found: Losses,
) -> TrainResult:
    """What is returned and kept of a state, given its `(train loss, test loss)`."""
    source, linear, d = objective.source, objective.is_linear, objective.source.num_features
    parameters = objective.parameters(state.vector)
    if not linear:
        objective.model.assign(parameters)
    center, bias_at_center = objective.units.at_center(state.vector[: len(parameters)]) if linear else (None, None)
    result = TrainResult(
        parameters=parameters,
        weights=parameters[:d] if linear else np.zeros(0),
        bias=float(parameters[d]) if linear and config.fit_intercept else 0.0,
        history=tuple(place.monitor.rows),
        train_loss=found[0],
        test_loss=found[1],
        epochs=state.step // engine.steps_per_epoch,
        steps=state.step,
        digest=digest(parameters),
        truth=source.truth,
        feature_names=source.feature_names,
        target_name=source.target_name,
        fit_intercept=config.fit_intercept,
        loss=objective.loss_name,
        statistics=optimum.statistics(parameters, engine, center, bias_at_center) if linear else None,
        stopped=state.stopped,
        run_dir=place.folder.root if place.folder else None,
        model=None if linear else objective.model.module,
        center=center,
        bias_at_center=bias_at_center,
    )
    sentences = advice(config, result, of_user=is_custom_rows(config, source), gap=optimum.gap(state))
    return dataclasses.replace(result, advice=tuple(sentences))


def find_devices() -> None:
    """Makes TensorFlow look for devices, which some of its libraries comment on.

    Raises:
        InputError: in a fork of a process that has used TensorFlow.
    """
    process.check_fork()
    tf.config.list_physical_devices()
