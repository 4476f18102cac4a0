"""Says when replicas wait for each other longer than they work: then fewer of them would be faster.

Legend: `R` replicas, `P` parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tapedist.training.replicas import Replicas, all_added
from tapedist.training.schedule import CallLength

_REPEATS = 20
# The first call compiles, and the second is a step or two.
_WARM_CALLS = 3


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


class TolledCalls(CallLength):
    """A `CallLength` that compares the time of a step with that of its gather, and speaks up once.

    Args:
        fixed: see `CallLength`.
        gather_secs: what a step's gather takes.
        replicas: `R`.
        batch_size: rows of a step, if more of them would help; 0 in full batch.
        say: takes the notice.
    """

    def __init__(self, fixed: int, *, gather_secs: float, replicas: int, batch_size: int, say: Callable[[str], None]):
        super().__init__(fixed)
        self._gather_secs = gather_secs
        self._replicas = replicas
        self._batch_size = batch_size
        self._say = say
        self._calls = 0

    def observe(self, steps: int, seconds: float) -> None:
        super().observe(steps, seconds)
        self._calls += 1
        if self._calls == _WARM_CALLS and self._gather_secs > seconds / steps / 2:
            self._say(self._notice(seconds / steps))

    def _notice(self, step_secs: float) -> str:
        toll = min(self._gather_secs, step_secs)
        remedy = "fewer devices or workers"
        if self._batch_size:
            # Work grows with the rows, the gather does not.
            work = max(step_secs - toll, 0.1 * step_secs)
            more = 2 ** max(1, int(toll / work - 1).bit_length())
            remedy += f", or --batch_size={self._batch_size * more} or more (another answer)"
        return (
            f"Notice: a step takes {step_secs * 1e3:.2g} ms, about {toll * 1e3:.2g} ms of it to add the sums "
            f"of {self._replicas} replicas; {remedy}, would be faster"
        )
