"""The result of a training run, the files and lines made from it, and advice on a better one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tapedist.config import TrainConfig
from tapedist.data import frames
from tapedist.errors import InputError
from tapedist.process import check_fork
from tapedist.regression.metric import Gap
from tapedist.regression.prediction import predict_rows
from tapedist.regression.summary import Statistics
from tapedist.results.coefficient_table import format_table
from tapedist.training.interfaces import Row
from tapedist.training.stopping import SETTLED

# The tutorial's 3,000 epochs end two or three standard errors away, which its table shows.
_FAR = 10.0
# Training on a user's rows normally ends closer.
_CLOSE = {"full_batch": 0.1, "mini_batch": 0.5}
_HARDLY_FELL = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of `train`.

    Attributes:
        parameters: float64 `[P]`, the masters: weights then bias, or the module's variables in order.
        weights: float64 `[d]` of a linear model; empty for a module.
        bias: of a linear model, its prediction where all features are 0; 0.0 without one.
        history: rows of metrics that this call recorded, in order of their steps.
        train_loss: at the final parameters in full batch, the last epoch's mean in mini batch; None if unknown.
        test_loss: at the final parameters; None without test rows.
        epochs: epochs done.
        steps: updates done.
        digest: see `training.state.digest`.
        truth: `(weights, bias)` that made synthetic rows; else None.
        feature_names: `d` names.
        target_name: name of the target.
        fit_intercept: whether a linear model has a bias.
        loss: name of the per-example loss.
        statistics: the optimum and the distance to it; None where it is unknown or the model is not linear.
        stopped: why training stopped before its last epoch; empty if it did not.
        run_dir: the run's folder, or None.
        advice: sentences on how far training ended from its optimum, and what to try; empty where it did not.
        model: the trained `tf.Module`, if one was given.
        center: float64 `[d]`, subtracted from the features in a linear model's predictions; None for zeros.
        bias_at_center: the prediction at `center`, which predictions use, because with `bias` they would cancel where
            all rows are far from 0; None for `bias`.
    """

    parameters: np.ndarray
    weights: np.ndarray
    bias: float
    history: tuple[Row, ...]
    train_loss: float | None
    test_loss: float | None
    epochs: int
    steps: int
    digest: str
    truth: tuple[tuple[float, ...], float] | None
    feature_names: tuple[str, ...]
    target_name: str
    fit_intercept: bool
    loss: str
    statistics: Statistics | None
    stopped: str
    run_dir: Path | None
    advice: tuple[str, ...] = ()
    model: Any = None
    center: np.ndarray | None = None
    bias_at_center: float | None = None

    def predict(self, x: Any) -> np.ndarray:
        """Predictions `[k]` for rows `[k, d]` in raw units; those of a linear model equal `tapedist predict`'s bits.

        Args:
            x: an array or nested lists, whose columns go by position; or a table (a DataFrame of pandas or polars, an
                Arrow table, a dict of arrays, a structured array), from which the columns are taken by name.

        Raises:
            InputError: if `x` has another shape, lacks a feature or has other values than numbers, or if a module is
                called in a fork of a process that has used TensorFlow.
        """
        frames.check_row_labels(x=x)
        x, _ = frames.matrix(x, "x", names=self.feature_names)
        d = len(self.feature_names)
        if x.ndim != 2 or x.shape[1] != d:
            one = "; one row of them is np.asarray(x).reshape(1, -1)" if x.shape == (d,) else ""
            raise InputError(f"x: has shape {list(x.shape)}; must be [rows, {d}], one column per feature{one}")
        if self.model is not None:
            check_fork()
            return np.asarray(self.model(x.astype(self.model.trainable_variables[0].dtype.as_numpy_dtype)))
        return predict_rows(x, self.weights, self._bias_at_center, self.center)

    @property
    def _bias_at_center(self) -> float:
        return self.bias if self.bias_at_center is None else self.bias_at_center

    def as_model_json(self) -> dict[str, Any]:
        """The content of `model.json`."""
        return {
            "weights": self.weights.tolist(),
            "bias": self.bias,
            "center": (np.zeros(len(self.weights)) if self.center is None else self.center).tolist(),
            "bias_at_center": self._bias_at_center,
            "parameters": self.parameters.tolist(),
            "digest": self.digest,
            "feature_names": list(self.feature_names),
            "target_name": self.target_name,
            "fit_intercept": self.fit_intercept,
            "loss": self.loss,
            **self.summary(),
            "statistics": self.statistics.as_json() if self.statistics else None,
            "advice": list(self.advice),
        }

    def summary(self) -> dict[str, Any]:
        """A summary of the training in numbers, for `model.json` and `done.json`; no NaN."""
        return {
            "epochs": self.epochs,
            "steps": self.steps,
            "train_loss": _finite(self.train_loss),
            "test_loss": _finite(self.test_loss),
            "digest": self.digest,
            "stopped": self.stopped,
        }

    def lines(self, width: int | None = None) -> list[str]:
        """The console's last lines, for a terminal of `width` columns or for a file."""
        lines = []
        if len(self.weights):
            lines.append(f"Learned W: {_numbers(self.weights)}, learned B: {self.bias:.6g}")
        if self.test_loss is not None:
            lines.append(f"Test loss: {self.test_loss:.6g}")
        if self.truth and len(self.weights):
            weights, bias = self.truth
            lines.append(
                f"True W: {_numbers(weights)}, true B: {bias:.6g}; largest error "
                f"{max(np.abs(self.weights - weights).max(), abs(self.bias - bias)):.3g}"
            )
        if self.statistics:
            found = self.statistics
            table = format_table(
                found.fit, found.learned, found.truth, parameters=found.parameters.tolist(), mae=found.mae, width=width
            )
            lines += table.split("\n")
        lines.append(f"Digest: {self.digest}")
        return lines


