"""How an epoch is computed: from rows at hand, from blocks in device memory, or from rows that stream past.

All engines answer one call, `Engine.run`; the trainer does not know which it has. They differ in where the rows are,
never in the numbers that come out for one config. `full_batch`, `moments` and `mini_batch` make them;
`full_loss` makes one that only measures.
"""

from tapedist.training.engines.batches import mini_batch
from tapedist.training.engines.engine import Engine
from tapedist.training.engines.second_moments import MomentsEngine, moments
from tapedist.training.engines.setup import Setup, memory_budget
from tapedist.training.engines.stream import full_batch, full_loss

__all__ = [
    "Engine",
    "MomentsEngine",
    "Setup",
    "full_batch",
    "full_loss",
    "memory_budget",
    "mini_batch",
    "moments",
]
