#!/usr/bin/env python3
"""Compiles the programs of the exact arithmetic for an H100, without one, and reads what operations they hold.

    python scripts/ptx_check.py export FOLDER                        where TensorFlow and tapedist are
    python scripts/ptx_check.py compile FOLDER --output=RESULT.md    where JAX and its CUDA compiler are

Two environments, because TensorFlow can lower a program for a GPU that is not there, but has no compiler for one in its
wheel for CPUs. That is in JAX's plugin, which compiles from a description of a device; no driver is needed, and none
of NVIDIA's libraries:

    pip install --target=DIR --no-deps jax==0.10.2 jaxlib==0.10.2 jax-cuda12-pjrt==0.10.2 \\
        numpy scipy ml_dtypes opt_einsum
    PYTHONPATH=DIR python scripts/ptx_check.py compile ...

`export` trains small runs of every engine and writes each program that XLA compiled for them. `compile` writes the
document. Exit status 1 if a program of the exact arithmetic holds a fused multiply-add, an approximation, an operation
that flushes small numbers or leaves its rounding open, or float32 arithmetic.
"""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import json
import os
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ptx.compiler import Compiler, read_dump
from ptx.rules import CONTROL, KINDS, ROUNDED, fault, kind_of


def compile_all(folder: Path, output: Path) -> int:
    """Compiles what `export` wrote, and writes the document; returns the exit status."""
    about = json.loads((folder / "programs.json").read_text())
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{about['flags']} --xla_dump_to={folder / 'unnamed'}"}
    compiler = Compiler()
    for program in about["programs"]:
        dump = folder / f"{program['number']:03}"
        compiler.compile((folder / f"{dump.name}.hlo.pb").read_bytes(), dump)
        program |= read_dump(dump)
        print(f"{dump.name} {program['name']}: {len(program['kernels'])} kernels", flush=True)
    about["jaxlib"], about["compiler"] = metadata.version("jaxlib"), metadata.version("jax-cuda12-pjrt")
    text, failed = document(about)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(text)
    return int(failed)


def document(about: dict[str, Any]) -> tuple[str, bool]:
    """The result as Markdown, and whether it is a bad one."""
    counts: collections.defaultdict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults, rows, kernels, numbers = [], [], collections.Counter[str](), collections.Counter[str]()
    for program in about["programs"]:
        mine = []
        for kernel, operations in program["kernels"].items():
            kind = kind_of(program, kernel)
            kernels[kind] += 1
            counts[kind] += operations
            wrong = [f"`{op}` ({fault(op, kind)})" for op in operations if fault(op, kind)]
            mine += [f"{kernel}: {', '.join(wrong)}"] if wrong else []
        kind = kind_of(program, "")
        numbers[kind] += 1
        cells = program["number"], program["name"], kind, program["run"], program["shapes"], len(program["kernels"])
        rows.append("| " + " | ".join(map(str, (*cells, len(mine)))) + " |")
        faults += [(kind, f"* {program['number']} {program['name']}, {program['run']}: {line}") for line in mine]
    bad = [line for kind, line in faults if kind != CONTROL]
    missed = numbers[CONTROL] - len({line.split()[1] for kind, line in faults if kind == CONTROL})
    besides = sorted({word for program in about["programs"] for word in program["besides"]})
    lines = [
        *_verdict(about, numbers, kernels, counts, bad, missed),
        f"Besides kernels, the programs hold: {', '.join(f'`{word}`' for word in besides)}.",
        "", *bad, *[""] * bool(bad),
        "## Operations on floating-point numbers", "",
        f"| operation | {' | '.join(KINDS)} |", "|---|" + "---:|" * len(KINDS),
        *_operations(counts),
        "", "## Programs", "", "The run is the first that called it. Faults are kernels.", "",
        "| | program | rules | run | arguments | kernels | faults |", "|---:|---|---|---|---|---:|---:|", *rows, "",
    ]  # fmt: skip
    return "\n".join(lines), bool(bad or missed)


def _verdict(
    about: dict[str, Any],
    numbers: collections.Counter[str],
    kernels: collections.Counter[str],
    counts: dict[str, collections.Counter[str]],
    bad: list[str],
    missed: int,
) -> list[str]:
    rounded = sum(count for name, count in counts["exact"].items() if name.split(".")[0] in ROUNDED and "f64" in name)
    said = "hold no" if not bad else f"**hold, in {len(bad)} kernels, a**"
    return [
        "# Operations of the GPU programs",
        "",
        f"`scripts/ptx_check.py`, {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC, commit {about['commit']}: "
        f"{about['runs']} runs of TensorFlow {about['tensorflow']}, compiled for an H100 by the XLA of jaxlib "
        f"{about['jaxlib']} (jax-cuda12-pjrt {about['compiler']}), `XLA_FLAGS={about['flags']}`.",
        "",
        f"The {numbers['exact']} programs of the exact arithmetic ({kernels['exact']} kernels, {rounded} operations "
        f"that round float64) {said} fused, approximate or flushed operation, none whose rounding is not by its name "
        f"to nearest, and no float32 arithmetic but comparisons, moves and conversions. So do the {numbers['rows']} "
        f"programs of synthetic rows ({kernels['rows']} kernels), whose arithmetic is specified in float32. "
        f"{kernels['products']} kernels are products of matrices in the pass for second moments: float64 tensor cores "
        "fuse, but multiply and add integers whose sums stay below 2**53, so that nothing is rounded.",
        "",
        f"Of {numbers[CONTROL]} controls, which are no programs of tapedist and hold `exp`, {missed} were not found "
        "fault with.",
        "",
        "Not shown: what `ptxas` makes of it (it keeps operations that name their rounding), the XLA of TensorFlow's "
        "own GPU build, which is older, kernels that are chosen by measuring on a device (products of matrices), and "
        "what TensorFlow computes outside of compiled programs.",
        "",
    ]


def _operations(counts: dict[str, collections.Counter[str]]) -> Iterator[str]:
    for name in sorted({name for kind in KINDS for name in counts[kind]}):
        if any(re.fullmatch(r"(b|t)?f\d+(x\d)?", word) for word in name.split(".")) or name.startswith("call"):
            yield f"| `{name}` | {' | '.join(str(counts[kind][name] or '') for kind in KINDS)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "compile"))
    parser.add_argument("folder", type=Path, help="of the programs")
    parser.add_argument("--output", type=Path, help="the document")
    told = parser.parse_args()
    if told.what == "export":
        from ptx.export import export

        export(told.folder)
        return 0
    return compile_all(told.folder, told.output)


if __name__ == "__main__":
    sys.exit(main())
