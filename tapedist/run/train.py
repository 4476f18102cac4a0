"""The composition root: a config becomes a strategy, a source, an engine and a trainer, and their outcome is kept."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tapedist import process
from tapedist.cluster import resolve
from tapedist.cluster.join import joined
from tapedist.config import TrainConfig
from tapedist.data.source import Source, as_source
from tapedist.errors import DivergedError, InputError, Interrupted
from tapedist.process import StopSignals
from tapedist.results.monitor import Monitor
from tapedist.results.result import TrainResult
from tapedist.run import surroundings
from tapedist.run.session import Session
from tapedist.storage.run_folder import RunFolder
from tapedist.training import losses

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
            folder.root if folder else None,
            log_every_epochs=config.log_every_epochs,
            quiet=quiet or not spec.is_chief,
            warns=quiet and spec.is_chief,
        )
        stack.callback(monitor.close)
        strategy, choice, team = stack.enter_context(joined(config, spec, stop_signal=lambda: stop.signum, quiet=quiet))
        stack.enter_context(surroundings.left_aside())  # It starts TensorFlow, whose devices are chosen by now.
        try:
            session = Session(
                config, strategy=strategy, choice=choice, team=team, monitor=monitor, folder=folder, stop=stop,
                model=model, loss=loss, source=source,
            )  # fmt: skip
            return session.run()
        except (DivergedError, Interrupted):  # All workers agree on these.
            team.leave()
            raise
        except tf.errors.OpError as error:
            if lost := team.lost(error):
                raise lost from error
            if isinstance(error, tf.errors.ResourceExhaustedError):
                raise MemoryError(error.message) from error
            raise


def find_devices() -> None:
    """Makes TensorFlow look for devices, which some of its libraries comment on.

    Raises:
        InputError: in a fork of a process that has used TensorFlow.
    """
    process.check_fork()
    tf.config.list_physical_devices()
