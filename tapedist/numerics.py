"""What must be set before TensorFlow is imported: XLA's flags and quiet logs.

Every module that imports TensorFlow imports this one first. What the user already set is respected, and of XLA's flags
those are added that he did not set. XLA reads them once, when it first compiles, so a program that imported TensorFlow
earlier is usually still in time.

* `tree_reduction_rewriter` turns a long sum on the CPU into a tree of windows that is several times slower than the
  plain vectorised loop.
* Multi-threaded Eigen products split their inner dimension by the number of threads, so their bits would depend on it.
  The flag does not reach all of them: `row_sums.PIECE_ROWS` sees to the rest. tapedist runs several blocks side by side
  instead.
* For the same reason no fusion is split over threads (`cpu-parallel-task-assigner`): handing a few microseconds of work
  to another thread takes longer than doing it.
* XLA prefers vectors of 256 bits. Where a processor was measured to be faster with others, those are asked for; no
  result depends on them.
"""

from __future__ import annotations

import itertools
import os

from tapedist import own_matplotlib, without_keras

# Bits of vectors, by vendor and family of processors that have them: Zen 4 and 5 (`scripts/bench/limits.md`).
_VECTOR_BITS = {("AuthenticAMD", "25"): 512, ("AuthenticAMD", "26"): 512}


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


os.environ["XLA_FLAGS"] = _completed(os.environ.get("XLA_FLAGS", ""))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Keras, which TensorFlow brings along, imports matplotlib, and fails where that does.
if not without_keras.is_left_out():
    with own_matplotlib.importable():
        pass
