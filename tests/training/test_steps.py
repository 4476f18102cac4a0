"""The compiled steps: one trace and one compilation whatever the epoch holds; what the sum of rows must survive."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from oracle import Rule, descend
from sample_sources import ArraySource, Logarithm, TwoLayers, curve

import tapedist.runtime_flags
from tapedist.data.ranges import Bounds, ranges
from tapedist.data.source import Source
from tapedist.training import engines, losses, optimizers
from tapedist.training.engine_setup import Setup
from tapedist.training.engines import Call
from tapedist.training.linear_sums import LinearSums
from tapedist.training.model import LinearModel, ModuleModel
from tapedist.training.slot_steps import SlotSteps
from tapedist.training.steps import Problem

STREAMED = {
    "tapedist.data.orders.RESIDENT_BYTES": 0,
    "tapedist.data.orders.BLOCK_BYTES": 2048,
    "tapedist.data.orders.PRODUCT_BYTES": 1024,
}


def _setup(
    source: Source, *, model: Any = None, loss: Any = losses.squared, cache: str = "auto", rate: float = 0.05
) -> Setup:
    return Setup(
        source=source,
        strategy=tf.distribute.get_strategy(),
        problem=Problem(
            model=model or LinearModel(source.num_features),
            loss=loss,
            optimizer=optimizers.sgd(rate),
            dtype=tf.float32,
            l2=0.0,
        ),
        bounds=lambda split: Bounds.of(ranges(source, split), dtype="float32"),
        cache=cache,
        budget=2**30,
    )


def _run(
    engine: Any, state: np.ndarray, steps: int, lengths: tuple[int, ...] = (1, 3, 2, 7)
) -> tuple[np.ndarray, list[float]]:
    """State and losses after `steps` updates, in calls of changing lengths."""
    step, found, call = 0, [], 0
    while step < steps:
        wanted = min(lengths[call % len(lengths)], steps - step)
        result = engine.run(Call(state=state, step=step, num_steps=wanted))
        assert result.applied == len(result.records)
        state, step, call = result.state, step + result.applied, call + 1
        found += (result.records[:, 0] / result.records[:, 1]).tolist()
    return state, found


class Counted:
    """A loss that counts how often it is traced."""

    def __init__(self) -> None:
        self.traces = 0

    def __call__(self, y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        self.traces += 1
        return losses.squared(y_hat, y)


def _engine(form: str, setup: Setup) -> Any:
    if "batches" in form:
        return engines.mini_batch(setup, batch_size=96, shuffle="rows" if "streamed" in form else "batches", seed=0)
    return engines.full_batch(setup, split="train", passes=9)


def _small(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which some thousand rows take the path of a form."""
    if form in ("held", "streamed"):
        for name, value in STREAMED.items():
            monkeypatch.setattr(name, value)
    monkeypatch.setattr("tapedist.training.engines._SUPERBATCH_BYTES", 4096)


FORMS = ["resident", "held", "streamed", "batches", "streamed batches"]


@pytest.mark.parametrize("form", FORMS)
def test_one_trace_over_epochs_with_ragged_tails(form: str, monkeypatch: pytest.MonkeyPatch):
    _small(form, monkeypatch)
    loss = Counted()
    engine = _engine(form, _setup(curve(1003), loss=loss, cache="none" if "streamed" in form else "device"))
    state, _ = _run(engine, np.zeros(4), 3)
    traces = loss.traces
    assert traces >= 1
    _run(engine, state, 25)
    assert loss.traces == traces


@pytest.mark.parametrize("form", FORMS)
def test_engines_of_one_kind_trace_once(form: str, monkeypatch: pytest.MonkeyPatch):
    """The known-answer test is the first call; other rows, bounds and rates are arguments."""
    _small(form, monkeypatch)
    traced = []
    numbers = LinearSums._numbers
    monkeypatch.setattr(LinearSums, "_numbers", lambda *args: traced.append(1) or numbers(*args))
    delta = 0.125 + FORMS.index(form)  # A kind that no other test has traced.
    cache = "none" if "streamed" in form else "device"
    counts = []
    for seed in (5, 6):
        engine = _engine(form, _setup(curve(1003, seed=seed), loss=losses.huber(delta), cache=cache, rate=0.01 * seed))
        counts.append(len(traced))
        _run(engine, np.zeros(4), 5)
        counts.append(len(traced))
    assert counts[0] >= 1
    # One that streams goes through blocks in a loop of its own; what is compiled for a block is shared.
    assert set(counts) == {counts[0]}


def test_one_compilation_whatever_the_steps_are(run_python: Callable[..., Any], tmp_path: Path):
    """A step number or an order of batches that XLA took for a constant would compile again, call after call."""
    counts = []
    for epochs in (2, 6):
        dump = tmp_path / str(epochs)
        code = (
            "import tapedist; from tapedist.config import TrainConfig; from tapedist.run.train import train\n"
            "train(TrainConfig(mode='mini_batch', n_samples=501, batch_size=96, steps_per_call=3, learning_rate=0.01, "
            f"num_epochs={epochs}, eval_every_epochs=1))"
        )
        flags = f"{tapedist.runtime_flags.XLA_FLAGS} --xla_dump_to={dump}"
        done = run_python("-c", code, env={"XLA_FLAGS": flags}, warm=True)
        assert done.code == 0, done.err
        counts.append(len(list(dump.glob("*before_optimizations.txt"))))
    assert counts[0] == counts[1] > 0


