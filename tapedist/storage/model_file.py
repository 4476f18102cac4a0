"""`model.json`: a fitted linear model as plain numbers, written by training and read by every later command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tapedist.errors import InputError, StateError
from tapedist.regression.prediction import IntervalShape, predict_rows
from tapedist.storage.run_folder import RunFolder
from tapedist.text import display
from tapedist.training.state import digest

_NEEDED = ("weights", "bias", "parameters", "digest", "feature_names", "target_name")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FittedModel:
    """A linear model of a finished run, in raw units.

    Attributes:
        weights: float64 `[d]`.
        bias: the prediction where all features are 0; 0.0 if the model has none.
        center: float64 `[d]`, subtracted from the features to predict; zeros for a file of version 0.1, without one.
        bias_at_center: the prediction there; `bias` for such a file.
        parameters: float64 `[P]`: the weights, then the bias if there is one.
        digest: of the parameters.
        feature_names: `d` columns, in the order of the weights.
        target_name: the column that is predicted.
        content: the whole file.
    """

    weights: np.ndarray
    bias: float
    center: np.ndarray
    bias_at_center: float
    parameters: np.ndarray
    digest: str
    feature_names: tuple[str, ...]
    target_name: str
    content: dict[str, Any]

    @property
    def fit_intercept(self) -> bool:
        return len(self.parameters) > len(self.weights)

    @property
    def statistics(self) -> dict[str, Any] | None:
        """The result of `Statistics.as_json`; None if the run has none."""
        return self.content.get("statistics")

    @property
    def interval(self) -> IntervalShape | None:
        """The shape of prediction intervals; None if the run has none."""
        shape = (self.statistics or {}).get("interval")
        return None if shape is None else IntervalShape.from_json(shape)

    def predict(self, x: Any) -> np.ndarray:
        """Predictions float64 `[k]` for rows `[k, d]`, in raw units."""
        return predict_rows(x, self.weights, self.bias_at_center, self.center)


def read_content(path: Path, *, run_dir: Path) -> dict[str, Any]:
    """Reads `model.json` of any model.

    Args:
        path: the file.
        run_dir: the run, for messages.

    Raises:
        InputError: if the run is not finished.
        StateError: if the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in _NEEDED if name not in content]
    except FileNotFoundError:
        raise InputError(f"--run_dir={str(run_dir)!r}: holds no finished training; run tapedist train there") from None
    except (OSError, ValueError, TypeError) as error:
        raise StateError(f"{path}: cannot be read ({error}); restore it, or train again") from None
    if missing:
        raise StateError(f"{path}: is not what training writes (no {missing[0]}); restore it, or train again")
    return content


def read_model(path: Path, *, run_dir: Path) -> FittedModel:
    """Reads and checks a linear model.

    Args:
        path: the file.
        run_dir: the run, for messages.

    Raises:
        InputError: if the run has no fitted linear model.
        StateError: if the file is damaged.
    """
    content = read_content(path, run_dir=run_dir)
    try:
        model = FittedModel(
            weights=np.asarray(content["weights"], np.float64),
            bias=float(content["bias"]),
            center=np.asarray(content.get("center", np.zeros(len(content["weights"]))), np.float64),
            bias_at_center=float(content.get("bias_at_center", content["bias"])),
            parameters=np.asarray(content["parameters"], np.float64),
            digest=content["digest"],
            feature_names=tuple(content["feature_names"]),
            target_name=content["target_name"],
            content=content,
        )
    except (TypeError, ValueError) as error:
        raise StateError(f"{path}: is not what training writes ({error!r}); restore it, or train again") from None
    if not len(model.weights):
        raise InputError(
            f"--run_dir={str(run_dir)!r}: its model is not linear; only the program that built it can use it"
        )
    # The digest is of `parameters`; the weights and the bias are stored again for readers, and must be the same.
    expected = np.append(model.weights, model.bias) if model.fit_intercept else model.weights
    bias_agrees = model.fit_intercept or model.bias == 0
    if digest(model.parameters) != model.digest or not np.array_equal(expected, model.parameters) or not bias_agrees:
        raise StateError(f"{path}: its parameters do not match its digest; restore it, or train again")
    if len(model.feature_names) != len(model.weights):
        raise StateError(f"{path}: names {len(model.feature_names)} features for {len(model.weights)} weights")
    if not _center_agrees(model):
        raise StateError(f"{path}: its center and bias_at_center do not lead to its bias; restore it, or train again")
    return model


def _center_agrees(model: FittedModel) -> bool:
    """Returns whether `bias_at_center` is `bias + center . weights` but for two roundings."""
    # The digest covers the weights and the bias, so this covers the other two.
    # In fractions, because float64 would cancel where the center is large: times in microseconds, for example.
    center, at_center, bias = model.center, model.bias_at_center, model.bias
    if center.shape != model.weights.shape or not np.isfinite([*center, *model.weights, at_center, bias]).all():
        return False
    products = (Fraction(c) * Fraction(w) for c, w in zip(center.tolist(), model.weights.tolist(), strict=True))
    gap = abs(Fraction(at_center) - sum(products, Fraction(bias)))
    return gap <= Fraction(math.ulp(at_center)) + Fraction(math.ulp(bias))


def find_start(run_dir: str) -> FittedModel:
    """Reads the model of `--init_from`.

    Raises:
        InputError: if there is no such run, or its model is not linear.
        StateError: if its model is damaged.
    """
    try:
        folder = RunFolder.find(run_dir)
        return read_model(folder.model, run_dir=folder.root)
    except InputError as error:
        raise InputError(*(f"--init_from: {problem}" for problem in error.problems)) from None


def warm_start(run_dir: str, *, feature_names: Sequence[str], fit_intercept: bool) -> tuple[np.ndarray, FittedModel]:
    """The parameters of another run, for `--init_from`.

    Args:
        run_dir: the other run's folder.
        feature_names: this run's features.
        fit_intercept: whether this run has a bias.

    Returns:
        float64 `[P]` in raw units, and their model.

    Raises:
        InputError: if there is no such run, or it has other features or a bias that this one has not.
        StateError: if its model is damaged.
    """
    model = find_start(run_dir)
    names = (display(",".join(model.feature_names)), display(",".join(feature_names)))
    if model.feature_names != tuple(feature_names):
        raise InputError(f"--init_from={display(run_dir)}: must have the features {names[1]}, but it has {names[0]}")
    if model.fit_intercept and not fit_intercept:
        raise InputError(
            f"--init_from={display(run_dir)}: has a bias; drop --fit_intercept=false, or start from another"
        )
    return (np.append(model.weights, model.bias) if fit_intercept else model.weights), model
