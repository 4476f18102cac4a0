"""What the loss of an epoch is, and that it does not depend on where calls end."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tapedist.training.trainer import EpochLoss, full_batch_losses, mini_batch_losses


def _records(steps: int) -> np.ndarray:
    """`(sum w*loss, sum w, penalty)` of each step; the last batch of 7 is short."""
    random = np.random.Generator(np.random.Philox(steps))
    records = random.uniform(0.1, 9.0, (steps, 3))
    records[6::7, 1] = 0.5
    return records


def test_full_batch_rows_fall_on_epochs_and_hold_the_loss_before_the_update():
    records = _records(25)
    rows = list(full_batch_losses(records, step=8, logged=[10, 20, 30]))
    assert [(row.step, row.epoch) for row in rows] == [(10, 10), (20, 20), (30, 30)]
    assert rows[0].loss == records[2, 0] / records[2, 1]
    assert rows[0].penalty == records[2, 2]


def test_a_mini_batch_row_is_the_weighted_mean_of_its_epoch():
    records, sums = _records(21), np.zeros(3)
    rows = list(mini_batch_losses(records, sums, step=0, per_epoch=7, logs=lambda epoch: epoch != 1))
    assert [(row.step, row.epoch) for row in rows] == [(7, 0), (21, 2)]
    for row in rows:
        epoch = records[row.epoch * 7 : row.epoch * 7 + 7]
        np.testing.assert_allclose(row.loss, epoch[:, 0].sum() / epoch[:, 1].sum(), rtol=1e-15)
        assert row.penalty == epoch[0, 2]


@settings(deadline=None)
@given(cuts=st.sets(st.integers(1, 34)), per_epoch=st.integers(1, 12))
def test_rows_do_not_depend_on_how_many_steps_a_call_ran(cuts: set[int], per_epoch: int):
    records = _records(35)

    def rows(edges: list[int]) -> list[EpochLoss]:
        sums, found = np.zeros(3), []
        for begin, end in zip([0, *edges], [*edges, 35], strict=True):
            found += mini_batch_losses(records[begin:end], sums, step=begin, per_epoch=per_epoch, logs=lambda _: True)
        return found

    assert rows(sorted(cuts)) == rows([])
    assert len(rows([])) == 35 // per_epoch