def test_full_batch_is_one_mini_batch_of_all_rows():
    setup = _setup(curve(1003))
    whole = engines.full_batch(setup, split="train", passes=9)
    batch = engines.mini_batch(setup, batch_size=setup.source.num_rows("train"), shuffle="none", seed=0)
    assert batch.steps_per_epoch == 1
    start = np.array([0.3, -0.2, 0.1, 0.5])
    found, wanted = _run(batch, start, 20), _run(whole, start, 20)
    np.testing.assert_array_equal(found[0], wanted[0])
    assert found[1] == wanted[1]


@pytest.mark.parametrize("form", ["whole", "blocks", "batches"])
def test_an_own_model_may_be_undefined_at_zero(form: str, monkeypatch: pytest.MonkeyPatch):
    """Padding must never reach it: zero times the gradient there would not be zero."""
    if form == "blocks":
        for name, value in STREAMED.items():
            monkeypatch.setattr(name, value)
    source = curve(101, positive=True)
    model = ModuleModel(Logarithm(), num_features=3, dtype=tf.float32)
    setup = _setup(source, model=model, rate=0.01)
    start, steps = model.initial_parameters(), 4
    if form == "batches":
        engine = engines.mini_batch(setup, batch_size=87, shuffle="none", seed=0)
    else:
        engine = engines.full_batch(setup, split="train", passes=9)
    state, _ = _run(engine, start, steps)
    x, y, theta = np.log(source.x[:87]), source.y[:87], start
    for _ in range(steps):
        theta = theta - 0.01 * 2 * x.T @ (x @ theta - y) / 87
    np.testing.assert_allclose(state, theta, rtol=1e-5)


def test_a_batch_without_weight_moves_nothing():
    source = curve(203)
    weights = np.ones(203)
    weights[20:40] = 0.0
    source = ArraySource(source.x, source.y, weights, train=100)
    batch = engines.mini_batch(_setup(source), batch_size=20, shuffle="none", seed=0)
    result = batch.run(Call(state=np.ones(4), num_steps=5))
    assert result.applied == 5
    np.testing.assert_array_equal(result.paths[1], result.paths[2])
    assert result.records[1, 1] == 0.0
    rows = ((source.x[i : i + 20], source.y[i : i + 20]) for i in (0, 40, 60, 80, 0))
    wanted = list(descend(np.ones(4), rows, Rule("sgd", 0.05, 4), steps=4))
    np.testing.assert_allclose(result.state, wanted[-1][1], rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_weight_of_many_rows_is_exact(weighted: bool):
    """Beyond 2**24 a count does not fit into float32; 2**40 rows are within what the sums hold."""
    source = curve(1003, weighted=weighted)
    steps = SlotSteps(**_setup(source).programs("train"))
    count, times, theta = 1023, 2**30 + 1, tf.zeros(4, tf.float64)
    rows = [tf.zeros([1, 3, count]), tf.zeros([1, count])]
    if weighted:
        rows.append(tf.fill([1, count], 0.1))
    bounds = tf.constant(steps.bounds)
    sums = steps.row_sums.of_tiles(theta, bounds, tuple(rows), tf.constant(count))
    totals = steps.row_sums.total(theta, bounds, sums * times)
    weight = Fraction(float(np.float32(0.1))) if weighted else 1
    assert totals.rows == count * times
    assert totals.weight == float(weight * count * times)


@pytest.mark.parametrize(
    "model", [lambda x: x @ tf.ones([3, 1]), lambda x: tf.reduce_sum(x), lambda x: tf.reduce_sum(x, 1)[:1]]
)
def test_predictions_that_would_broadcast_are_refused(model: Callable[[tf.Tensor], tf.Tensor]):
    class Wrong(TwoLayers):
        def __call__(self, x: tf.Tensor) -> tf.Tensor:
            return model(x)

    setup = _setup(curve(101), model=ModuleModel(Wrong(), num_features=3, dtype=tf.float32))
    engine = engines.full_batch(setup, split="train", passes=2)
    with pytest.raises(ValueError, match=r"both must be \[k\]"):
        _run(engine, np.zeros(setup.problem.model.num_parameters), 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", [losses.squared, losses.huber(0.5)])
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_a_loss_is_the_record_of_a_step(weighted: bool, loss: Any, l2: float):
    setup = _setup(curve(1003, weighted=weighted), loss=loss)
    setup = dataclasses.replace(setup, problem=dataclasses.replace(setup.problem, l2=l2))
    measuring = engines.full_loss(setup, split="train", passes=2)
    moving = engines.full_batch(setup, split="train", passes=2)
    assert type(measuring) is not type(moving)
    for state in (np.zeros(4), np.array([0.5, -0.25, 3.0, 1e-3])):
        records = [engine.run(Call(state=state)).records for engine in (measuring, moving)]
        np.testing.assert_array_equal(*records)


def test_other_arithmetic_is_measured_by_its_steps():
    setup = _setup(curve(1003))
    fast = dataclasses.replace(setup, problem=dataclasses.replace(setup.problem, arithmetic="plain"))
    for other in (fast, dataclasses.replace(setup, cache="none")):
        found, steps = (make(other, split="train", passes=1) for make in (engines.full_loss, engines.full_batch))
        assert type(found) is type(steps)
