"""What every replica does: the package's only `strategy.run`, sums between host and replicas, and what they cost.

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
    # The default strategy has no list of its own: TensorFlow takes what computes fastest.
    kind = next(kind for kind in ("TPU", "GPU", "CPU") if tf.config.list_logical_devices(kind))
    return (f"/device:{kind}:0",)


def all_added(sums: tf.Tensor) -> tf.Tensor:
    """The sum of all replicas' `sums`, on each of them; called on every replica, outside of compiled programs.

    Integers, which have no order: that of a collective is by names of tasks, where "task:10" comes before "task:2".
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return sums
    # What only passes through has no device, and so no place to add at.
    return tf.ensure_shape(context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(sums)), sums.shape)


class Replicas:
    """What every replica does: the package's one `strategy.run`, and sums on their way between host and replicas.

    Args:
        strategy: where replicas live.
    """

    def __init__(self, *, strategy: tf.distribute.Strategy):
        self.strategy = strategy
        self._traced: Any = self

    def share_traces(self, key: Hashable) -> None:
        """Takes the traced programs of the first object of this class with this `key` on the same strategy.

        What XLA compiles for a function is never given back, several MiB each, so that one process could not train
        often. The programs live as long as their strategy.

        Args:
            key: all that the traces depend on, beside the shapes of their arguments.
        """
        kept = vars(self.strategy).setdefault("_tapedist_programs", {})
        self._traced = kept.setdefault((type(self), key), self)

    @property
    def traced(self) -> Any:
        """The object whose traced programs serve this one."""
        return self._traced

    def on_replicas(self, replica_fn: Callable[..., Any], *args: Any) -> Any:
        """Calls `replica_fn` on every replica with its share of `args`."""
        return self.strategy.run(replica_fn, args=args)

    @functools.cached_property
    def on_cpu(self) -> bool:
        """Whether the replicas here are CPUs."""
        return all("CPU" in device for device in local_devices(self.strategy))

    @functools.cached_property
    def local_replicas(self) -> range:
        """The numbers of this process's replicas."""
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
    """Seconds that one exchange of a step takes, by a few of them in a row; a collective of all workers.

    Args:
        strategy: with at least two replicas.
        width: how many sums are added.
    """
    replicas = Replicas(strategy=strategy)
    value = replicas.given_to_first(np.zeros([2, width], np.int64))

    def gathers(value: tf.Tensor, repeats: tf.Tensor) -> tf.Tensor:
        def one(i: tf.Tensor, last: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            found = strategy.experimental_local_results(replicas.on_replicas(all_added, value))[0]
            return i + 1, last + found[0, 0]

        start = (tf.constant(0), tf.zeros([], tf.int64))
        return tf.while_loop(lambda i, _: i < repeats, one, start, parallel_iterations=1)[1]

    compiled = tf.function(gathers, autograph=False, reduce_retracing=True)
    compiled(value, tf.constant(1)).numpy()
    start = time.perf_counter()
    compiled(value, tf.constant(_REPEATS)).numpy()
    return (time.perf_counter() - start) / _REPEATS
