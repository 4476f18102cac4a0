"""When things happen in a run, as arithmetic on the step number, and how many steps the next call takes."""

from __future__ import annotations

import dataclasses

from tapedist.training.steps import MAX_STEPS_PER_CALL

_CALL_SECONDS = 0.5
_GROWTH = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A run's milestones.

    Attributes:
        num_epochs: epochs in all.
        steps_per_epoch: updates in one.
        log_every_epochs: a training row every so many epochs.
        eval_every_epochs: a test row every so many epochs; 0 for none before the end.
        checkpoint_every_steps: a save every so many updates; 0 for none by count.
        check_every_epochs: a look at the rules that stop early every so many epochs; 0 for none.
    """

    num_epochs: int
    steps_per_epoch: int
    log_every_epochs: int
    eval_every_epochs: int
    checkpoint_every_steps: int
    check_every_epochs: int = 0

    @property
    def num_steps(self) -> int:
        return self.num_epochs * self.steps_per_epoch

    def logs(self, epoch: int) -> bool:
        """Whether `epoch` has a training row."""
        return epoch % self.log_every_epochs == 0

    def evaluates(self, step: int) -> bool:
        """Whether a test row belongs at `step`."""
        every = self.eval_every_epochs * self.steps_per_epoch
        return bool(every) and step % every == 0 and step < self.num_steps

    def checks(self, step: int) -> bool:
        """Whether the rules that stop early are asked at `step`."""
        every = self.check_every_epochs * self.steps_per_epoch
        return bool(every) and step % every == 0

    def saves(self, step: int) -> bool:
        """Whether a save belongs at `step`."""
        return bool(self.checkpoint_every_steps) and step % self.checkpoint_every_steps == 0

    def steps_to_milestone(self, step: int) -> int:
        """Updates from `step` to the next point where the outer loop has something to do."""
        stops = [self.num_steps]
        by_epochs = (every * self.steps_per_epoch for every in (self.eval_every_epochs, self.check_every_epochs))
        for every in (*by_epochs, self.checkpoint_every_steps):
            if every:
                stops.append((step // every + 1) * every)
        return min(stops) - step


class CallLength:
    """How many steps a compiled call takes: about half a second's worth, found by timing the calls before.

    The answer never depends on it; it only bounds how long a signal or a progress line waits.

    Args:
        fixed: `--steps_per_call`; 0 measures.
    """

    def __init__(self, fixed: int):
        self._fixed = min(fixed, MAX_STEPS_PER_CALL)
        self._next = self._fixed or 1
        self._warm = False

    def steps(self) -> int:
        return self._next

    def observe(self, steps: int, seconds: float) -> None:
        """Learns from a call of `steps` that took `seconds`; the first call is compilation and teaches nothing."""
        if self._fixed or not self._warm:
            self._warm = True
            return
        affordable = int(_CALL_SECONDS * steps / max(seconds, 1e-9))
        self._next = max(1, min(affordable, steps * _GROWTH, MAX_STEPS_PER_CALL))
