"""Milestones are arithmetic on the step, and calls are long enough to be cheap and short enough to be stopped."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapedist.training.schedule import MAX_STEPS_PER_CALL, CallLength, Schedule

SCHEDULES = st.builds(
    Schedule,
    num_epochs=st.integers(1, 50),
    steps_per_epoch=st.integers(1, 30),
    log_every_epochs=st.integers(1, 12),
    eval_every_epochs=st.integers(0, 12),
    checkpoint_every_steps=st.integers(0, 40),
    check_every_epochs=st.integers(0, 12),
)


@settings(deadline=None)
@given(schedule=SCHEDULES, most=st.integers(1, 100))
def test_calls_end_at_every_milestone_and_never_pass_one(schedule: Schedule, most: int):
    step, seen = 0, set()
    while step < schedule.num_steps:
        seen.add(step)
        taken = min(most, schedule.steps_to_milestone(step))
        assert taken >= 1
        step += taken
    assert step == schedule.num_steps
    for step in range(schedule.num_steps):
        if schedule.evaluates(step) or schedule.saves(step) or schedule.checks(step):
            assert step in seen


@pytest.mark.parametrize(
    ("step", "evaluates", "saves", "checks"),
    [(0, True, True, True), (5, False, False, False), (14, False, True, False), (20, True, False, False),
     (40, True, False, False), (30, False, False, True), (100, False, False, False)],
)  # fmt: skip
def test_milestones(step: int, evaluates: bool, saves: bool, checks: bool):
    schedule = Schedule(
        num_epochs=10, steps_per_epoch=10, log_every_epochs=1, eval_every_epochs=2, checkpoint_every_steps=7,
        check_every_epochs=3,
    )  # fmt: skip
    assert (schedule.evaluates(step), schedule.saves(step), schedule.checks(step)) == (evaluates, saves, checks)


def test_nothing_is_due_when_nothing_is_asked_for():
    schedule = Schedule(
        num_epochs=3, steps_per_epoch=4, log_every_epochs=10, eval_every_epochs=0, checkpoint_every_steps=0
    )
    assert not any(schedule.evaluates(s) or schedule.saves(s) or schedule.checks(s) for s in range(13))
    assert [schedule.logs(epoch) for epoch in (0, 1, 10, 20, 21)] == [True, False, True, True, False]
    assert schedule.steps_to_milestone(5) == 7


def test_a_call_grows_to_about_half_a_second():
    calls = CallLength(0)
    assert calls.steps() == 1
    calls.observe(1, 30.0)  # Compilation.
    for _ in range(10):
        calls.observe(calls.steps(), calls.steps() * 0.002)
    assert calls.steps() == 250


def test_a_call_stays_between_one_step_and_the_most_that_are_compiled():
    calls = CallLength(0)
    for _ in range(10):
        calls.observe(calls.steps(), 0.0)
    assert calls.steps() == MAX_STEPS_PER_CALL
    calls.observe(1, 1e6)
    assert calls.steps() == 1


@pytest.mark.parametrize(("fixed", "steps"), [(7, 7), (10**6, MAX_STEPS_PER_CALL)])
def test_a_fixed_length_stays(fixed: int, steps: int):
    calls = CallLength(fixed)
    calls.observe(steps, 100.0)
    calls.observe(steps, 100.0)
    assert calls.steps() == steps


def test_rows_and_looks_become_rarer_in_a_run_without_a_known_end():
    schedule = Schedule(
        num_epochs=10**6, steps_per_epoch=1, log_every_epochs=10, eval_every_epochs=0, checkpoint_every_steps=0,
        check_every_epochs=10, slowing=True,
    )  # fmt: skip
    logged = list(schedule.logged(range(10**6)))
    decades = [range(0, 1000, 10), *(range(10**k, 10 ** (k + 1), 10 ** (k - 1)) for k in (3, 4, 5))]
    assert logged == [epoch for decade in decades for epoch in decade]
    assert all(schedule.logs(epoch) and schedule.checks(epoch) for epoch in logged)
    step, looks = 0, [0]
    while step < 10**6:
        step += schedule.steps_to_milestone(step)
        looks.append(step)
    assert looks == [*logged, 10**6]
    # Wherever a call begins, the same epochs have rows.
    assert list(schedule.logged(range(995, 1250))) == [1000, 1100, 1200]


@pytest.mark.parametrize("slowing", [False, True])
@pytest.mark.parametrize(("log", "check"), [(1, 0), (7, 0), (10, 4), (1000, 3)])
def test_losses_that_are_told_are_measured(log: int, check: int, slowing: bool):
    """Of epochs with a row, of the last one, and of those behind which a run may stop."""
    schedule = Schedule(
        num_epochs=523, steps_per_epoch=3, log_every_epochs=log, eval_every_epochs=0, checkpoint_every_steps=0,
        check_every_epochs=check, slowing=slowing,
    )  # fmt: skip
    wanted = {e for e in range(523) if schedule.logs(e) or e == 522 or schedule.checks((e + 1) * 3)}
    for size in (1, 5, 64, 523):
        parts = [range(first, min(523, first + size)) for first in range(0, 523, size)]
        assert set().union(*(schedule.measured(part) for part in parts)) == wanted
        assert all(epoch in part for part in parts for epoch in schedule.measured(part))
