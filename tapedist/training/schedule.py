"""The milestones of a run as functions of the step number, and the number of steps of the next call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

MAX_STEPS_PER_CALL = 4096
_WARM_CALLS = 3  # Before the time of a step is believed: the first compiles, the second is a step or two.
_CALL_SECONDS = 0.5
_GROWTH = 8
_AT_ONE_PACE = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A run's milestones.

    Attributes:
        num_epochs: epochs in all.
        steps_per_epoch: updates in one.
        log_every_epochs: a training row every so many epochs.
        eval_every_epochs: a test row every so many epochs; 0 for none before the end.
        checkpoint_every_steps: a save every so many updates; 0 for none by count.
        check_every_epochs: a check of the stopping rules every so many epochs; 0 for none.
        slowing: whether rows and checks become rarer, for runs of unknown length: after a hundred of them every tenth
            is left, after ten times as many epochs every hundredth, and so on. So there are about ninety for each power
            of ten.
    """

    num_epochs: int
    steps_per_epoch: int
    log_every_epochs: int
    eval_every_epochs: int
    checkpoint_every_steps: int
    check_every_epochs: int = 0
    slowing: bool = False

    @property
    def num_steps(self) -> int:
        return self.num_epochs * self.steps_per_epoch

    def logs(self, epoch: int) -> bool:
        """Returns whether `epoch` has a training row."""
        return epoch % self._pace(epoch, self.log_every_epochs) == 0

    def logged(self, epochs: range) -> Iterator[int]:
        """Those of `epochs` that have a training row."""
        epoch = epochs.start if self.logs(epochs.start) else self._next(epochs.start, self.log_every_epochs)
        while epoch < epochs.stop:
            yield epoch
            epoch = self._next(epoch, self.log_every_epochs)

    def measured(self, epochs: range) -> Iterator[int]:
        """Those of `epochs` whose exact loss is needed: for a row, or because the run may end with them."""
        yield from self.logged(epochs)
        if self.num_epochs - 1 in epochs:
            yield self.num_epochs - 1
        end = self._next(epochs.start, self.check_every_epochs) if self.check_every_epochs else math.inf
        while end <= epochs.stop:
            yield int(end) - 1
            end = self._next(int(end), self.check_every_epochs)

    def _pace(self, epoch: int, every: int) -> int:
        """Epochs from one milestone to the next, at `epoch`."""
        pace = every
        while self.slowing and epoch >= _AT_ONE_PACE * pace:
            pace *= 10
        return pace

    def _next(self, epoch: int, every: int) -> int:
        """The first milestone after `epoch`."""
        # Paces divide each other, so that a milestone of the next pace is one of this pace.
        pace = self._pace(epoch, every)
        return (epoch // pace + 1) * pace

    def evaluates(self, step: int) -> bool:
        """Returns whether a test row belongs at `step`."""
        every = self.eval_every_epochs * self.steps_per_epoch
        return bool(every) and step % every == 0 and step < self.num_steps

    def checks(self, step: int) -> bool:
        """Returns whether the stopping rules are checked at `step`."""
        if not self.check_every_epochs or step % self.steps_per_epoch:
            return False
        epoch = step // self.steps_per_epoch
        return epoch % self._pace(epoch, self.check_every_epochs) == 0

    def saves(self, step: int) -> bool:
        """Returns whether a save belongs at `step`."""
        return bool(self.checkpoint_every_steps) and step % self.checkpoint_every_steps == 0

    def steps_to_milestone(self, step: int) -> int:
        """Updates from `step` to the next point where the outer loop has something to do."""
        stops = [self.num_steps]
        for every in (self.eval_every_epochs * self.steps_per_epoch, self.checkpoint_every_steps):
            if every:
                stops.append((step // every + 1) * every)
        if self.check_every_epochs:
            stops.append(self._next(step // self.steps_per_epoch, self.check_every_epochs) * self.steps_per_epoch)
        return min(stops) - step


class CallLength:
    """The number of steps of a compiled call: about half a second's, measured by the calls before.

    Results do not depend on it; it only bounds the delay of signals and progress lines.

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
        """Updates the estimate from a call of `steps` that took `seconds`, except from the first, which compiles."""
        if self._fixed or not self._warm:
            self._warm = True
            return
        affordable = int(_CALL_SECONDS * steps / max(seconds, 1e-9))  # A coarse clock may measure 0.
        self._next = max(1, min(affordable, steps * _GROWTH, MAX_STEPS_PER_CALL))


class GatherCostMonitor(CallLength):
    """A `CallLength` that compares the time of a step with that of its exchange, and logs one notice.

    Args:
        fixed: see `CallLength`.
        gather_secs: seconds of a step's exchange.
        replicas: `R`.
        batch_size: rows of a step, if more of them would help; 0 in full batch.
        log: takes the notice.
    """

    def __init__(self, fixed: int, *, gather_secs: float, replicas: int, batch_size: int, log: Callable[[str], None]):
        super().__init__(fixed)
        self._gather_secs = gather_secs
        self._replicas = replicas
        self._batch_size = batch_size
        self._log = log
        self._calls = 0

    def observe(self, steps: int, seconds: float) -> None:
        super().observe(steps, seconds)
        self._calls += 1
        if self._calls == _WARM_CALLS and self._gather_secs > seconds / steps / 2:
            self._log(self._notice(seconds / steps))

    def _notice(self, step_secs: float) -> str:
        cost = min(self._gather_secs, step_secs)
        remedy = "fewer devices or workers"
        if self._batch_size:
            # Work grows with the rows of a step, its exchange does not.
            work = max(step_secs - cost, 0.1 * step_secs)
            more = 2 ** max(1, int(cost / work - 1).bit_length())
            remedy += f", or --batch_size={self._batch_size * more} or more (another answer)"
        return (
            f"Notice: a step takes {step_secs * 1e3:.2g} ms, about {cost * 1e3:.2g} ms of it to add the sums "
            f"of {self._replicas} replicas; {remedy}, would be faster"
        )


@dataclasses.dataclass(frozen=True)
class Rate:
    """A learning rate over the steps: constant, then `1 / (1 / first + curvature * (step - hold))`.

    Such a decay, with the inverse Hessian as the metric, is as efficient as any method that sees each row once (Bottou
    and LeCun, "Large scale online learning", 2003); the constant beginning forgets where training started (Bottou,
    Curtis and Nocedal, "Optimization methods for large-scale machine learning", 2018, 4.1).

    Attributes:
        first: the rate of the first steps.
        hold: steps that it is kept for; infinite for a constant rate.
        curvature: the least one of the loss in the metric.
    """

    first: float
    hold: float = math.inf
    curvature: float = 1.0
