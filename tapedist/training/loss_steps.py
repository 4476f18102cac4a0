"""The loss of rows at hand, where nothing is to be moved: what a step begins with, in half the time to compile.

Legend: `P` parameters, `s` optimizer slots.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.training.row_sums import Slot
from tapedist.training.steps import CallResult, RowPrograms


class LossSteps(RowPrograms):
    """Steps of one replica over one slot that leave a record and the state as it was.

    Args:
        **programs: see `RowPrograms`.
    """

    def __init__(self, **programs: Any):
        super().__init__(**programs)
        self.trace_once()

    @functools.cached_property
    def _record(self) -> Any:
        def record(state, rows, counts, settings):  # type: ignore[no-untyped-def]
            with self.pinned(settings):
                theta, zero = state[: self.num_parameters], tf.zeros([], tf.int64)
                slot = Slot(0, rows[1].shape[0])
                sums = self.row_sums.of_tiles(theta, self.bounds_in(settings), rows, counts[0], slot)
                # XLA leaves out what makes a new state, and so the gradient.
                return self.apply_sums(self.row_sums, state, sums, zero, settings)[1]

        return tf.function(record, jit_compile=True, autograph=False)

    def run(self, state: np.ndarray, rows: Any, counts: Any) -> CallResult:
        """A record at `state`, float64 `[P + s * P]`; arguments as in `SlotSteps.run`."""
        record = self._traced._record(tf.constant(state), rows, counts, tf.constant(self.settings(math.inf)))
        return CallResult(state, record.numpy()[np.newaxis], 0)
