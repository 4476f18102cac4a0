"""What an element of the pipeline holds: which rows each replica takes, by integer arithmetic alone.

An element is what one replica computes on: its share of the rows of some slots (a slot is a batch, a block, or a small
split). Which rows go where is arithmetic on the element's number, so a pipeline can start anywhere; there is no
position to save.

Legend: `R` replicas, `T` rows of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tapedist.data.orders import BatchPlan, BlockOrder
from tapedist.data.permutations import WINDOW_ROWS, WindowOrder, epoch_batches, epoch_rows

# `places -> (epoch, batch)`, int64 `[len(places)]` each: which batch of which epoch is at each place of a sequence.
BatchSequence = Callable[[range], tuple[np.ndarray, np.ndarray]]

_STEPS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElementPlan:
    """What an element holds: the fixed shape, and the rows for each element number and replica.

    Attributes:
        split: "train" or "test".
        slots: slots per element.
        tiles: tiles per slot.
        tile_rows: `T`; a slot has room for `tiles * tile_rows` rows.
        row_major: whether a tile holds row after row; otherwise feature after feature.
        first_rows: `(element, replica) -> (first, counts)`, both int64 `[slots]`: the slot's rows are at positions
            `first .. first + counts`.
        epochs: the epoch of each slot of an element, int64 `[slots]`, ascending.
        shuffled: the order of rows in an epoch, or None where the numbers of rows are their positions.
    """

    split: str
    slots: int
    tiles: int
    tile_rows: int
    row_major: bool = False
    first_rows: Callable[[int, int], tuple[np.ndarray, np.ndarray]]
    epochs: Callable[[int], np.ndarray] | None = None
    shuffled: ShuffledRows | None = None

    @property
    def slot_rows(self) -> int:
        """Rows that a slot has room for."""
        return self.tiles * self.tile_rows

    @property
    def tiled_shape(self) -> tuple[int, int]:
        """Of the target, and of weights."""
        return self.slots * self.tiles, self.tile_rows

    def x_shape(self, num_features: int) -> tuple[int, int, int]:
        tiles, rows = self.tiled_shape
        return (tiles, rows, num_features) if self.row_major else (tiles, num_features, rows)

    def row_numbers(self, element: int, positions: np.ndarray) -> np.ndarray:
        """Row numbers at positions `[slots, k]` of an element; padding beyond the split stays in range."""
        assert self.shuffled
        assert self.epochs
        epochs = self.epochs(element)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            result[epochs == epoch] = self.shuffled(int(epoch), positions[epochs == epoch])
        return result


@dataclasses.dataclass(frozen=True)
class ShuffledRows:
    """The order of rows under `--shuffle=rows`.

    Attributes:
        plan: how an epoch is cut into batches.
        seed: the run's seed.
        window: rows per window; fixed, because the order must not depend on the machine.
    """

    plan: BatchPlan
    seed: int
    window: int = WINDOW_ROWS

    def order(self, epoch: int) -> WindowOrder:
        """The order of one epoch."""
        return WindowOrder(self.plan.num_rows, self.seed, epoch, self.window)

    def __call__(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Row numbers at positions of any shape; those beyond the split stay in range."""
        inside = np.minimum(positions, self.plan.num_rows - 1).ravel()
        rows = epoch_rows(inside, num_rows=self.plan.num_rows, seed=self.seed, epoch=epoch, window=self.window)
        return rows.reshape(positions.shape)


def in_order(places: range) -> tuple[np.ndarray, np.ndarray]:
    """The batches of the first epoch, as a `BatchSequence`."""
    return np.zeros(len(places), np.int64), np.arange(places.start, places.stop)


def split_elements(num_rows: int, num_replicas: int, *, split: str, **layout: Any) -> ElementPlan:
    """The one element of a resident split, which is a batch of all rows: see `batch_elements`."""
    return batch_elements(BatchPlan(num_rows, num_rows), num_replicas, slots=1, order=in_order, split=split, **layout)


def block_elements(order: BlockOrder, whole: BlockOrder, *, split: str, **layout: Any) -> ElementPlan:
    """Element `t`: the blocks of turn `t`. Behind a pass begins the next one, from its beginning.

    Args:
        order: the pass to begin with.
        whole: a pass from its beginning, in blocks of the same size.
        split: "train" or "test".
        **layout: `tiles`, which have room for a block, `tile_rows` and `row_major` of the plan.
    """

    def first_rows(element: int, replica: int) -> tuple[np.ndarray, np.ndarray]:
        if element < order.turns:
            rows = order.block(element, replica)
        else:
            rows = whole.block((element - order.turns) % whole.turns, replica)
        return np.array([rows.start]), np.array([len(rows)])

    plan = ElementPlan(split=split, slots=1, first_rows=first_rows, **layout)
    assert max(order.block_rows, whole.block_rows) <= plan.slot_rows
    return plan


def batch_elements(
    plan: BatchPlan,
    num_replicas: int,
    *,
    slots: int,
    order: BatchSequence,
    row_numbers: ShuffledRows | None = None,
    split: str = "train",
    **layout: Any,
) -> ElementPlan:
    """Element `t`: the batches at places `t * slots ...` of a sequence.

    Each replica fills its tiles with consecutive rows of a batch, the last ones with what is left.

    Args:
        plan: how an epoch is cut into batches.
        num_replicas: `R`.
        slots: batches per element.
        order: which batch of which epoch is at each place.
        row_numbers: the order of rows in an epoch; None where the numbers of rows are their positions.
        split: "train" or "test".
        **layout: `tiles` of a replica's share of a batch, `tile_rows` and `row_major` of the plan.
    """

    def batches_of(element: int) -> tuple[np.ndarray, np.ndarray]:
        return order(range(element * slots, (element + 1) * slots))

    def first_rows(element: int, replica: int) -> tuple[np.ndarray, np.ndarray]:
        _, batches = batches_of(element)
        rows = plan.rows_of(batches)
        before = np.minimum(replica * elements.slot_rows, rows)
        return batches * plan.batch_rows + before, np.minimum(elements.slot_rows, rows - before)

    elements = ElementPlan(
        split=split, slots=slots, first_rows=first_rows, epochs=lambda element: batches_of(element)[0],
        shuffled=row_numbers, **layout,
    )  # fmt: skip
    assert plan.batch_rows <= elements.slot_rows * num_replicas
    return elements


def epoch_order(plan: BatchPlan, *, shuffle: str, seed: int) -> BatchSequence:
    """The sequence of batches of a run's steps; may be asked from several threads."""
    per_epoch = plan.steps_per_epoch

    # Many at once take half the time, and what makes elements asks for the same ones as what counts their rows.
    @functools.lru_cache(maxsize=8)
    def found(number: int) -> tuple[np.ndarray, np.ndarray]:
        epochs, batches = np.divmod(number * _STEPS_AT_ONCE + np.arange(_STEPS_AT_ONCE), per_epoch)
        if shuffle == "batches":
            batches = epoch_batches(batches, num_batches=per_epoch, seed=seed, epochs=epochs)
        return epochs, batches

    def order(steps: range) -> tuple[np.ndarray, np.ndarray]:
        first = steps.start // _STEPS_AT_ONCE
        parts = [found(number) for number in range(first, -(-steps.stop // _STEPS_AT_ONCE))]
        inside = slice(steps.start - first * _STEPS_AT_ONCE, steps.stop - first * _STEPS_AT_ONCE)
        epochs, batches = (np.concatenate(columns)[inside] for columns in zip(*parts, strict=True))
        return epochs, batches

    return order
