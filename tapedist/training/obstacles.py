"""Why an engine cannot serve a run; asked of settings alone, without TensorFlow."""

from __future__ import annotations

from tapedist.config import TrainConfig

_MOST_FEATURES = 512


def moments_obstacle(config: TrainConfig, *, num_features: int, is_linear: bool, own_loss: bool) -> str:
    """Why the `moments` engine cannot serve a run; empty if it can."""
    if not is_linear:
        return "the model is not the linear one"
    if own_loss or config.loss != "squared":
        return "the loss is not squared error"
    if num_features > _MOST_FEATURES:
        return f"{num_features} features are more than {_MOST_FEATURES}"
    return ""
