"""Replicas: the package's only `strategy.run`, the exchange of sums between host and replicas, and its cost.

Legend: `R` replicas, `K` sums, `P` parameters.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import tensorflow as tf

_REPEATS = 20


def local_devices(strategy: tf.distribute.Strategy) -> tuple[str, ...]:
    """The devices of this process's replicas."""
    if strategy.num_replicas_in_sync > 1:
        return tuple(strategy.extended.worker_devices)
    # With one replica the strategy may have no list of devices: TensorFlow places operations on the fastest kind.
    kind = next(kind for kind in ("TPU", "GPU", "CPU") if tf.config.list_logical_devices(kind))
    return (f"/device:{kind}:0",)


def all_added(sums: tf.Tensor) -> tf.Tensor:
    """The sum of all replicas' `sums`, on each of them; called on every replica, outside of compiled programs.

    Integers, whose sum has no order: a collective ranks tasks by name, "task:10" before "task:2".
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return sums
    # An argument that no operation has touched has no device, and the all-reduce adds on the device of its operand.
    return tf.ensure_shape(context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(sums)), sums.shape)


class Replicas:
    """Runs functions on replicas, and moves sums between the host and the replicas.

    Args:
        strategy: of the replicas.
    """

    def __init__(self, *, strategy: tf.distribute.Strategy):
        self.strategy = strategy
        self._traced: Any = self

    def share_traces(self, key: Hashable) -> None:
        """Takes the traced programs of the first object of this class with this `key` on the same strategy.

        XLA never frees the program of a function, several MiB each, which would limit how often a process can train.
        The programs live as long as their strategy.

        Args:
            key: whatever the traces depend on, besides the shapes of their arguments.
        """
        # An attribute of the strategy rather than a global cache, which would keep every strategy alive.
        kept = vars(self.strategy).setdefault("_tapedist_programs", {})
        self._traced = kept.setdefault((type(self), key), self)

    @property
    def traced(self) -> Any:
        """The object whose traced programs this one uses."""
        return self._traced

    def on_replicas(self, replica_fn: Callable[..., Any], *args: Any) -> Any:
        """Calls `replica_fn` on every replica with its share of `args`."""
        return self.strategy.run(replica_fn, args=args)

    @functools.cached_property
    def on_cpu(self) -> bool:
        """Returns whether the replicas here are CPUs."""
        return all("CPU" in device for device in local_devices(self.strategy))

    @functools.cached_property
    def local_replicas(self) -> range:
        """The numbers of this process's replicas."""
        # TensorFlow has no public list of them, but calls this function once for each local replica, in order.
        found: list[int] = []

        def note(context: tf.distribute.ValueContext) -> tf.Tensor:
            found.append(context.replica_id_in_sync_group)
            return tf.zeros([])

        self.strategy.experimental_distribute_values_from_function(note)
        return range(found[0], found[-1] + 1)

    def given_to_first(self, sums: np.ndarray) -> Any:
        """`sums` on the first replica of all, and zeros on the others."""

        def share(context: tf.distribute.ValueContext) -> tf.Tensor:
            return tf.constant(sums if context.replica_id_in_sync_group == 0 else np.zeros_like(sums))

        return self.strategy.experimental_distribute_values_from_function(share)

    def added(self, sums: Any) -> np.ndarray:
        """The sum of all replicas' `sums`, on the host of each."""
        return self.strategy.experimental_local_results(self._traced._add(sums))[0].numpy()

    @functools.cached_property
    def _add(self) -> Any:
        return tf.function(lambda sums: self.on_replicas(all_added, sums), autograph=False)


def gather_seconds(strategy: tf.distribute.Strategy, *, width: int) -> float:
    """Measures the seconds of a step's exchange over a few of them; a collective of all workers.

    Args:
        strategy: with at least two replicas.
        width: the number of sums to add.
    """
    replicas = Replicas(strategy=strategy)
    value = replicas.given_to_first(np.zeros([2, width], np.int64))

    def gathers(value: tf.Tensor, repeats: tf.Tensor) -> tf.Tensor:
        def one(i: tf.Tensor, last: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            found = strategy.experimental_local_results(replicas.on_replicas(all_added, value))[0]
            # Each result is used, so that no exchange can be pruned.
            return i + 1, last + found[0, 0]

        start = (tf.constant(0), tf.zeros([], tf.int64))
        return tf.while_loop(lambda i, _: i < repeats, one, start, parallel_iterations=1)[1]

    compiled = tf.function(gathers, autograph=False, reduce_retracing=True)
    # The first call traces, and is not timed.
    compiled(value, tf.constant(1)).numpy()
    start = time.perf_counter()
    compiled(value, tf.constant(_REPEATS)).numpy()
    return (time.perf_counter() - start) / _REPEATS
