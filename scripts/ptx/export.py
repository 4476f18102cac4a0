"""The programs that XLA compiles for small runs of every engine, lowered for a GPU."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from ptx.rules import CONTROL, UNPINNED

_MANY_BLOCKS = {
    "tapedist.data.orders.RESIDENT_BYTES": 0,
    "tapedist.data.orders.BLOCK_BYTES": 16384,
    "tapedist.training.engines._RESIDENT_BYTES": 0,
}


LARGE = ((16_000_000, 1), (1_000_000, 64))  # Rows that lie on a GPU, and their features.


def runs() -> dict[str, dict[str, Any]]:
    """Settings of `TrainConfig` by name, and those of `_train`."""
    stream = {"full_batch_engine": "stream", "num_epochs": 3, "learning_rate": 0.01}
    moments = {"full_batch_engine": "moments", "num_epochs": 5, "learning_rate": 0.01}
    batches = {"mode": "mini_batch", "batch_size": 96, "num_epochs": 1, "learning_rate": 0.01}
    found: dict[str, dict[str, Any]] = {"stream 2 devices": stream | {"strategy": "mirrored", "num_virtual_devices": 2}}
    rules = ("sgd", "momentum", "nesterov", "adam")
    for i, dtype in enumerate(("float32", "float64")):
        for j, loss in enumerate(("squared", "huber", "absolute")):
            for k, rule in enumerate(rules):
                more = {"dtype": dtype, "loss": loss, "optimizer": rule, "num_features": (1, 3)[(i + j + k) % 2]}
                more |= {"l2": 0.1 * (k % 2), "fit_intercept": k != 2, "arrays": ("", "x", "weights")[(j + k) % 3]}
                found[f"stream {dtype} {loss} {rule}"] = stream | more
                found[f"batches {dtype} {loss} {rule}"] = batches | more
        of_type = {"dtype": dtype, "num_features": 3}
        for arrays in ("", "weights"):
            name = f"{dtype} {arrays}".strip()
            for rule in rules:
                found[f"moments {name} {rule}"] = moments | of_type | {"arrays": arrays, "optimizer": rule, "l2": 0.1}
            for d in (1, 17):
                found[f"moments {name} d={d}"] = moments | of_type | {"arrays": arrays, "num_features": d}
            small = of_type | {"arrays": arrays, "small": True}
            found[f"stream {name} in blocks"] = stream | small | {"cache": "none", "optimizer": "adam"}
            found[f"stream {name} of held blocks"] = stream | small | {"cache": "device", "loss": "huber"}
            found[f"moments {name} in blocks"] = moments | small
            found[f"batches {name} in blocks"] = batches | small | {"cache": "none"}
        found[f"stream {dtype} own loss"] = stream | of_type | {"own_loss": True, "arrays": "weights"}
        found[f"stream {dtype} d=200"] = stream | of_type | {"num_features": 200}
        found[f"batches {dtype} automatic rate"] = batches | of_type | {"arrays": "x", "learning_rate": "auto"}
        found[f"huber {dtype} automatic rate"] = stream | of_type | {
            "arrays": "x", "learning_rate": "auto", "loss": "huber", "statistics": "true",
        }  # fmt: skip
    return found


def export(folder: Path) -> None:
    """Trains `runs`, and writes the HLO of what XLA compiled for them, with `programs.json`, which names it."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from tapedist import runtime_flags  # isort: skip  (before TensorFlow)
    import tensorflow as tf
    from tensorflow.python.eager.polymorphic_function import compiler_ir

    warnings.simplefilter("ignore")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # Of many traces, which are wanted here.
    folder.mkdir(parents=True)
    programs, trained = [], runs()
    with _caught() as found:
        for name, settings in trained.items():
            digest = _train(**settings)
            print(f"{name}: {digest[:12]}, {found.named(name)} programs so far", flush=True)
        _note_large(found)
        found.add_controls()
    for number, (function, args, kwargs, run) in enumerate(found.calls):
        made = found.concrete(function, *args, **kwargs)
        specs = [spec for spec in tf.nest.flatten(made.structured_input_signature) if isinstance(spec, tf.TensorSpec)]
        lowered = compiler_ir.from_concrete_function(made, specs)(stage="hlo_serialized", platform_name="GPU")
        (folder / f"{number:03}.hlo.pb").write_bytes(lowered)
        shapes = " ".join(f"{spec.dtype.name}{spec.shape.as_list()}" for spec in specs)
        programs.append({"number": number, "name": _name(function), "run": run, "shapes": shapes})
    about = {
        "tensorflow": tf.__version__,
        "flags": runtime_flags.flags_in_use(),
        "runs": len(trained),
        "commit": _commit(),
    }
    (folder / "programs.json").write_text(json.dumps(about | {"programs": programs}, indent=1))
    print(f"{len(programs)} programs")


