"""An input pipeline at work, which ends before the interpreter does.

The functions of a pipeline call Python from threads of TensorFlow. Once the interpreter has begun to end, such a call
never returns, and whoever destroys the pipeline then waits for it for ever.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterator
from typing import Any


class ElementStream(Iterator[Any]):
    """The elements of a dataset, one after the other.

    Args:
        dataset: a distributed dataset.
    """

    def __init__(self, dataset: Any):
        self._iterator: Iterator[Any] | None = iter(dataset)
        _RUNNING.add(self)

    def __next__(self) -> Any:
        if self._iterator is None:
            raise StopIteration
        return next(self._iterator)

    @property
    def graph_iterator(self) -> Any:
        """The iterator that a `tf.function` takes elements from when it is given one; to be held for a call only."""
        return self._iterator

    def close(self) -> None:
        """Ends the pipeline, after the calls that are under way."""
        self._iterator = None


_RUNNING: weakref.WeakSet[ElementStream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for stream in list(_RUNNING):
        stream.close()
