"""When a run has diverged: its loss or an update is not finite, or the loss is a million times the first."""

from __future__ import annotations

import math

import numpy as np

from tapedist.errors import DivergedError

_FACTOR = 1e6


def loss_limit(first_loss: float) -> float:
    """What a loss must not pass; no bound before the first is known (NaN), or where it is nothing to measure by."""
    return _FACTOR * first_loss if first_loss > 0 else math.inf


def diverged(step: int, losses: np.ndarray, *, limit: float, known: float) -> DivergedError:
    """The error for a call whose last step failed.

    Args:
        step: updates applied.
        losses: the call's losses, the failed step's last.
        limit: what the loss must not pass.
        known: the last loss of the calls before; NaN if there was none.
    """
    last, before = float(losses[-1]), np.append(known, losses[:-1])
    before = before[np.isfinite(before)]
    if not math.isfinite(last):
        what = f"the loss is {last}"
    elif last > limit:
        what = f"the loss reached {last:.6g}, a million times the first"
    else:
        what = f"the next parameters would not be finite (the loss is {last:.6g})"
    told = f"; the last good loss was {before[-1]:.6g}" if len(before) else ""
    return DivergedError(f"diverged after {step} updates: {what}{told}")
