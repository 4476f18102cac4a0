"""matplotlib whatever the user's environment, `matplotlibrc` and program have set: figures come out the same, and the
user's settings are afterwards what they were.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator

_LOCK = threading.RLock()  # matplotlib's settings are those of the process.


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Imports matplotlib, which fails by itself where `MPLBACKEND` or `matplotlibrc` cannot be used or no folder be
    written. Import what needs it inside.
    """
    with _LOCK, _quiet():
        if "matplotlib" not in sys.modules:
            # A notebook names a backend that this environment may lack.
            backend = os.environ.pop("MPLBACKEND", "")
            try:
                _import()
            finally:
                if backend:
                    os.environ["MPLBACKEND"] = backend
            if backend:  # A program that goes on to draw by itself is to find it.
                with contextlib.suppress(ValueError, ImportError):
                    sys.modules["matplotlib"].rcParams["backend"] = backend
        yield


def _import() -> None:
    try:
        importlib.import_module("matplotlib")
    except (OSError, ValueError, KeyError):  # No folder to write to, or a matplotlibrc that is no text.
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        with _plain_surroundings():
            importlib.import_module("matplotlib")


@contextlib.contextmanager
def _plain_surroundings() -> Iterator[None]:
    """No `matplotlibrc`, and a folder that need not be written to."""
    names = ("MATPLOTLIBRC", "MPLCONFIGDIR")
    before = {name: os.environ.get(name) for name in names}
    os.environ["MATPLOTLIBRC"] = os.devnull
    try:
        os.environ["MPLCONFIGDIR"] = tempfile.gettempdir()
    except OSError:
        os.environ["MPLCONFIGDIR"] = "/dev/shm"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """matplotlib's defaults inside, whatever the user has set; nothing is logged or warned of."""
    import matplotlib as mpl

    with _LOCK, _quiet():
        # The backend is no matter of figures that bring their canvas; to set one would import it.
        names = [name for name in mpl.rcParamsDefault if not name.startswith("backend")]
        with mpl.rc_context({name: mpl.rcParamsDefault[name] for name in names}):
            yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("matplotlib")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
