"""From step records to the training rows of `metrics.jsonl`: what "the loss of an epoch" means in each mode.

Rows depend on step numbers only, never on how many steps a call ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np


class EpochLoss(NamedTuple):
    """A training row in the making.

    Attributes:
        step: updates done when the loss is known.
        epoch: the epoch it belongs to.
        loss: weighted mean of the per-example loss.
        penalty: the L2 penalty at the epoch's first parameters.
    """

    step: int
    epoch: int
    loss: float
    penalty: float


def full_batch_losses(records: np.ndarray, *, step: int, logged: Iterable[int]) -> Iterator[EpochLoss]:
    """Each step is an epoch, and its record is the loss over the whole split at the parameters before its update.

    Args:
        records: float64 `[steps, columns]`, see `steps.py`.
        step: updates done before the first record.
        logged: epochs that have a row.
    """
    for epoch in logged:
        loss, weight, penalty = records[epoch - step, :3]
        yield EpochLoss(epoch, epoch, float(loss / weight), float(penalty))


def mini_batch_losses(
    records: np.ndarray, sums: np.ndarray, *, step: int, per_epoch: int, logs: Callable[[int], bool]
) -> Iterator[EpochLoss]:
    """The weighted mean over an epoch's batches, each at the parameters before its update.

    Args:
        records: float64 `[steps, columns]`, see `steps.py`.
        sums: float64 `[3]`, changed in place: `(sum w*loss, sum w, first penalty)` of the epoch under way.
        step: updates done before the first record.
        per_epoch: steps in an epoch.
        logs: whether an epoch has a row.
    """
    begin = 0
    while begin < len(records):
        epoch, within = divmod(step + begin, per_epoch)
        end = min(len(records), begin + per_epoch - within)
        if within == 0:
            sums[:] = 0.0, 0.0, records[begin, 2]
        # Added one after the other, so that the sum does not depend on where calls end.
        sums[:2] = np.add.accumulate(np.vstack([sums[:2], records[begin:end, :2]]), axis=0)[-1]
        if within + end - begin == per_epoch and logs(epoch):
            yield EpochLoss(step + end, epoch, float(sums[0] / sums[1]), float(sums[2]))
        begin = end
