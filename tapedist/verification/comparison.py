"""Comparison of stored numbers with recomputed ones, bit for bit.

Legend: `P` parameters, `s` slots, `c` columns of second moments (the features, the target, ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tapedist import reference
from tapedist.errors import StateError
from tapedist.run.saved_run import from_arrays
from tapedist.storage.checkpoints import Checkpoint
from tapedist.storage.model_file import FittedModel
from tapedist.training.state import digest
from tapedist.verification.recomputation import Moment, Recomputation

_LOW_BITS = 27  # Of the lower halves of sums in checkpoints.
_SLICE_BITS, _SLICES = 21, 3


def check_same(where: str, names: Sequence[str], stored: Any, recomputed: Any) -> None:
    """Raises unless numbers have the same bits.

    Args:
        where: the file and the step, for the message.
        names: of the numbers, for the message.
        stored: float64 `[k]`, or `[k]` integers.
        recomputed: likewise.

    Raises:
        StateError: with the first that differs.
    """
    if len(stored) != len(recomputed):
        raise StateError(f"differs: {where}: {len(stored)} numbers stored, {len(recomputed)} recomputed")
    for name, old, new in zip(names, stored, recomputed, strict=True):
        if _bits(old) != _bits(new):
            raise StateError(f"differs: {name} of {where}: stored {_text(old)}, recomputed {_text(new)}")


def _bits(number: Any) -> Any:
    # By bytes, so that NaN equals NaN, and -0.0 does not equal 0.0.
    return np.float64(number).tobytes() if isinstance(number, (float, np.floating)) else number


def _text(number: Any) -> str:
    return repr(float(number)) if isinstance(number, (float, np.floating)) else str(number)


def check_checkpoint(checkpoint: Checkpoint, moment: Moment, run: Recomputation) -> str:
    """Compares a stored state, and its sums of an unfinished pass, with the recomputed ones; returns a summary.

    Raises:
        StateError: with the first number that differs.
    """
    state, progress = from_arrays(checkpoint.arrays)
    where = f"{checkpoint.path.name} after {moment.step} updates"
    names = _parameter_names(run)
    slots = [f"slot {number} of {name}" for number in range(len(moment.at.slots)) for name in names]
    check_same(where, [*names, *slots], state.vector, moment.vector)
    check_same(where, ["the first epoch's loss"], [state.first_loss], [moment.first_loss])
    sums = ["the epoch's sum of losses", "the epoch's sum of weights", "the epoch's penalty"]
    check_same(where, sums, state.epoch_sums, moment.epoch_sums)
    return f"{len(state.vector)} numbers after {moment.step} updates{_check_progress(where, progress, moment, run)}"


def check_path(where: str, theta: np.ndarray, moment: Moment, run: Recomputation) -> None:
    """Compares the parameters of an earlier epoch in a checkpoint with the recomputed ones."""
    check_same(f"the path in {where} after {moment.step} updates", _parameter_names(run), theta, moment.at.theta)


def check_model(model: FittedModel, moment: Moment, run: Recomputation) -> None:
    """Compares `model.json` with the end of the run.

    Raises:
        StateError: with the first number that differs.
    """
    where, units, d = f"model.json after {moment.step} updates", run.objective.units, len(model.weights)
    parameters = units.to_raw(moment.at.theta)
    names = _parameter_names(run)
    check_same(where, names, model.parameters, parameters)
    check_same(where, names[:d], model.weights, parameters[:d])
    check_same(where, ["bias"], [model.bias], [float(parameters[d]) if len(parameters) > d else 0.0])
    check_same(where, ["digest"], [model.digest], [digest(parameters)])
    center, at_center = units.at_center(moment.at.theta)
    at_center = model.bias if at_center is None else at_center
    center = np.zeros(d) if center is None else center
    check_same(where, [f"center of {name}" for name in names[:d]], model.center, center)
    check_same(where, ["bias_at_center"], [model.bias_at_center], [at_center])
    content = model.content
    losses = [loss if loss is not None and np.isfinite(loss) else None for loss in run.losses(moment)]
    check_same(where, ["train_loss", "test_loss"], [content["train_loss"], content["test_loss"]], losses)
    check_same(where, ["epochs"], [content["epochs"]], [moment.step // run.per_epoch])


def _parameter_names(run: Recomputation) -> list[str]:
    names = [f"weight of {name}" for name in run.objective.source.feature_names]
    return [*names, "bias"][: run.objective.num_parameters]


def _check_progress(where: str, progress: dict[str, np.ndarray], moment: Moment, run: Recomputation) -> str:
    """Compares the exact sums of a whole pass, or of the rows that it has visited; returns a summary."""
    if "moments" in progress:
        _check_moments(where, progress["moments"], run.integers, run)
        return f", second moments of {run.train.num_rows} rows"
    if "sums" not in progress:
        return ""
    visited = list(_visited(progress["remaining"], run.train.num_rows))
    chunks = (chunk for part in visited for chunk in run.train.chunks(part))
    summary = f", sums of {sum(map(len, visited))} rows of the next pass"
    if run.engine == "moments":
        _check_moments(where, progress["sums"], reference.moment_integers(chunks, run.columns), run)
        return summary
    found = reference.totals(moment.at.theta, chunks, run.train.bounds, run.problem)
    weights = [] if run.train.bounds.w is None else found.weight.ravel().tolist()
    numbers = [*found.gradient.ravel().tolist(), *weights, *found.loss.ravel().tolist(), found.rows]
    names = [f"sum {number} of the pass under way" for number in range(len(numbers))]
    check_same(where, names, _whole(progress["sums"]), numbers)
    return summary


def _visited(remaining: np.ndarray, num_rows: int) -> list[range]:
    """The rows that are in none of the ranges `[k, 2]`."""
    ends = [0, *remaining.ravel().tolist(), num_rows]
    return [range(first, end) for first, end in zip(ends[::2], ends[1::2], strict=True) if first < end]


def _whole(sums: np.ndarray) -> list[int]:
    """Sums of halves `[2, K]` as integers."""
    return [(high << _LOW_BITS) + low for high, low in zip(*sums.tolist(), strict=True)]


def _check_moments(where: str, sums: np.ndarray, recomputed: np.ndarray, run: Recomputation) -> None:
    weighted = run.train.bounds.w is not None
    names = [*run.objective.source.feature_names, "the target", "1"]
    pairs = [(i, j) for j in range(len(names)) for i in range(j + 1)]
    stored = _moment_integers(sums, len(names) - 1, weighted=weighted)
    labels = [f"the second moment of {names[i]} and {names[j]}" for i, j in pairs]
    check_same(where, labels, [stored[pair] for pair in pairs], [recomputed[pair] for pair in pairs])


def _moment_integers(sums: np.ndarray, count: int, *, weighted: bool) -> np.ndarray:
    """The integers `[c, c]` of the reference from a checkpoint's `[2, M]`, `c = count + 1`; above the diagonal.

    A checkpoint has the products of slices, each of which stands for its mirror image, too, if there are no weights;
    the slices' sums, with weights followed by those of the weights; and the rows.
    """
    # The format is written out again rather than imported, so that the check shares no code with the sums.
    numbers = np.array(_whole(sums), object)
    pairs = [(a, b) for a in range(_SLICES) for b in range(_SLICES - a) if weighted or a <= b]
    products, slices, rows = np.split(numbers, [len(pairs) * count**2, len(numbers) - 1])
    found = np.zeros([count + 1, count + 1], object)
    for (a, b), product in zip(pairs, products.reshape(-1, count, count), strict=True):
        both = product if weighted or a == b else product + product.T
        found[:count, :count] += both * 2 ** (_SLICE_BITS * (2 - a - b))
    # The ones' only slice is 2**20.
    for a, part in enumerate(slices.reshape(_SLICES, -1)):
        found[: len(part), count] += part * 2 ** (_SLICE_BITS * (2 - a) + 20)
    if not weighted:
        found[count, count] = rows[0] * 2**82
    return found
