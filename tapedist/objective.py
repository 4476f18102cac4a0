"""What a run fits: a model and a loss on the rows of a source, in the units that training sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.config import TrainConfig
from tapedist.data.blocks import Source
from tapedist.data.sources import check_squares
from tapedist.data.standardize import RawUnits, StandardUnits
from tapedist.errors import InputError
from tapedist.results.model_file import warm_start
from tapedist.training import engines, losses
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
        own_loss: whether it is the caller's own.
        name: tells runs with other models, losses or starts apart; the same in every process.
    """

    source: Source
    units: RawUnits | StandardUnits
    model: Any
    initial: np.ndarray
    loss: losses.Loss
    own_loss: bool
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
        heed: Callable[[], bool],
    ) -> Objective:
        """What `config` asks for, or the caller's own.

        Args:
            config: the run's settings.
            source: the rows.
            strategy: where variables live.
            model: see `train`.
            loss: see `train`.
            heed: asked now and then inside a pass over the rows: False, or raises to break it off.

        Raises:
            InputError: if the rows, or the run to start from, do not fit.
        """
        units = _choose_units(config, source, own_model=model is not None, own_loss=loss is not None, heed=heed)
        if model is None:
            fitted, initial, start = _linear(config, source, units)
        else:
            with strategy.scope():
                built = ModuleModel(model(), num_features=source.num_features, dtype=tf.as_dtype(config.dtype))
            fitted, initial, start = built, built.initial_parameters(), ""
        return cls(
            source=source,
            units=units,
            model=fitted,
            initial=initial,
            loss=loss or losses.by_name(config.loss, huber_delta=config.huber_delta),
            own_loss=loss is not None,
            name=start + (_name(loss) if loss else "") + fitted.name,
        )

    @property
    def is_linear(self) -> bool:
        return isinstance(self.model, LinearModel)

    @property
    def is_squared(self) -> bool:
        """Whether the loss is the package's squared error."""
        return self.loss is losses.squared

    @property
    def loss_name(self) -> str:
        return _name(self.loss)

    def moments_obstacle(self, config: TrainConfig) -> str:
        """Why second moments of the rows do not define it; empty if they do."""
        return engines.moments_obstacle(
            config,
            num_features=self.source.num_features,
            is_linear=self.is_linear,
            own_loss=not self.is_squared,
        )

    def parameters(self, state: np.ndarray) -> np.ndarray:
        """The parameters `[P]` of a state `[P + s * P]`, in raw units."""
        return self.units.to_raw(state[: self.model.num_parameters])


def _name(loss: losses.Loss) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _choose_units(
    config: TrainConfig, source: Source, *, own_model: bool, own_loss: bool, heed: Callable[[], bool]
) -> RawUnits | StandardUnits:
    """The units that the masters are in."""
    if own_model and config.standardize == "true":
        raise InputError("--standardize=true: needs the linear model; scale the columns inside your own model")
    if not (own_model or own_loss or config.standardizes) and config.loss == "squared":
        check_squares(config, source)
    if own_model or not config.standardizes:
        return RawUnits()
    # The target may only be shifted where the loss is known to depend on the difference alone.
    return StandardUnits.of(source, fit_intercept=config.fit_intercept, center_target=not own_loss, heed=heed)


def _linear(config: TrainConfig, source: Source, units: RawUnits | StandardUnits) -> tuple[Any, np.ndarray, str]:
    """The linear model, its first masters, and the digest of the run that they are from; empty if they are new."""
    model = LinearModel(source.num_features, fit_intercept=config.fit_intercept)
    model.penalized = units.penalized(model.penalized)
    if not config.init_from:
        return model, model.initial_parameters(init=config.init, seed=config.seed), ""
    start, digest = warm_start(config.init_from, feature_names=source.feature_names, fit_intercept=config.fit_intercept)
    return model, units.from_raw(start), digest