def _numbers(values: Sequence[float] | np.ndarray, most: int = 8) -> str:
    """`9.01`, or `[9.01, 8.99, ...]` where there are several."""
    shown = [f"{value:.6g}" for value in values[:most]]
    if len(values) == 1:
        return shown[0]
    return f"[{', '.join(shown)}{', ...' if len(values) > most else ''}]"


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def advice(config: TrainConfig, result: TrainResult, *, of_user: bool, gap: Gap | None = None) -> list[str]:
    """Sentences of advice on a finished run.

    Args:
        config: the run's settings, resolved.
        result: its result.
        of_user: whether the rows are a table, arrays or a custom source.
        gap: to the optimum of the run's own objective, where there are no statistics of squared error without penalty.
    """
    if not config.most_epochs:
        return []
    # With a penalty, training has another optimum than least squares.
    if gap is None and result.statistics is not None and not config.l2:
        learned = result.statistics.learned
        gap = Gap(learned.max_standard_errors, learned.excess_loss)
    if gap is not None and (gap.standard_errors is not None or gap.excess is not None):
        return _far_away(config, result, gap, limit=_CLOSE[config.mode] if of_user else _FAR)
    return _hardly_fell(config, result)


def _far_away(config: TrainConfig, result: TrainResult, gap: Gap, *, limit: float) -> list[str]:
    if gap.standard_errors is None or gap.standard_errors <= limit:
        return []
    where = f"training ended {gap.standard_errors:.3g} standard errors from the optimum"
    if gap.excess is not None and result.train_loss and gap.excess > 0:
        fit = result.statistics and result.statistics.fit
        least = fit.loss if fit else result.train_loss - gap.excess
        share = f" ({100 * gap.excess / least:.2g} %)" if least > 0 else ""
        where += f", its loss {gap.excess:.3g}{share} above the least"
    return [f"{where}; {_closer(config, result)}"]


def _closer(config: TrainConfig, result: TrainResult) -> str:
    """Advice on how to get closer to the optimum."""
    if result.stopped == SETTLED:
        return "rounding to float32 keeps it there; --dtype=float64 comes closer"
    if config.loss in ("squared", "huber") and config.optimizer == "sgd" and config.learning_rate != "auto":
        return "--learning_rate=auto or more --num_epochs would come closer"
    if config.optimizer != "sgd" and config.loss in ("squared", "huber"):
        return f"more --num_epochs, or --optimizer=sgd --learning_rate=auto in place of {config.optimizer}, come closer"
    if config.mode == "mini_batch" and config.loss == "squared":
        return "more --num_epochs, or --mode=full_batch, come closer"
    return "more --num_epochs would come closer"


def _hardly_fell(config: TrainConfig, result: TrainResult) -> list[str]:
    first = next((row.loss for row in result.history if row.split == "train" and row.epoch <= 1), 0.0)
    if result.stopped or result.train_loss is None or not first > 0 or config.most_epochs == 1 or config.init_from:
        return []
    fell = 1 - result.train_loss / first
    if not fell < _HARDLY_FELL:
        return []
    units = "; the target keeps its units, and steps must fit them" if config.standardizes else ""
    return [
        f"the loss fell by no more than {max(fell, 0.0):.1%}; try a higher --learning_rate or more --num_epochs{units}"
    ]
