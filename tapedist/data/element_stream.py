"""An input pipeline at work, which ends before the interpreter does.

The functions of a pipeline call Python from threads of TensorFlow. Once the interpreter has begun to end, such a call
never returns, and whoever destroys the pipeline then waits for it for ever. And what hands elements to devices of
a strategy, one or several, must not be destroyed while it waits for one: TensorFlow crashes.
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
        stop: makes the dataset, which is a strategy's, end soon; None where its iterator may be destroyed at any time.
    """

    def __init__(self, dataset: Any, *, stop: Callable[[], object] | None = None):
        self._stop = stop
        self._iterator: Any = None  # What `__del__` finds if there is no making one.
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
        # Not element by element of all workers, which they would have to wish for at the same time. What a source
        # raises has been heard by whoever asked for its elements, or was not asked for.
        for local in iterator._iterators:
            with contextlib.suppress(Exception):
                while any(left.has_value() for left in local.get_next_as_optional_list()):
                    pass

    def __del__(self) -> None:
        self.close()


_RUNNING: weakref.WeakSet[ElementStream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for stream in list(_RUNNING):
        stream.close()
