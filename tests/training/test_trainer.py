"""The outer loop with a fake engine and a fake clock: rows, saves, stops, divergence."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tapedist.errors import DivergedError, Interrupted
from tapedist.training.engines import Call, Engine
from tapedist.training.interfaces import NullObserver, Row
from tapedist.training.schedule import CallLength, Schedule
from tapedist.training.state import TrainingState
from tapedist.training.steps import CallResult
from tapedist.training.trainer import Trainer


class FakeEngine(Engine):
    """Adds one to its only parameter; the loss of a step is a function of the step."""

    reason = "a test"

    def __init__(self, loss: Callable[[int], float], *, per_epoch: int = 1, full_batch: bool = True):
        self.steps_per_epoch, self.full_batch = per_epoch, full_batch
        self.calls: list[tuple[int, int]] = []
        self._loss = loss

    def run(self, call: Call) -> CallResult | None:
        self.calls.append((call.step, call.num_steps))
        if call.interrupted():
            return None
        state, records = call.state, []
        for i in range(call.num_steps):
            loss = self._loss(call.step + i)
            records.append([loss, 1.0, 0.5, 1.0, *state])
            if not loss <= call.limit or math.isinf(loss):
                return CallResult(state, np.array(records), i)
            state = state + 1.0
        return CallResult(state, np.array(records), call.num_steps)


class Notes(NullObserver):
    """Keeps rows."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def record(self, row: Row) -> None:
        self.rows.append(row)


@dataclasses.dataclass
class Stop:
    signum: int | None = None


@dataclasses.dataclass
class Bench:
    """A trainer and what surrounds it; each look at the clock takes one second."""

    trainer: Trainer
    notes: Notes
    saves: list[int]
    stop: Stop
    engine: FakeEngine


def _bench(engine: FakeEngine, *, epochs: int = 25, evaluate: Any = None, **more: Any) -> Bench:
    notes, saves, stop, ticks = Notes(), [], Stop(), iter(range(10**6))
    schedule = {"log_every_epochs": 10, "eval_every_epochs": 0, "checkpoint_every_steps": 0} | more.pop("schedule", {})
    trainer = Trainer(
        engine=engine,
        schedule=Schedule(num_epochs=epochs, steps_per_epoch=engine.steps_per_epoch, **schedule),
        observer=notes,
        evaluate=evaluate,
        save=lambda state, progress: saves.append(state.step),
        save_every_secs=more.pop("save_every_secs", 0.0),
        call_length=CallLength(more.pop("steps_per_call", 4)),
        train_rows=100,
        stop=stop,
        clock=lambda: float(next(ticks)),
        wall_clock=lambda: 0.0,
    )
    assert not more
    return Bench(trainer, notes, saves, stop, engine)


def _state() -> TrainingState:
    return TrainingState(vector=np.zeros(1))


@pytest.mark.parametrize("steps_per_call", [1, 4, 7, 100])
def test_rows_fall_on_epochs_whatever_a_call_takes(steps_per_call: int):
    bench, state = _bench(FakeEngine(lambda step: 100.0 - step), steps_per_call=steps_per_call), _state()
    bench.trainer.fit(state)
    assert bench.trainer.close(state) == (100.0, None)  # The fake measures at step 0.
    assert [(row.step, row.loss, row.penalty) for row in bench.notes.rows[:-1]] == [
        (0, 100.0, 0.5), (10, 90.0, 0.5), (20, 80.0, 0.5)
    ]  # fmt: skip
    assert (state.step, state.vector.tolist()) == (25, [25.0])
    assert [(epoch, theta.tolist()) for epoch, theta in state.path] == [(0, [0.0]), (10, [10.0]), (20, [20.0])]


def test_a_mini_batch_epoch_has_one_row_with_its_mean():
    engine = FakeEngine(lambda step: step + 1.0, per_epoch=4, full_batch=False)
    bench, state = _bench(engine, epochs=11, steps_per_call=3), _state()
    bench.trainer.fit(state)
    assert [(row.step, row.epoch, row.loss) for row in bench.notes.rows] == [(4, 0, 2.5), (44, 10, 42.5)]
    assert bench.trainer.close(state) == (42.5, None)


def test_test_rows_come_at_their_epochs_and_at_the_end():
    bench, state = _bench(FakeEngine(lambda step: 1.0), evaluate=lambda vector: (vector[0], 0.0), epochs=7,
                          schedule={"eval_every_epochs": 3}), _state()  # fmt: skip
    bench.trainer.fit(state)
    bench.trainer.close(state)
    tests = [(row.step, row.loss) for row in bench.notes.rows if row.split == "test"]
    assert tests == [(0, 0.0), (3, 3.0), (6, 6.0), (7, 7.0)]


