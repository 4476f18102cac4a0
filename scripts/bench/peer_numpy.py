"""NumPy: blocks that stay in cache, buffers made once, sums as dot products."""

from __future__ import annotations

from typing import Any

import numpy as np
from peer import RATE, Work, make_rows, starts

VERSION = f"numpy {np.__version__}"
_BLOCK_BYTES = 256 * 1024


def make(task: dict[str, Any]) -> Work:
    if task["kind"] == "moments":
        return _normal_equations(task)
    if task["kind"] == "fresh":
        return _fresh(task)
    n, d, batch = task["n"], task["d"], task.get("batch", task["n"])
    x, y = make_rows(n, d)
    firsts = starts(n, batch, task["steps"])

    def run() -> dict[str, Any]:
        w, b = np.zeros(d, np.float32), np.float32(0)
        for first in firsts:
            gw, gb = _gradient(x[first : first + batch], y[first : first + batch], w, b)
            w, b = w - RATE * 2 * gw / batch, np.float32(b - RATE * 2 * gb / batch)
        return {"weight": float(w[0])}

    return Work(run)


def _gradient(x: np.ndarray, y: np.ndarray, w: np.ndarray, b: np.float32) -> tuple[np.ndarray, float]:
    rows = max(64, _BLOCK_BYTES // 4 // w.size)
    gw, gb, loss = np.zeros(w.size), 0.0, 0.0
    buffer = np.empty(min(rows, len(y)), np.float32)
    for first in range(0, len(y), rows):
        xs, ys = x[first : first + rows], y[first : first + rows]
        r = buffer[: len(ys)]
        if w.size == 1:
            np.multiply(xs, w[0], out=r)
        else:
            np.matmul(xs, w, out=r)
        r += b
        r -= ys
        gw += r @ xs
        gb += float(r.sum())
        loss += float(r @ r)
    return gw.astype(np.float32), gb


def _normal_equations(task: dict[str, Any]) -> Work:
    """Least squares by centred normal equations in float64, straight from BLAS and LAPACK."""
    x, y = make_rows(task["n"], task["d"], "float64")

    def run() -> dict[str, Any]:
        mean, center = x.mean(0), y.mean()
        gram = x.T @ x - len(y) * np.outer(mean, mean)
        w = np.linalg.solve(gram, x.T @ y - len(y) * mean * center)
        return {"weight": float(w[0])}

    return Work(run)


def _fresh(task: dict[str, Any]) -> Work:
    """Mini-batches of new rows: a superbatch of normals at a time, on one core."""
    batch, steps = task["batch"], task["steps"]
    per_call = max(1, 2**17 // batch)

    def run() -> dict[str, Any]:
        generator = np.random.Generator(np.random.SFC64(0))
        w, b = np.zeros(1, np.float32), np.float32(0)
        for step in range(steps):
            if step % per_call == 0:
                z = generator.standard_normal((2, per_call * batch), dtype=np.float32)
                y = 9 * z[0] - 2 + z[1]
            at = step % per_call * batch
            gw, gb = _gradient(z[0, at : at + batch], y[at : at + batch], w, b)
            w, b = w - RATE * 2 * gw / batch, np.float32(b - RATE * 2 * gb / batch)
        return {"weight": float(w[0])}

    return Work(run, note="SFC64, one core")
