"""Which operations a kernel may hold."""

from __future__ import annotations

import re

CONTROL = "control"
UNPINNED = "unpinned"
KINDS = ("exact", "products", "rows", CONTROL, UNPINNED)
_MOMENTS = "training.moment_steps.CompiledMomentSteps._block"
ROUNDED = ("add", "sub", "mul", "div", "sqrt", "rcp")
_NOT_ROUNDED = (
    "abs", "copysign", "cvt", "ld", "max", "min", "mov", "neg", "selp", "set", "setp", "shfl", "st", "testp",
)  # fmt: skip


def kind_of(program: str, run: str, kernel: str) -> str:
    """Which rules a kernel is under."""
    if run in (CONTROL, UNPINNED):
        return run
    if program.startswith("data.synthetic."):
        return "rows"
    return "products" if program == _MOMENTS and kernel.startswith("gemm_") else "exact"


def fault(operation: str, kind: str) -> str:
    """What is wrong with a PTX operation in a kernel of a kind; empty if nothing is.

    Of operations on floating-point numbers only those known here to be right are: moves, comparisons and conversions,
    and what is rounded to nearest by its name. `ptxas` may fuse a product and a sum that do not name their rounding.
    """
    head, *words = operation.split(".")
    types = _types(operation)
    if head == "call":
        return "is a call"
    if not types or (kind == "products" and head == "mma" and types == {"f64"}):
        return ""
    if "ftz" in words:
        return "flushes"
    if {"approx", "full"} & set(words):
        return "approximates"
    if head in ("fma", "mad") or "mma" in head:
        return "fuses"
    if head in ROUNDED:
        in_float32 = kind not in ("rows", UNPINNED) and types != {"f64"}
        return "does not round to nearest" if "rn" not in words else "is not float64" if in_float32 else ""
    return "" if head in _NOT_ROUNDED else "is not known"


def is_float(operation: str) -> bool:
    """Whether it is one on floating-point numbers."""
    return bool(_types(operation))


def _types(operation: str) -> set[str]:
    return {word for word in operation.split(".") if re.fullmatch(r"(b|t)?f\d+(x\d)?|e\dm\d\w*", word)}
