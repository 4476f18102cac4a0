"""An input pipeline at work, which ends before the interpreter does.

The functions of a pipeline call Python from threads of TensorFlow. Once the interpreter has begun to end, such a call
never returns, and whoever destroys the pipeline then waits for it for ever. And what hands elements to several devices
must not be destroyed while it waits for one: TensorFlow crashes.
"""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any


class ElementStream(Iterator[Any]):
    """The elements of a dataset, one after the other.

    Args:
        dataset: a distributed dataset.
        stop: makes the dataset end soon; None where its iterator may be destroyed at any time.
    """

    def __init__(self, dataset: Any, *, stop: Callable[[], object] | None = None):
        self._stop = stop
        self._iterator: Iterator[Any] | None = None  # What `__del__` finds if there is no making one.
        self._iterator = iter(dataset)
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
        iterator, self._iterator = self._iterator, None
        if iterator is None or self._stop is None:
            return
        self._stop()
        # What a source raises has been heard by whoever asked for its elements, or was not asked for.
        with contextlib.suppress(Exception):
            for _ in iterator:
                pass

    def __del__(self) -> None:
        self.close()


_RUNNING: weakref.WeakSet[ElementStream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for stream in list(_RUNNING):
        stream.close()
