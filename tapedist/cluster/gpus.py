"""Which GPUs each local worker sees, without TensorFlow. Two workers cannot share one: NCCL refuses it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from tapedist.errors import InputError

_LIST = ("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
_LIST_SECS = 30.0


def found_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """UUIDs of this machine's GPUs, in the driver's order; none where there is no NVIDIA driver at work."""
    try:
        done = subprocess.run(
            _LIST, capture_output=True, text=True, timeout=_LIST_SECS, env=dict(environ), stdin=subprocess.DEVNULL,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip().startswith("GPU-"))


def visible_gpus(found: Sequence[str], visible: str | None) -> tuple[str, ...]:
    """What CUDA lets a program see: the words of `visible` that name a GPU, up to the first that does not.

    Args:
        found: UUIDs of the machine's GPUs.
        visible: the value of CUDA_VISIBLE_DEVICES; None where it is not set.
    """
    if visible is None or not found:
        return tuple(found)
    words: dict[str, str] = {}  # GPU -> how it was named; one that is named twice is there once.
    for word in (part.strip() for part in visible.split(",")):
        gpu = _named(found, word)
        if gpu is None:
            break
        words.setdefault(gpu, word)
    return tuple(words.values())


def _named(found: Sequence[str], word: str) -> str | None:
    """The GPU that `word` names: by its number, by the beginning of its UUID, or as a part of one (MIG)."""
    if word.isascii() and word.isdigit():
        return f"number {int(word)}" if int(word) < len(found) else None
    if word.startswith("MIG-"):
        return word
    matching = [uuid for uuid in found if word.startswith("GPU-") and uuid.startswith(word)]
    return matching[0] if len(matching) == 1 else None


def shares(visible: Sequence[str], *, workers: int, per_worker: int) -> list[dict[str, str]]:
    """What is added to the environment of each of `workers`, so that each has GPUs of its own; nothing without GPUs.

    Args:
        visible: the GPUs that a program sees here, as CUDA_VISIBLE_DEVICES names them.
        workers: how many.
        per_worker: GPUs of each; 0 divides them evenly.

    Raises:
        InputError: if there are too few of them.
    """
    if not per_worker and (not visible or workers == 1):
        return [{}] * workers
    share = per_worker or len(visible) // workers
    if not visible:
        raise InputError(f"--gpus_per_worker={per_worker}: there is no GPU here; use --gpus_per_worker=0")
    if not 0 < share * workers <= len(visible):
        raise InputError(
            f"--num_workers={workers}{f' --gpus_per_worker={per_worker}' if per_worker else ''}: there are "
            f"{len(visible)} GPU(s) here, and two workers cannot share one; use {_that_fits(len(visible), workers)}, "
            "or set CUDA_VISIBLE_DEVICES=-1 and --gpus_per_worker=0 to train on CPUs"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible[i * share : (i + 1) * share])} for i in range(workers)]


def _that_fits(gpus: int, workers: int) -> str:
    if gpus >= workers:
        return f"--gpus_per_worker={gpus // workers}"
    return f"--num_workers={gpus} --gpus_per_worker=1"