def test_saves_by_steps_and_by_the_clock():
    by_steps = _bench(FakeEngine(lambda step: 1.0), schedule={"checkpoint_every_steps": 6}, steps_per_call=100)
    by_steps.trainer.fit(_state())
    assert [step for step in by_steps.saves if step] == [6, 12, 18, 24]
    by_clock = _bench(FakeEngine(lambda step: 1.0), save_every_secs=20.0, steps_per_call=1)
    by_clock.trainer.fit(_state())
    assert 2 <= len(by_clock.saves) <= 10
    never = _bench(FakeEngine(lambda step: 1.0))
    never.trainer.fit(_state())
    assert never.saves == []


def test_a_stop_saves_and_leaves():
    bench, state = _bench(FakeEngine(lambda step: 1.0)), _state()
    bench.engine._loss = lambda step: setattr(bench.stop, "signum", 15 if step >= 9 else None) or 1.0
    with pytest.raises(Interrupted, match="by SIGTERM after") as caught:
        bench.trainer.fit(state)
    assert caught.value.exit_code == 143
    assert bench.saves == [state.step]
    assert 9 <= state.step < 25


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6 * 3.0 * 1.01])
def test_divergence_keeps_the_last_good_state(bad: float):
    bench, state = _bench(FakeEngine(lambda step: bad if step == 13 else 3.0)), _state()
    with pytest.raises(DivergedError, match="diverged after 13 updates"):
        bench.trainer.fit(state)
    assert (state.step, state.vector.tolist()) == (13, [13.0])
    assert bench.saves == []
    assert all(math.isfinite(row.loss) for row in bench.notes.rows)


def test_the_first_step_may_diverge():
    with pytest.raises(DivergedError, match="diverged after 0 updates"):
        _bench(FakeEngine(lambda step: math.nan)).trainer.fit(_state())


@pytest.mark.parametrize("first", [0.0, 1e-12])
def test_a_first_batch_that_fits_by_chance_is_no_measure_of_divergence(first: float):
    engine = FakeEngine(lambda step: first if step == 0 else 2.0, per_epoch=4, full_batch=False)
    bench, state = _bench(engine, epochs=3), _state()
    bench.trainer.fit(state)
    assert state.step == 12
    assert state.first_loss == pytest.approx(1.5)


def test_a_perfect_start_is_no_measure_of_divergence():
    state = _state()
    _bench(FakeEngine(lambda step: step * 1e-30)).trainer.fit(state)
    assert state.step == 25


@pytest.mark.parametrize("per_epoch", [1, 4])
@pytest.mark.parametrize("at", [1, 3, 9, 11])
def test_a_stored_state_goes_on_as_if_nothing_had_happened(per_epoch: int, at: int):
    def bench() -> Bench:
        engine = FakeEngine(lambda step: 50.0 - step, per_epoch=per_epoch, full_batch=per_epoch == 1)
        return _bench(engine, epochs=12, schedule={"log_every_epochs": 1, "checkpoint_every_steps": at})

    whole, state = bench(), _state()
    stored: list[TrainingState] = []
    whole.trainer._save = lambda s, _: stored.append(TrainingState.from_arrays(copy.deepcopy(s.to_arrays())))
    whole.trainer.fit(state)
    half = next(s for s in stored if s.step == at)
    rest = bench()
    rest.trainer.fit(half)
    for name, value in state.to_arrays().items():
        np.testing.assert_array_equal(half.to_arrays()[name], value, err_msg=name)
    rows = [(row.step, row.loss) for row in whole.notes.rows]
    assert [(row.step, row.loss) for row in rest.notes.rows] == rows[-len(rest.notes.rows) :]


def test_a_long_path_is_thinned_evenly():
    state = _state()
    for epoch in range(10_000):
        state.add_to_path(epoch, np.array([float(epoch)]))
    epochs = [epoch for epoch, _ in state.path]
    assert 1024 <= len(epochs) <= 2048
    assert epochs == list(range(0, 10_000, state.path_stride))


def test_a_state_is_stored_whole():
    state = TrainingState(
        vector=np.arange(4.0), step=7, first_loss=2.5, epoch_sums=np.arange(3.0), path=[(0, np.ones(2))], tested_step=6
    )
    back = TrainingState.from_arrays(copy.deepcopy(state.to_arrays()))
    assert repr(back) == repr(state)
