"""How far training ended from where it could have, and what to try: a sentence for the user, or none."""

from __future__ import annotations

from tapedist.config import TrainConfig
from tapedist.regression.metric import Gap
from tapedist.results.result import TrainResult
from tapedist.training.stopping import SETTLED

# The tutorial's own 3,000 epochs end two or three standard errors away, and are told so by its table.
_FAR = 10.0
# A user's own rows end closer, unless something keeps them from it.
_CLOSE = {"full_batch": 0.1, "mini_batch": 0.5}
_HARDLY_FELL = 0.01


def advice(config: TrainConfig, result: TrainResult, *, of_user: bool, gap: Gap | None = None) -> list[str]:
    """Sentences on a run that is over.

    Args:
        config: the run's settings, resolved.
        result: what it found.
        of_user: whether the rows are a table, arrays or a source of the user's.
        gap: to the optimum of the run's own objective, where there are no statistics of squared error without penalty.
    """
    if not config.most_epochs:
        return []
    # Where there is a penalty, the least-squares optimum is not where training goes.
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
    """What would come closer to the optimum."""
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
