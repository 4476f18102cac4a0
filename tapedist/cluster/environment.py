"""The environment of a run, stored in `env.json`; exact sums do not depend on it, fast ones and custom models' do."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.runtime_flags import flags_in_use
from tapedist.version import __version__


def numerics_class() -> dict[str, Any]:
    """Versions, flags and kind of device: with equal ones, results have equal bits under any arithmetic."""
    kinds = sorted({device.device_type for device in tf.config.list_physical_devices()})
    gpus = tf.config.list_physical_devices("GPU")
    accelerators = sorted({str(tf.config.experimental.get_device_details(g).get("device_name")) for g in gpus})
    return {
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "xla_flags": flags_in_use(),
        "machine": platform.machine(),
        "instruction_sets": _instruction_sets(),
        "device_kinds": kinds,
        "accelerators": accelerators,
    }


def environment(
    strategy: tf.distribute.Strategy, *, choice: str, devices: Sequence[str], arithmetic: str
) -> dict[str, Any]:
    """`numerics_class`, and further facts about the run."""
    return {
        **numerics_class(),
        "arithmetic": arithmetic,
        "tapedist": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "strategy": choice,
        "replicas": strategy.num_replicas_in_sync,
        "devices": list(devices),
    }


def _instruction_sets() -> list[str]:
    """Vector extensions that compiled code may use; empty where the system does not list them."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return []
    return sorted(set(flags.split()) & {"avx", "avx2", "fma", "avx512f", "avx512vl", "asimd", "sve"})
