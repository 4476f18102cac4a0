"""What a run fits: a model and a loss on the rows of a source, in the units that training sees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tapedist.config import TrainConfig, why_not_moments
from tapedist.data.source import Source
from tapedist.data.standardize import RawUnits, StandardUnits
from tapedist.errors import InputError
from tapedist.regression.metric import Metric
from tapedist.regression.summary import Survey, linear_units
from tapedist.storage.model_file import warm_start
from tapedist.training import losses
from tapedist.training.model import LinearModel, ModuleModel


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """The function of the parameters that a run minimises, and where it starts.

    Attributes:
        source: the rows, as the user has them.
        units: those of the masters.
        model: what is fitted.
        initial: float64 `[P]`, the masters at the start.
        loss: per-example loss.
        custom_loss: whether it is the caller's own.
        survey: what the training rows of a linear model say before training; None of synthetic rows, or where the
            features are too many.
        name: tells runs with other models, losses or starts apart; the same in every process.
    """

    source: Source
    units: RawUnits | StandardUnits
    model: Any
    initial: np.ndarray
    loss: losses.Loss
    custom_loss: bool
    survey: Survey | None
    name: str

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        source: Source,
        *,
        strategy: tf.distribute.Strategy,
        model: Callable[[], Any] | None,
        loss: losses.Loss | None,
        surveyed: bool,
    ) -> Objective:
        """What `config` asks for, or the caller's own.

        Args:
            config: the run's settings.
            source: the rows.
            strategy: where variables live.
            model: see `train`.
            loss: see `train`.
            surveyed: whether the rows are the user's, of which nothing is known before they are read.

        Raises:
            InputError: if the rows, or the run to start from, do not fit.
        """
        found: Survey | None = None
        units: RawUnits | StandardUnits = RawUnits()
        if model is None:
            units, found = linear_units(config, source, custom_loss=loss is not None, surveyed=surveyed)
            fitted, initial, start = _linear(config, source, units)
        else:
            if config.standardize == "true":
                raise InputError("--standardize=true: needs the linear model; scale the columns inside your own model")
            with strategy.scope():
                built = ModuleModel(model(), num_features=source.num_features, dtype=tf.as_dtype(config.dtype))
            fitted, initial, start = built, built.initial_parameters(), ""
        return cls(
            source=source,
            units=units,
            model=fitted,
            initial=initial,
            loss=loss or losses.by_name(config.loss, huber_delta=config.huber_delta),
            custom_loss=loss is not None,
            survey=found,
            name=start + (_name(loss) if loss else "") + fitted.name,
        )

    @functools.cached_property
    def metric(self) -> Metric | None:
        """The curvature of squared error on the training rows; None where they were not surveyed."""
        return Metric(self.survey.fit, self.units) if self.survey else None

    @property
    def is_linear(self) -> bool:
        return isinstance(self.model, LinearModel)

    def has_one_answer(self, config: TrainConfig) -> bool:
        """Whether the bits are the same on all machines."""
        return self.is_linear and not self.custom_loss and config.arithmetic != "fast"

    @property
    def is_squared(self) -> bool:
        """Whether the loss is the package's squared error."""
        return isinstance(self.loss, losses.ResidualLoss) and self.loss.name == "squared"

    @property
    def loss_name(self) -> str:
        return _name(self.loss)

    def why_not_moments(self, config: TrainConfig) -> str:
        """Why second moments of the rows do not define it; empty if they do."""
        return why_not_moments(
            config,
            num_features=self.source.num_features,
            is_linear=self.is_linear,
            custom_loss=not self.is_squared,
        )

    def parameters(self, state: np.ndarray) -> np.ndarray:
        """The parameters `[P]` of a state `[P + s * P]`, in raw units."""
        return self.units.to_raw(state[: self.model.num_parameters])


def _name(loss: losses.Loss) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _linear(config: TrainConfig, source: Source, units: RawUnits | StandardUnits) -> tuple[Any, np.ndarray, str]:
    """The linear model, its first masters, and the digest of the run that they are from; empty if they are new."""
    model = LinearModel(source.num_features, fit_intercept=config.fit_intercept)
    model.penalized = units.penalized(model.penalized)
    if not config.init_from:
        initial = model.initial_parameters(init=config.init, seed=config.seed)
        initial[list(units.left_out)] = 0.0
        return model, initial, ""
    start, earlier = warm_start(
        config.init_from, feature_names=source.feature_names, fit_intercept=config.fit_intercept
    )
    return model, units.from_raw(start, earlier.center, earlier.bias_at_center), earlier.digest
