"""XLA's compiler for a GPU that is not there, and what it wrote."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

_H100 = """
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3" dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 memory_bandwidth: 3352000000000
  device_memory_size: 84978434048 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
}
"""
# In PTX, with its modifiers; behind a predicate, or in the braces of a scope.
_OPERATION = re.compile(r"(?:^|[;{}])\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)(?=[\s;])", re.MULTILINE)
_LAUNCH = re.compile(r"kCustomKernel [^\n]*\] (\w+) grid:")


class Compiler:
    """XLA's compiler for an H100; its parts have no public names, so that the version of JAX is a fixed one."""

    def __init__(self) -> None:
        from jax._src.lib import xla_client
        from jax.experimental import topologies

        one = topologies.get_topology_desc("h100", platform="cuda", target_config=_H100, topology="1x1x1")
        self._device, self._client = one.devices[0], xla_client

    def compile(self, program: bytes, dump: Path) -> None:
        """Compiles serialized HLO; PTX and the sequence of kernels are dumped."""
        import numpy as np
        from jax._src.interpreters import mlir
        from jax._src.lib import _jax
        from jax._src.lib.mlir import ir

        options = self._client.CompileOptions()
        options.num_replicas = options.num_partitions = 1
        options.device_assignment = self._client.DeviceAssignment.create(np.array([[self._device.id]]))
        options.executable_build_options.debug_options.xla_dump_to = str(dump)
        text = _jax.mlir.hlo_to_stablehlo(program)
        with mlir.make_ir_context():
            module = ir.Module.parse(text)
        self._device.client.compile(module, self._client.DeviceList((self._device,)), options)


def read_dump(folder: Path) -> dict[str, Any]:
    """The kernels of a program with the counts of their operations, and what it does besides launching them.

    Raises:
        ValueError: if there is no PTX of a kernel that it launches.
    """
    found: dict[str, collections.Counter[str]] = {}
    for file in sorted(folder.glob("*.ptx")):
        text = re.sub(r"//[^\n]*", "", file.read_text())
        for part in re.split(r"\.(?:entry|func)\b", text)[1:]:
            name = re.search(r"(\w+)\(", part)[1]  # type: ignore[index]
            found[name] = collections.Counter(_OPERATION.findall(part[part.index("{") :]))
    thunks = "".join(file.read_text() for file in folder.glob("*thunk_sequence.txt"))
    missing = set(_LAUNCH.findall(thunks)) - set(found)
    if missing or len(_LAUNCH.findall(thunks)) != thunks.count("kCustomKernel") or not thunks:
        raise ValueError(f"{folder}: no PTX of a kernel {sorted(missing)}")
    return {
        "launches": _launches(thunks),
        "kernels": found,
        "besides": sorted(set(re.findall(r"\b(k[A-Z]\w+)", thunks)) - {"kCustomKernel"}),
    }


def _launches(thunks: str) -> list[int]:
    """Blocks of threads of what a trip of the first innermost loop launches, its condition first; copies have none."""
    before, found, deepest = "", [], 0
    for line in thunks.splitlines():
        depth = len(line) - len(line.lstrip())
        kind = re.match(r"\s*\d+: (k\w+)", line)
        if kind and kind[1] == "kWhile":
            before, found, deepest = line, [], depth
        elif kind and before and depth > deepest:
            found.append(int((re.search(r"grid: \[(\d+)", line) or [0, 0])[1]))
        elif kind and found:
            break
    return found
