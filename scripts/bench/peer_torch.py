"""PyTorch, eager, with autograd: the loop as its tutorials write it."""

from __future__ import annotations

from typing import Any

import torch
from peer import RATE, Work, make_rows, starts

VERSION = f"torch {torch.__version__}"


def make(task: dict[str, Any]) -> Work:
    n, d, batch = task["n"], task["d"], task.get("batch", task["n"])
    steps = min(task["steps"], task["at_most"])
    x, y = (torch.from_numpy(column) for column in make_rows(n, d))
    firsts = starts(n, batch, steps).tolist()
    threads = torch.get_num_threads()

    def run() -> dict[str, Any]:
        w = torch.zeros((), requires_grad=True) if d == 1 else torch.zeros(d, requires_grad=True)
        b = torch.zeros((), requires_grad=True)
        torch.set_num_threads(1 if batch <= 16_384 else threads)
        for first in firsts:
            xs, ys = x[first : first + batch], y[first : first + batch]
            r = (xs * w if d == 1 else xs @ w) + b - ys
            gw, gb = torch.autograd.grad((r * r).mean(), (w, b))
            with torch.no_grad():
                w -= RATE * gw
                b -= RATE * gb
        return {"weight": float(w.detach().ravel()[0])}

    return Work(run, scale=task["steps"] / steps, note=f"eager, {steps} steps")