def _note_large(found: _Found) -> None:
    """The loops over steps of as many rows as a GPU would hold; they are lowered, not run."""
    import numpy as np
    import tensorflow as tf

    from tapedist.data.orders import TILE_ROWS
    from tapedist.training import losses, optimizers
    from tapedist.training.model import LinearModel
    from tapedist.training.schedule import MAX_STEPS_PER_CALL
    from tapedist.training.slot_steps import SlotSteps
    from tapedist.training.steps import Problem

    for rows, d in LARGE:
        problem = Problem(
            model=LinearModel(d), loss=losses.squared, optimizer=optimizers.sgd(0.001), dtype=tf.float32
        )  # fmt: skip
        steps = SlotSteps(
            strategy=tf.distribute.get_strategy(), problem=problem, bounds=np.ones(d + 2), weighted=False, even=True,
            parallel=1,
        )  # fmt: skip
        tiles = rows // TILE_ROWS
        shapes = ([d + 1], [tiles, d, TILE_ROWS], [tiles, TILE_ROWS], [1], [MAX_STEPS_PER_CALL + 1, 2], [], [],
                  [steps.num_settings])  # fmt: skip
        types = (tf.float64, tf.float32, tf.float32, tf.int32, tf.float64, tf.int64, tf.int32, tf.float64)
        state, x, y, *rest = (tf.TensorSpec(shape, dtype) for shape, dtype in zip(shapes, types, strict=True))
        found.note(steps._fused_loop, (state, (x, y), *rest), {})
        found.named(f"{rows:,} rows, d = {d}")


class _Found:
    """Calls of functions that XLA compiles.

    Attributes:
        calls: `(function, args, kwargs, name of the run)`, tensors as their `TensorSpec`.
        concrete: `tf.function`'s way to one trace.
    """

    def __init__(self, concrete: Any):
        self.calls: list[tuple[Any, Any, Any, str]] = []
        self.concrete = concrete
        self._keys: set[Any] = set()
        self._unnamed = 0

    def note(self, function: Any, args: Any, kwargs: Any) -> None:
        import tensorflow as tf

        if not function._jit_compile:
            return
        args, kwargs = tf.nest.map_structure(
            lambda value: tf.TensorSpec(value.shape, value.dtype) if tf.is_tensor(value) else value, (args, kwargs)
        )
        # The function is kept in `calls`, so that its id stays its own.
        key = (id(function), str(args), str(kwargs))
        if key not in self._keys:
            self._keys.add(key)
            self.calls.append((function, args, kwargs, ""))

    def named(self, run: str) -> int:
        """Puts the run's name to the calls since the last time; returns how many calls there are."""
        self.calls[self._unnamed :] = [(*call[:3], run) for call in self.calls[self._unnamed :]]
        self._unnamed = len(self.calls)
        return self._unnamed

    def add_controls(self) -> None:
        """Programs in which something must be found, and one that shows whether a pin is needed at all."""
        import tensorflow as tf

        for dtype in (tf.float64, tf.float32):
            rows = tf.TensorSpec([1000], dtype)
            for run, control in (
                (CONTROL, lambda x: tf.exp(x) / (x + 1) + tf.sqrt(x)),
                (UNPINNED, lambda x: x * x + x),
            ):
                self.note(tf.function(control, jit_compile=True, autograph=False), (rows,), {})
                self.named(run)


@contextlib.contextmanager
def _caught() -> Iterator[_Found]:
    """Notes what is compiled inside, also where it is called in another function's trace."""
    from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function

    call, concrete = Function.__call__, Function.get_concrete_function
    found = _Found(concrete)

    def deferred(before: Any) -> Any:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            found.note(self, args, kwargs)
            return before(self, *args, **kwargs)

        return wrapper

    with (
        mock.patch.object(Function, "__call__", deferred(call)),
        mock.patch.object(Function, "get_concrete_function", deferred(concrete)),
    ):
        yield found


def _train(*, arrays: str = "", small: bool = False, custom_loss: bool = False, **settings: Any) -> str:
    """The digest of one run.

    Args:
        arrays: rows of arrays in place of synthetic ones: "x", "weights" for weighted ones, or "".
        small: whether splits are cut into blocks as those of many rows are.
        custom_loss: whether squared error is given as a loss of one's own.
        **settings: of `TrainConfig`.
    """
    import numpy as np

    import tapedist
    from tapedist.run import train

    settings = {"n_samples": 1203, "test_fraction": 0.2, "plots": False, "statistics": "false"} | settings
    source = None
    if arrays:
        random, d = np.random.default_rng(3), settings.pop("num_features")
        x = random.normal(size=(settings.pop("n_samples"), d))
        y, w = x.sum(1) + random.normal(size=len(x)), random.uniform(size=len(x))
        held = int(settings.pop("test_fraction") * len(x))
        source = tapedist.ArraySource(x, y, w if arrays == "weights" else None, test_rows=held)
    with contextlib.ExitStack() as stack:
        # Second moments by the program of GPUs, which CPUs leave to NumPy.
        stack.enter_context(mock.patch("tapedist.training.engines._suits_host", return_value=False))
        for place, size in _MANY_BLOCKS.items() if small else ():
            stack.enter_context(mock.patch(place, size))
        loss = (lambda y_hat, y: tapedist.times(y_hat - y, y_hat - y)) if custom_loss else None
        return train.train(tapedist.TrainConfig(**settings), source=source, loss=loss).digest


def _name(function: Any) -> str:
    """The module and the method that a compiled function is made in."""
    made = function.python_function
    return f"{made.__module__.removeprefix('tapedist.')}.{made.__qualname__.partition('.<locals>')[0]}"


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
