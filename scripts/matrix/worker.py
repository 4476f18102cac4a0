"""One process of the matrix: trains many configs, or recomputes what was trained, and prints a line for each.

    python scripts/matrix/worker.py train ORDER.json [--flag=value ...]

The order is a JSON object:

    configs     name -> words of `tapedist train`
    constants   `module:NAME` -> value: sizes that are changed by hand
    intra_op    TensorFlow's threads within an operation; 0 for its default
    stop_after  a run is asked to stop when this is asked for so often; 0 for never
    verify      whether the runs are recomputed by the reference instead

Lines are `NAME<tab>DIGEST`, `NAME<tab>stopped`, `NAME<tab>equal` or `NAME<tab>WORDS OF THE ERROR`. Flags behind the
order, as the launcher adds them, are those of a worker of a cluster.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from tapedist.command_options import VerifyOptions
from tapedist.config import TrainConfig
from tapedist.errors import Interrupted, TapedistError
from tapedist.flags import CommandLine


def main(argv: list[str]) -> None:
    order = json.loads(Path(argv[2]).read_text())
    configs = {
        name: CommandLine(TrainConfig, [*words, *argv[3:]]).options() for name, words in order["configs"].items()
    }
    if order.get("verify"):
        lines = ((name, _verified(config)) for name, config in configs.items())
    else:
        lines = _trained(configs, order)
    for name, line in lines:
        print(f"{name}\t{line}", flush=True)


def _verified(config: TrainConfig) -> str:
    from tapedist.verification.command import verify

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            verify(VerifyOptions(run_dir=str(config.run_dir)))
    except TapedistError as error:
        return str(error)
    return "equal"


def _trained(configs: Mapping[str, TrainConfig], order: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    import tensorflow as tf

    from tapedist.cluster import resolve

    if order.get("intra_op"):
        tf.config.threading.set_intra_op_parallelism_threads(order["intra_op"])
    with contextlib.ExitStack() as stack:
        for place, value in order.get("constants", {}).items():
            module, name = place.split(":")
            stack.enter_context(mock.patch.object(importlib.import_module(module), name, value))
        spec = resolve.of_run(next(iter(configs.values())), os.environ)
        if len(spec.workers) > 1:
            yield from _in_a_cluster(configs, spec)
        else:
            for name, config in configs.items():
                yield name, _alone(config, order.get("stop_after", 0))


def _alone(config: TrainConfig, stop_after: int) -> str:
    from tapedist.run import train

    with contextlib.ExitStack() as stack:
        if stop_after:
            stack.enter_context(mock.patch.object(train, "StopSignals", return_value=_StopAfter(stop_after)))
        try:
            return train.train(config, quiet=True).digest
        except Interrupted:
            return "stopped"
        except TapedistError as error:
            return str(error)


class _StopAfter:
    """Signals of somebody who asks for a stop after the run has looked for one so often."""

    def __init__(self, asks: int):
        self.asks = asks

    def __enter__(self) -> _StopAfter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def deferred(self) -> _StopAfter:
        return self

    @property
    def signum(self) -> int | None:
        self.asks -= 1
        return signal.SIGTERM if self.asks < 0 else None


def _in_a_cluster(configs: Mapping[str, TrainConfig], spec: Any) -> Iterator[tuple[str, str]]:
    """One membership for all; collectives remember their group."""
    from tapedist.cluster.join import joined
    from tapedist.process import StopSignals
    from tapedist.results.monitor import Monitor
    from tapedist.run import train

    first = next(iter(configs.values()))
    with (
        StopSignals() as stop,
        joined(first, spec, stop_signal=lambda: stop.signum, quiet=True) as (strategy, why, team),
    ):
        for name, config in configs.items():
            place = train.Place(strategy=strategy, choice=why, team=team, monitor=Monitor(), folder=None, stop=stop)
            yield name, train.fit(config, place).digest


if __name__ == "__main__":
    main(sys.argv)
