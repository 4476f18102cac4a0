"""Which operations a kernel may hold."""

from __future__ import annotations

import re
from typing import Any

CONTROL = "control"
KINDS = ("exact", "products", "rows", CONTROL)
_MOMENTS = "training.moments.MomentSteps._block"
ROUNDED = ("add", "sub", "mul", "div", "sqrt", "rcp")
_NOT_ROUNDED = ("abs", "cvt", "ld", "max", "min", "mov", "neg", "selp", "set", "setp", "shfl", "st", "testp")


def kind_of(program: dict[str, Any], kernel: str) -> str:
    """Which rules a kernel is under."""
    if program["run"] == CONTROL:
        return CONTROL
    if program["name"].startswith("data.synthetic."):
        return "rows"
    return "products" if program["name"] == _MOMENTS and kernel.startswith("gemm_") else "exact"


def fault(operation: str, kind: str) -> str:
    """What is wrong with a PTX operation in a kernel of a kind; empty if nothing is.

    Of operations on floating-point numbers only those known here to be right are: moves, comparisons and conversions,
    and what is rounded to nearest by its name. `ptxas` may fuse a product and a sum that do not name their rounding.
    """
    head, *words = operation.split(".")
    types = {word for word in words if re.fullmatch(r"(b|t)?f\d+(x\d)?|e\dm\d\w*", word)}
    if head == "call":
        return "a call"
    if not types or (kind == "products" and head == "mma" and types == {"f64"}):
        return ""
    if "ftz" in words:
        return "flushed"
    if {"approx", "full"} & set(words):
        return "approximate"
    if head in ("fma", "mad") or "mma" in head:
        return "fused"
    if head in ROUNDED:
        in_float32 = kind != "rows" and types != {"f64"}
        return "not to nearest" if "rn" not in words else "not in float64" if in_float32 else ""
    return "" if head in _NOT_ROUNDED else "unknown"
