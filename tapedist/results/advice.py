"""What to try where training ended far from where it could have: a line for the user, or none."""

from __future__ import annotations

from tapedist.config import TrainConfig
from tapedist.results.outcome import TrainResult

# The tutorial's own 3,000 epochs end two or three standard errors away.
_FAR = 10.0
_HARDLY_FELL = 0.01


def advice(config: TrainConfig, result: TrainResult) -> list[str]:
    """Notices on a run that is over."""
    if not config.num_epochs or result.stopped:
        return []
    # Where there is a penalty, the least-squares optimum is not where training goes.
    if result.statistics is not None and not config.l2:
        far = result.statistics.learned.max_standard_errors
        if far is None or far <= _FAR:
            return []
        known = config.mode == "full_batch" and config.optimizer == "sgd" and config.learning_rate != "auto"
        closer = "--learning_rate=auto or more --num_epochs" if known else "more --num_epochs"
        return [f"Notice: training ended {far:.3g} standard errors from the optimum; {closer} would come closer"]
    first = next((row.loss for row in result.history if row.split == "train" and row.epoch <= 1), 0.0)
    if result.train_loss is None or not first > 0 or config.num_epochs == 1 or config.init_from:
        return []
    fell = 1 - result.train_loss / first
    if not fell < _HARDLY_FELL:
        return []
    units = "; the target keeps its units, and steps must fit them" if config.standardizes else ""
    return [
        f"Notice: the loss fell by no more than {max(fell, 0.0):.1%}; try a higher --learning_rate or more "
        f"--num_epochs{units}"
    ]
