"""Where the seconds of the tutorial go, in this process; one JSON object on the last line of stdout.

python startup.py [any field of the config as name=value]
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from typing import Any

_START = time.perf_counter()
_SPENT: dict[str, float] = {}


@contextlib.contextmanager
def phase(name: str) -> Any:
    begin = time.perf_counter()
    yield
    _SPENT[name] = _SPENT.get(name, 0.0) + time.perf_counter() - begin


def timed(owner: Any, method: str, name: str) -> None:
    """Books the time spent in `owner.method` under `name`."""
    function = getattr(owner, method)

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        with phase(name):
            return function(*args, **options)

    setattr(owner, method, wrapper)


def main() -> None:
    with phase("import tapedist's command line"):
        from tapedist import process, runtime_flags
    with phase("import tensorflow"), runtime_flags.keras_left_out(), process.importing():
        import tensorflow  # noqa: F401, ICN001
    with phase("import tapedist.run.train"):
        from tapedist.cluster import strategies
        from tapedist.config import TrainConfig
        from tapedist.run import train
        from tapedist.training import engines
        from tapedist.training.trainer import Trainer
    timed(strategies, "create", "find devices, make strategy")
    timed(engines, "moments", "make moments engine")
    for method in ("full_batch", "full_loss"):
        timed(engines, method, "make stream engines, with their rows")
    timed(Trainer, "fit", "train: pass, compile, 3,000 epochs")
    timed(Trainer, "close", "final losses: compile, sum")
    with phase("train, all of it"):
        train.train(TrainConfig(plots=False), quiet=True)
    _SPENT["process so far"] = time.perf_counter() - _START
    print(json.dumps({name: round(seconds, 4) for name, seconds in _SPENT.items()}))


if __name__ == "__main__":
    sys.exit(main())
