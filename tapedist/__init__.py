"""tapedist: linear models by gradient descent on GradientTape, with the same bits on any number of devices.

The public names below are imported on first use, so that `import tapedist` costs milliseconds and no TensorFlow.
"""

from __future__ import annotations

from etils import epy

from tapedist import runtime_flags as _runtime_flags  # noqa: F401  (sets them, before TensorFlow is imported)
from tapedist.version import __version__

with epy.lazy_api_imports(globals()):
    from tapedist import errors
    from tapedist.config import TrainConfig
    from tapedist.data.array_source import ArraySource
    from tapedist.run.train import TrainResult, train
    from tapedist.training.exact import times

__all__ = ["ArraySource", "TrainConfig", "TrainResult", "__version__", "errors", "times", "train"]
