"""What every replica does: the package's only `strategy.run`, and partials on their way between host and replicas.

Legend: `V` shards, `R` replicas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.training import partials as fixed_order


def local_devices(strategy: tf.distribute.Strategy) -> tuple[str, ...]:
    """The devices of this process's replicas."""
    if strategy.num_replicas_in_sync > 1:
        return tuple(strategy.extended.worker_devices)
    # The default strategy has no list of its own: TensorFlow takes what computes fastest.
    kind = next(kind for kind in ("TPU", "GPU", "CPU") if tf.config.list_logical_devices(kind))
    return (f"/device:{kind}:0",)


class Replicas:
    """What every replica does: the package's one `strategy.run`, and partials on their way between host and replicas.

    Args:
        strategy: where replicas live.
        num_shards: `V`.
        partial_width: numbers in a shard's partial.
    """

    def __init__(self, *, strategy: tf.distribute.Strategy, num_shards: int, partial_width: int):
        self.strategy = strategy
        self.num_shards = num_shards
        self.partial_width = partial_width
        self._traced: Any = self

    def share_traces(self, key: Hashable) -> None:
        """Takes the traced programs of the first object of this class with this `key` on the same strategy.

        What XLA compiles for a function is never given back, several MiB each, so that one process could not train
        often. The programs live as long as their strategy.

        Args:
            key: all that the traces depend on, beside the shapes of their arguments.
        """
        kept = vars(self.strategy).setdefault("_tapedist_programs", {})
        self._traced = kept.setdefault((type(self), self.num_shards, self.partial_width, key), self)

    def on_replicas(self, replica_fn: Callable[..., Any], *args: Any) -> Any:
        """Calls `replica_fn` on every replica with its share of `args`."""
        return self.strategy.run(replica_fn, args=args)

    @functools.cached_property
    def on_cpu(self) -> bool:
        """Whether the replicas here are CPUs."""
        return all("CPU" in device for device in local_devices(self.strategy))

    @property
    def replica_width(self) -> int:
        """Shards of the fullest replica, `ceil(V / R)`."""
        return -(-self.num_shards // self.strategy.num_replicas_in_sync)

    def scattered(self, sums: np.ndarray) -> Any:
        """Each replica's shards of `sums`.

        Args:
            sums: float64 `[V, width]`.

        Returns:
            Per-replica float64 `[ceil(V / R), width]`; shards beyond `V` are zeros.
        """
        width = self.replica_width
        padded = np.zeros([width * self.strategy.num_replicas_in_sync, self.partial_width])
        padded[: self.num_shards] = sums

        def share(context: tf.distribute.ValueContext) -> tf.Tensor:
            return tf.constant(padded[context.replica_id_in_sync_group * width :][:width])

        return self.strategy.experimental_distribute_values_from_function(share)

    def gathered(self, sums: Any) -> np.ndarray:
        """The inverse of `scattered`."""
        return self.strategy.experimental_local_results(self._traced._gather_sums(sums))[0].numpy()

    @functools.cached_property
    def _gather_sums(self) -> Any:
        gather = functools.partial(fixed_order.gather, num_shards=self.num_shards)
        return tf.function(lambda sums: self.on_replicas(gather, sums), autograph=False)
