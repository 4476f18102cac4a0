"""What must be settled before TensorFlow and matplotlib are imported: XLA's flags, quiet logs, Keras, figure settings.

The package sets the flags when it is imported, once. What the user already set is respected, and of XLA's flags those
are added that he did not set. XLA reads them when it first compiles, so a program that imported TensorFlow earlier is
usually still in time.

* `tree_reduction_rewriter` turns a long sum on the CPU into a tree of windows that is several times slower than the
  plain vectorised loop.
* Multi-threaded Eigen products split their inner dimension by the number of threads, so their bits would depend on it.
  The flag does not reach all of them: `tape_sums.PIECE_ROWS` sees to the rest. tapedist runs several blocks side by
  side instead.
* For the same reason no fusion is split over threads (`cpu-parallel-task-assigner`): handing a few microseconds of work
  to another thread takes longer than doing it.
* XLA prefers vectors of 256 bits. Where a processor was measured to be faster with others, those are asked for; no
  result depends on them.

Keras, which TensorFlow imports at its end, takes almost as long to import as all the rest. It also imports matplotlib,
which fails where `MPLBACKEND` or `matplotlibrc` cannot be used. So commands go without Keras, and elsewhere a finder on
`sys.meta_path` imports matplotlib before Keras does.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import itertools
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from typing import Any

# Bits of vectors, by vendor and family of processors that have them: Zen 4 and 5 (`scripts/bench/limits.md`).
_VECTOR_BITS = {("AuthenticAMD", "25"): 512, ("AuthenticAMD", "26"): 512}
# What TensorFlow imports at its end, for what Keras registers with it, and goes on without if it cannot.
_EAGER = ("keras.src", "tf_keras.src")
_MATPLOTLIB = threading.RLock()  # Its settings are those of the process.


def _vector_bits(cpuinfo: str = "/proc/cpuinfo") -> int:
    """Of the vectors that this processor is the fastest with, if it is in the table; 0 if XLA is to choose."""
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as file:
            lines = itertools.takewhile(str.strip, file)  # Of the first core.
            facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    except OSError:
        return 0
    bits = _VECTOR_BITS.get((facts.get("vendor_id", ""), facts.get("cpu family", "")), 0)
    return bits if "avx512f" in facts.get("flags", "").split() else 0


XLA_FLAGS = (
    "--xla_disable_hlo_passes=tree_reduction_rewriter,cpu-parallel-task-assigner --xla_cpu_multi_thread_eigen=false"
) + (f" --xla_cpu_prefer_vector_width={bits}" if (bits := _vector_bits()) else "")

_in_use = ""


def _completed(flags: str) -> str:
    """`flags`, and those of ours that are not among them."""
    words = flags.split()
    if words and not words[0].startswith("-"):  # The name of a file that holds them.
        return flags
    names = {word.partition("=")[0] for word in words}
    missing = [word for word in XLA_FLAGS.split() if word.partition("=")[0] not in names]
    return " ".join(filter(None, [flags.strip(), *missing]))


def flags_in_use() -> str:
    """The flags that XLA reads, to be asked for before it first compiles; a change after that is none."""
    global _in_use
    if not _in_use:
        _in_use = os.environ["XLA_FLAGS"] = _completed(os.environ.get("XLA_FLAGS", ""))
    return _in_use


class _BeforeKeras(importlib.abc.MetaPathFinder):
    """Is asked when Keras is about to be imported; finds nothing, so that the finders after it do."""

    left_out = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name not in _EAGER:
            return
        if not self.left_out:
            with matplotlib_importable():
                return
        # Only while TensorFlow itself is being imported; afterwards Keras is there for whoever asks, as `tf.keras` too.
        if "tensorflow" in sys.modules and not hasattr(sys.modules["tensorflow"], "__all__"):
            raise ModuleNotFoundError(f"{name} is left out", name=name)


_BEFORE_KERAS = _BeforeKeras()


@contextlib.contextmanager
def keras_left_out() -> Iterator[None]:
    """An `import tensorflow` inside imports no Keras.

    For a process whose TensorFlow is ours: a program that imports tapedist finds TensorFlow as it always is.
    """
    _BEFORE_KERAS.left_out = True
    try:
        yield
    finally:
        _BEFORE_KERAS.left_out = False


@contextlib.contextmanager
def matplotlib_importable() -> Iterator[None]:
    """Imports matplotlib, which fails by itself where `MPLBACKEND` or `matplotlibrc` cannot be used or no folder be
    written. Import what needs it inside.
    """
    with _MATPLOTLIB, _quiet():
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
def default_figure_settings() -> Iterator[None]:
    """matplotlib's defaults inside, whatever the user has set; nothing is logged or warned of."""
    import matplotlib as mpl

    with _MATPLOTLIB, _quiet():
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


os.environ["XLA_FLAGS"] = _completed(os.environ.get("XLA_FLAGS", ""))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
sys.meta_path.insert(0, _BEFORE_KERAS)
