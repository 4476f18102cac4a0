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
that flushes small numbers or leaves its rounding open, or float32 arithmetic; or if nothing is found in programs that
are made to hold such operations. Two things are reported apart: products of matrices of integers, in the pass for
second moments, and the generator of synthetic rows, which is float32 and stays on the CPU.
"""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import json
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ptx.compiler import Compiler, read_dump
from ptx.export import LARGE
from ptx.rules import CONTROL, KINDS, ROUNDED, UNPINNED, fault, is_float, kind_of

LAUNCH_SECONDS = 4e-6
MEMORY_BANDWIDTH = 3.352e12  # Bytes a second, of an H100 with HBM3.
MANY_BLOCKS = 64  # A kernel of fewer blocks of threads reads what others have summed.


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
    tally = Tally(about["programs"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(document(about, tally))
    print(*_verdict(tally), *tally.bad, sep="\n")
    return int(bool(tally.bad or tally.missed))


class Tally:
    """What the programs hold, by the kind of their kernels.

    Args:
        programs: of `programs.json`, with `read_dump` of each.
    """

    def __init__(self, programs: list[dict[str, Any]]):
        self.programs, self.kernels = collections.Counter[str](), collections.Counter[str]()
        self.operations = {kind: collections.Counter[str]() for kind in KINDS}
        self.faults: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self.faulty_programs: dict[str, set[int]] = {kind: set() for kind in KINDS}
        self.rows: list[str] = []
        for program in programs:
            self._add(program)

    def _add(self, program: dict[str, Any]) -> None:
        number, name, run, kernels = (program[key] for key in ("number", "name", "run", "kernels"))
        for kernel, operations in kernels.items():
            kind = kind_of(name, run, kernel)
            self.kernels[kind] += 1
            self.operations[kind] += operations
            wrong = [f"`{op}` {why}" for op in sorted(operations) if (why := fault(op, kind))]
            if wrong:
                self.faults[kind].append(f"* {name}, {run} (program {number}), {kernel}: {', '.join(wrong)}")
                self.faulty_programs[kind].add(number)
        self.programs[kind_of(name, run, "")] += 1
        self.rows.append(f"| {number} | {name} | {run} | {program['shapes']} | {len(kernels)} |")

    @property
    def rounded(self) -> int:
        """Operations of exact kernels that round float64."""
        return sum(count for op, count in self.operations["exact"].items() if op.partition(".")[0] in ROUNDED and
                   op.endswith(".f64"))  # fmt: skip

    @property
    def bad(self) -> list[str]:
        """Faults of programs that run on GPUs."""
        return self.faults["exact"] + self.faults["products"]

    @property
    def missed(self) -> int:
        """Controls that nothing was found in."""
        return self.programs[CONTROL] - len(self.faulty_programs[CONTROL])


def document(about: dict[str, Any], tally: Tally) -> str:
    """The result as Markdown."""
    besides = sorted({word for program in about["programs"] for word in program["besides"]})
    return "\n".join([
        "# Operations of the GPU programs",
        "",
        f"`scripts/ptx_check.py`, {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC, commit {about['commit']}: "
        f"{len(about['programs'])} programs of {about['runs']} runs, lowered by TensorFlow {about['tensorflow']}, "
        f"compiled for an H100 by the XLA of jaxlib {about['jaxlib']} (jax-cuda12-pjrt {about['compiler']}), "
        f"`XLA_FLAGS={about['flags']}`.",
        "",
        *_verdict(tally),
        "",
        f"Besides kernels, the programs hold {', '.join(f'`{word}`' for word in besides)}.",
        "",
        *(line for kind in KINDS[:3] for line in tally.faults[kind]),
        "",
        *_rooflines(about["programs"]),
        "## Operations on floating-point numbers",
        "",
        f"| operation | {' | '.join(KINDS)} |",
        "|---|" + "---:|" * len(KINDS),
        *_operations(tally.operations),
        "",
        "## Programs",
        "",
        "The run is the first that called it.",
        "",
        "| | program | run | arguments | kernels |",
        "|---:|---|---|---|---:|",
        *tally.rows,
        "",
    ])  # fmt: skip


def _verdict(tally: Tally) -> Iterator[str]:
    programs, kernels = tally.programs, tally.kernels
    found = "hold none of these" if not tally.bad else f"**hold some of these in {len(tally.bad)} kernels**"
    yield (
        f"**Exact arithmetic**: {programs['exact']} programs, {kernels['exact']} kernels with {tally.rounded} "
        f"operations that round float64. They {found}: a fused, an approximate or a flushed operation, one that does "
        "not name its rounding as to nearest, arithmetic in float32 (but for moves, comparisons and conversions)."
    )
    yield ""
    yield (
        f"**Products of matrices**: {kernels['products']} kernels of the pass for second moments, which the above "
        "leaves out. Tensor cores of float64 do fuse; what they multiply and add are integers whose sums do not exceed "
        "2**53, so that nothing is rounded."
    )
    yield ""
    yield (
        f"**Synthetic rows**: {programs['rows']} programs, {kernels['rows']} kernels, whose arithmetic is float32 by "
        f"specification. tapedist makes rows on the CPU, whatever trains on them; on a GPU, "
        f"{len(tally.faults['rows'])} of these kernels would not keep to it."
    )
    yield ""
    yield (
        f"**Controls**: in {programs[CONTROL] - tally.missed} of {programs[CONTROL]} programs with `exp`, quotients "
        "and roots, which are none of tapedist's, something was found. `x * x + x` without a pin "
        f"{'is fused' if tally.faults[UNPINNED] else 'is not fused either'} by this compiler."
    )
    yield ""
    yield (
        "Not shown: what `ptxas` makes of PTX (it keeps operations that name their rounding); the XLA in TensorFlow's "
        "own GPU build, which is older; kernels that are chosen by measuring on a device, as those of products are; "
        "what TensorFlow computes outside of compiled programs."
    )


def _rooflines(programs: list[dict[str, Any]]) -> Iterator[str]:
    """What a step over rows that the GPU holds must take: launches, and the time in which memory yields the rows."""
    yield "## One step over rows that the GPU holds, by the roofline"
    yield ""
    yield f"A launch takes {LAUNCH_SECONDS * 1e6:g} us, memory yields {MEMORY_BANDWIDTH / 1e12:.3g} TB/s."
    yield ""
    yield "| rows | launches | kernels that read all rows | memory alone | with launches | ratio |"
    yield "|---|---:|---:|---:|---:|---:|"
    for program in programs:
        for rows, d in LARGE:
            if program["run"] != f"{rows:,} rows, d = {d}":
                continue
            launches = program["launches"]
            passes = sum(blocks > MANY_BLOCKS for blocks in launches)
            once = rows * (d + 1) * 4 / MEMORY_BANDWIDTH
            total = len(launches) * LAUNCH_SECONDS + passes * once
            yield (
                f"| {program['run']} | {len(launches)} | {passes} | {once * 1e6:.0f} us | {total * 1e6:.0f} us | "
                f"{total / once:.2f} |"
            )
    yield ""


def _operations(counts: dict[str, collections.Counter[str]]) -> Iterator[str]:
    for name in sorted(set().union(*counts.values())):
        if is_float(name) or name.startswith("call"):
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
