"""What native libraries say on standard error while they start: kept back, and said after all if the start fails.

TensorFlow's runtime greets on descriptor 2 before any of its own settings can silence it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
from collections.abc import Iterator

from tapedist.errors import TapedistError

_shown = False


@contextlib.contextmanager
def noise_shown(shown: bool) -> Iterator[None]:
    """Decides what `quiet_start` does inside: with `shown`, nothing."""
    global _shown
    before, _shown = _shown, shown
    try:
        yield
    finally:
        _shown = before


def _flush() -> None:
    getattr(sys.stderr, "flush", lambda: None)()  # It may be None, or another program's object.


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Keeps back what is written to descriptor 2 inside; lets it out if the body fails with an error that is not ours.

    A process that dies inside says where: its last words are not kept back.
    """
    _flush()
    with contextlib.ExitStack() as stack:
        if _shown:
            yield
            return
        try:
            said = stack.enter_context(tempfile.TemporaryFile())
            stderr = os.dup(2)
        except OSError:  # No room for a temporary file, or no descriptor left: noise is the smaller evil.
            yield
            return
        stack.callback(os.close, stderr)
        was_enabled = faulthandler.is_enabled()
        if not was_enabled:
            faulthandler.enable(file=stderr)
        os.dup2(said.fileno(), 2)
        try:
            yield
        except Exception as error:
            if not isinstance(error, (TapedistError, MemoryError)):
                said.seek(0)
                os.write(stderr, said.read())
            raise
        finally:
            _flush()
            os.dup2(stderr, 2)
            if not was_enabled:
                faulthandler.disable()
