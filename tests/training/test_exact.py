"""Every engine has the bits of `tapedist.reference`, however rows are cut and whatever instructions the machine has."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from sample_sources import ArraySource

import tapedist.runtime_flags
from tapedist import reference as ref
from tapedist.data.orders import BlockOrder, BlockPlan
from tapedist.data.ranges import Bounds, ranges
from tapedist.training import block_pass, engines, losses, optimizers
from tapedist.training.block_pass import BlockPass
from tapedist.training.engine_setup import Setup
from tapedist.training.engines import Call
from tapedist.training.model import LinearModel
from tapedist.training.steps import Problem

RATES: dict[str, Any] = {
    "sgd": optimizers.sgd(0.03),
    "momentum": optimizers.momentum(0.02, 0.9, nesterov=False),
    "nesterov": optimizers.momentum(0.02, 0.8, nesterov=True),
    "adam": optimizers.adam(0.05, 0.9, 0.999, 1e-7),
}
CONSTANTS = {
    "sgd": {"rate": 0.03},
    "momentum": {"rate": 0.02, "momentum": 0.9},
    "nesterov": {"rate": 0.02, "momentum": 0.8},
    "adam": {"rate": 0.05, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A run: which rows, what is fitted, and how."""

    mode: str = "stream"
    n: int = 1003
    d: int = 3
    dtype: str = "float32"
    cache: str = "auto"
    weighted: bool = False
    loss: str = "squared"
    optimizer: str = "sgd"
    l2: float = 0.0
    fit_intercept: bool = True
    batch_size: int = 96
    shuffle: str = "batches"
    steps: int = 3
    tiny: bool = False
    arithmetic: str = "exact"

    delta = 0.7
    seed = 3

    def source(self) -> ArraySource:
        g = np.random.Generator(np.random.Philox(self.n + self.d))
        x = g.uniform(-1, 1, (self.n, self.d)) * 2.0 ** g.integers(-3, 2, self.d) + g.uniform(-1, 1, self.d)
        y = x.sum(1) + g.uniform(-1, 1, self.n)
        if self.tiny:
            x, y = x * 1e-37, y * 1e-38
        w = np.where(g.uniform(size=self.n) < 0.2, 0.0, g.uniform(0, 3, self.n)) if self.weighted else None
        return ArraySource(x, y, w, train=self.n)

    @property
    def start(self) -> np.ndarray:
        return ref.initial_parameters(self.d + self.fit_intercept, init="normal", seed=self.seed)


def _engine(case: Case) -> tuple[Any, np.ndarray]:
    """An engine and the state at its start."""
    source, optimizer = case.source(), RATES[case.optimizer]
    model = LinearModel(case.d, fit_intercept=case.fit_intercept)
    setup = Setup(
        source=source,
        strategy=tf.distribute.get_strategy(),
        problem=Problem(
            model=model,
            loss=losses.by_name(case.loss, huber_delta=case.delta),
            optimizer=optimizer,
            dtype=tf.as_dtype(case.dtype),
            l2=case.l2,
            arithmetic=case.arithmetic,
        ),
        bounds=lambda split: Bounds.of(ranges(source, split), dtype=case.dtype),
        cache=case.cache,
        budget=2**30,
    )
    state = np.concatenate([case.start, optimizer.fresh_slots(len(case.start))])
    if case.mode == "mini_batch":
        return engines.mini_batch(setup, batch_size=case.batch_size, shuffle=case.shuffle, seed=case.seed), state
    if case.mode == "moments":
        return engines.moments(setup), state
    return engines.full_batch(setup, split="train", passes=9), state


def trained(case: Case) -> list[str]:
    """The digest of the parameters and of the losses."""
    engine, state = _engine(case)
    step, sums = 0, []
    while step < case.steps:
        done = engine.run(Call(state=state, step=step, num_steps=case.steps - step))
        assert done.applied == len(done.records)
        state, step = done.state, step + done.applied
        sums += done.records[:, :2].ravel().tolist()
    return [ref.digest(state[: len(case.start)]), ref.digest(np.array(sums))]


def specified(case: Case) -> list[str]:
    """What the reference makes of it."""
    kind, source = ref.KINDS[case.dtype], case.source()
    raw = source.x, source.y, source.w
    chunk, found = ref.as_trained(*raw, kind), ref.ranges([raw])
    penalized = np.ones(len(case.start))
    penalized[case.d :] = 0.0
    problem = ref.Problem(
        dtype=case.dtype, loss=case.loss, delta=case.delta, fit_intercept=case.fit_intercept, l2=case.l2,
        penalized=penalized, optimizer=case.optimizer, **CONSTANTS[case.optimizer],
    )  # fmt: skip
    steps: Iterator[ref.Step]
    if case.mode == "mini_batch":
        steps = ref.mini_batch(
            lambda rows: tuple(None if c is None else c[rows] for c in chunk),  # type: ignore[arg-type, return-value]
            case.start, ref.bounds(found, kind), problem,
            num_rows=case.n, batch_size=case.batch_size, shuffle=case.shuffle, seed=case.seed,
        )  # fmt: skip
    elif case.mode == "moments":
        columns = ref.columns_of(found, kind)
        moments = ref.moments(ref.moment_integers([chunk], columns), columns)
        steps = ref.moment_epochs(ref.quadratic_form(moments, fit_intercept=case.fit_intercept), case.start, problem)
    else:
        steps = ref.full_batch(lambda: [chunk], case.start, ref.bounds(found, kind), problem)
    done = list(itertools.islice(steps, case.steps))
    sums = [number for step in done for number in (step.loss_sum, step.weight)]
    return [ref.digest(done[-1].theta), ref.digest(np.array(sums))]


def _check(case: Case) -> None:
    assert trained(case) == specified(case)


# Rows that are shuffled one by one are streamed anyway.
FORMS: list[dict[str, Any]] = [
    {"mode": "stream", "cache": "auto"},
    {"mode": "stream", "cache": "none"},
    {"mode": "moments", "cache": "auto"},
    {"mode": "moments", "cache": "none"},
    {"mode": "mini_batch", "shuffle": "none", "cache": "auto", "steps": 13},
    {"mode": "mini_batch", "shuffle": "batches", "cache": "auto", "steps": 13},
    {"mode": "mini_batch", "shuffle": "batches", "cache": "none", "steps": 13},
    {"mode": "mini_batch", "shuffle": "rows", "cache": "none", "steps": 13},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form.values())))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("d", [1, 3, 17])
def test_engines_have_the_bits_of_the_reference(d: int, dtype: str, form: dict[str, Any]):
    _check(Case(d=d, dtype=dtype, **form))


@pytest.mark.parametrize(
    ("loss", "optimizer", "dtype", "weighted"),
    [
        ("squared", "adam", "float32", True), ("absolute", "momentum", "float64", False),
        ("huber", "nesterov", "float32", False), ("huber", "adam", "float64", True),
        ("absolute", "sgd", "float32", True), ("squared", "nesterov", "float64", True),
    ],
)  # fmt: skip
def test_losses_rules_weights_and_penalties(loss: str, optimizer: str, dtype: str, weighted: bool):
    whole = {"loss": loss, "optimizer": optimizer, "dtype": dtype, "weighted": weighted, "d": 2, "steps": 6}
    _check(Case(**whole, l2=0.1))
    _check(Case(**whole, l2=0.03, fit_intercept=False, mode="mini_batch", batch_size=777))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("more", [{"weighted": True}, {"l2": 0.1, "fit_intercept": False}])
def test_moments_with_weights_and_penalties(optimizer: str, more: dict[str, Any]):
    _check(Case(mode="moments", optimizer=optimizer, steps=9, **more))


SIZES: dict[str, dict[str, int]] = {
    "tiles of 16": {"TILE_ROWS": 16, "LEAST_PRODUCT_ROWS": 16, "MOST_PRODUCT_ROWS": 16},
    "tiles of 80, blocks of one": {"TILE_ROWS": 80, "LEAST_PRODUCT_ROWS": 80, "MOST_PRODUCT_ROWS": 80,
                                   "MOST_BLOCK_ROWS": 80},
    "blocks of 512 bytes": {"TILE_ROWS": 32, "LEAST_PRODUCT_ROWS": 16, "MOST_PRODUCT_ROWS": 32, "BLOCK_BYTES": 512},
}  # fmt: skip


@pytest.mark.parametrize(
    ("d", "weighted", "dtype"),
    [(1, False, "float32"), (3, False, "float64"), (2, True, "float32"), (70, False, "float64"), (5, True, "float64")],
)
def test_moments_as_devices_sum_them(d: int, weighted: bool, dtype: str, monkeypatch: pytest.MonkeyPatch):
    """By the program of GPUs."""
    monkeypatch.setattr("tapedist.training.engines._suits_host", lambda *_: False)
    for cache in ("auto", "none"):
        _check(Case(mode="moments", d=d, weighted=weighted, dtype=dtype, cache=cache))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("d", [1, 70])
def test_fast_moments_are_near_the_exact_ones(d: int, weighted: bool):
    case = Case(mode="moments", n=3001, d=d, weighted=weighted, dtype="float64")
    exact, fast = (_engine(dataclasses.replace(case, arithmetic=word))[0].moments() for word in ("exact", "fast"))
    sizes = np.sqrt(np.diag(exact.centred))
    np.testing.assert_allclose(fast.sum_weights, exact.sum_weights, rtol=1e-14)
    np.testing.assert_allclose(fast.means, exact.means, rtol=1e-13)
    assert (np.abs(fast.centred - exact.centred) <= 1e-13 * np.outer(sizes, sizes)).all()


@pytest.mark.parametrize(("sizes", "d"), [*zip(SIZES, (5, 1, 5), strict=True)])
@pytest.mark.parametrize(
    ("mode", "cache", "resident"),
    [("stream", "auto", True), ("stream", "device", False), ("stream", "none", False), ("moments", "none", False)],
)
def test_no_size_of_tiles_or_blocks_changes_a_bit(
    mode: str, cache: str, resident: bool, d: int, sizes: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in SIZES[sizes].items():
        monkeypatch.setattr(f"tapedist.data.orders.{name}", value)
    if not resident:
        monkeypatch.setattr("tapedist.data.orders.RESIDENT_BYTES", 0)
    case = Case(mode=mode, cache=cache, d=d, dtype="float64", weighted=d > 1)
    assert BlockPlan(case.n, d, 8).num_blocks > 1 or resident or sizes == "tiles of 16"
    _check(case)


@pytest.mark.parametrize("mode", ["stream", "moments"])
@pytest.mark.parametrize("n", [1, 2, 17])
def test_tiny_splits(n: int, mode: str):
    _check(Case(n=n, d=4, mode=mode))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_near_the_smallest(dtype: str):
    """Some features of float32 rows are too small to count."""
    _check(Case(tiny=True, dtype=dtype))


@pytest.mark.parametrize("batch_size", [1, 7, 5000])
def test_odd_batches(batch_size: int):
    _check(Case(mode="mini_batch", n=40, batch_size=batch_size, steps=6, weighted=True))


@pytest.mark.parametrize(
    ("d", "dtype", "more"),
    [
        (4, "float32", {}), (5, "float64", {"weighted": True}), (8, "float32", {"fit_intercept": False}),
        (10, "float64", {"loss": "huber", "fit_intercept": False}),
        (13, "float32", {"loss": "absolute", "weighted": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["stream", "mini_batch"])
def test_features_that_take_several_loops(
    mode: str, d: int, dtype: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tapedist.training.linear_sums._TOGETHER", 4)
    _check(Case(mode=mode, d=d, dtype=dtype, **more))


def test_more_features_than_one_loop_takes():
    _check(Case(d=130, n=300, steps=2))


@pytest.mark.parametrize("mode", ["stream", "mini_batch"])
def test_more_rows_than_one_sum_takes(mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tapedist.training.exact.MOST_ROWS", 48)
    _check(Case(mode=mode, d=2, batch_size=500))


@pytest.mark.parametrize("mode", ["stream", "mini_batch"])
@pytest.mark.parametrize(("loss", "dtype"), [("squared", "float32"), ("huber", "float64")])
def test_losses_that_are_not_told_move_no_parameter(mode: str, loss: str, dtype: str):
    case = Case(mode=mode, loss=loss, dtype=dtype, d=2, batch_size=300)
    engine, state = _engine(case)
    few = engine.run(Call(state=state, num_steps=9, measured=lambda epochs: epochs[1:2]))
    every = engine.run(Call(state=state, num_steps=9))
    np.testing.assert_array_equal(few.state, every.state)
    told = np.arange(9) // engine.steps_per_epoch == 1
    np.testing.assert_array_equal(few.losses, np.where(told, every.losses, np.nan))
    np.testing.assert_allclose(few.records[:, 0], every.records[:, 0], rtol=1e-9)
    np.testing.assert_array_equal(few.records[:, 1:], every.records[:, 1:])


# Passes.


class _Host:
    """Replicas that are entries of a list."""

    def __init__(self, count: int):
        self._count = count

    def given_to_first(self, sums: np.ndarray) -> list[np.ndarray]:
        return [sums.copy(), *(np.zeros_like(sums) for _ in range(self._count - 1))]

    def added(self, sums: list[np.ndarray]) -> np.ndarray:
        return np.sum(sums, axis=0)


def _host_pass(n: int, block_rows: int, replicas: int, passes: int = 3) -> BlockPass:
    """A pass whose sums are how often each row was met."""
    whole = BlockOrder.whole(n, block_rows, replicas)

    def elements(order: BlockOrder, passes: int) -> Any:
        orders = [order, *[whole] * (passes - 1)]
        return iter([[o.block(visit, r) for r in range(replicas)] for o in orders for visit in range(o.visits)])

    host: Any = _Host(replicas)
    return BlockPass(host, zero=np.zeros(n, np.int64), order=whole, passes=passes, elements=elements)


def _met(sums: list[np.ndarray], blocks: Iterator[list[range]], visits: int) -> list[np.ndarray]:
    for _ in range(visits):
        for mine, rows in zip(sums, next(blocks), strict=True):
            mine[rows.start : rows.stop] += 1
    return sums


@pytest.mark.parametrize("seed", range(8))
def test_a_pass_that_moves_between_topologies_meets_every_row_once(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_pass, "_VISITS_PER_CALL", 1)
    g = np.random.default_rng(seed)
    n = int(g.integers(1, 300))
    for _ in range(3):
        progress: dict[str, np.ndarray] = {}
        found = None
        while found is None:
            moved = _host_pass(n, int(g.integers(1, 20)), int(g.integers(1, 6)))
            moved.restore(progress)
            found = moved.run(_met, interrupted=lambda: g.random() < 0.4)
            progress = moved.progress()
        np.testing.assert_array_equal(np.sum(found, axis=0), np.ones(n))
        assert not progress
        # The next pass of the same object is whole again.
        np.testing.assert_array_equal(np.sum(moved.run(_met, interrupted=lambda: False), axis=0), np.ones(n))


@pytest.mark.parametrize("mode", ["stream", "moments"])
def test_an_interrupted_step_goes_on_in_blocks_of_another_size(mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_pass, "_VISITS_PER_CALL", 2)
    monkeypatch.setattr("tapedist.data.orders.RESIDENT_BYTES", 0)
    case = Case(mode=mode, cache="none", steps=1, weighted=True)
    progress: dict[str, np.ndarray] = {}
    done, visits = None, 0
    for rows in itertools.cycle((64, 32, 48)):
        for name in ("TILE_ROWS", "LEAST_PRODUCT_ROWS", "MOST_PRODUCT_ROWS", "MOST_BLOCK_ROWS"):
            monkeypatch.setattr(f"tapedist.data.orders.{name}", rows)
        engine, state = _engine(case)
        engine.restore(progress)
        done = engine.run(Call(state=state, interrupted=lambda: True))
        progress, visits = engine.progress(), visits + 1
        if done is not None:
            break
        assert 0 < np.diff(progress["remaining"]).sum() < case.n
    assert visits > 3
    assert ref.digest(done.state[: len(case.start)]) == specified(case)[0]


# Pins.

ON_MACHINES = [
    Case(d=1, steps=5),
    Case(d=3, loss="huber", optimizer="momentum", dtype="float64", weighted=True, l2=0.1, cache="none"),
    Case(d=17, mode="moments", optimizer="adam", steps=20),
    Case(d=2, mode="mini_batch", optimizer="adam", dtype="float64", steps=20),
]
_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import test_exact as t
print([t.trained(case) for case in t.ON_MACHINES])
"""


@pytest.mark.parametrize("isa", ["SSE4_2", "AVX2"])
def test_no_instruction_set_changes_a_bit(isa: str, run_python: Callable[..., Any]):
    """The first has no fused multiply-add."""
    flags = f"{tapedist.runtime_flags.XLA_FLAGS} --xla_cpu_max_isa={isa}"
    done = run_python("-c", _PROGRAM, str(Path(__file__).resolve().parent), env={"XLA_FLAGS": flags}, warm=True)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str([specified(case) for case in ON_MACHINES])


@pytest.mark.parametrize("words", [["--full_batch_engine=stream"], ["--mode=mini_batch"]], ids=["stream", "batches"])
def test_flags_that_let_sums_be_reordered_are_refused(words: list[str], tapedist_command: Callable[..., Any]):
    flag = "--xla_cpu_enable_fast_math=true"
    done = tapedist_command(
        "train", "--n_samples=1001", "--num_epochs=2", "--learning_rate=0.01", *words,
        env={"XLA_FLAGS": flag}, warm=True,
    )  # fmt: skip
    assert done.code == 2, done.err
    assert len(done.errors) == 1
    assert flag in done.errors[0]


_AGAIN = """
from tapedist import TrainConfig, train
from tapedist.errors import WrongAnswerError
for engine in ("stream", "moments"):
    for run in range(3):
        try:
            train(TrainConfig(n_samples=1001, num_epochs=2, learning_rate=0.01, full_batch_engine=engine))
            print(engine, "trained")
        except WrongAnswerError as error:
            print(engine, "fast_math" in str(error))
"""


def test_they_are_refused_in_every_run_of_a_process(run_python: Callable[..., Any]):
    """A program is tested once; what was found of it is remembered."""
    done = run_python("-c", _AGAIN, env={"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}, warm=True)
    assert done.code == 0, done.err
    found = [line.split() for line in done.out.splitlines()]
    assert [said for engine, said in found if engine == "stream"] == ["True"] * 3
    assert len({said for engine, said in found if engine == "moments"}) == 1  # Which fast math may leave as they are.


@pytest.mark.parametrize("form", [{}, {"cache": "device", "n": 5000}, {"mode": "mini_batch"}], ids=str)
@pytest.mark.parametrize("d", [1, 3, 9, 60])
def test_plain_sums_are_near(d: int, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tapedist.data.orders.RESIDENT_BYTES", 0 if form.get("cache") else 2**22)
    found = {}
    for arithmetic in ("exact", "plain"):
        engine, state = _engine(Case(d=d, arithmetic=arithmetic, **form))
        done = engine.run(Call(state=state, num_steps=4))
        found[arithmetic] = done.state, done.records[:, 0] / done.records[:, 1]
    for exact, plain in zip(found["exact"], found["plain"], strict=True):
        np.testing.assert_allclose(plain, exact, rtol=2e-4)


@pytest.mark.parametrize("words", [[], ["--full_batch_engine=stream"], ["--mode=mini_batch"]], ids=str)
def test_fast_goes_on_with_plain_sums_where_others_come_out_wrong(
    words: list[str], tapedist_command: Callable[..., Any]
):
    learned = []
    for flags, arithmetic in ((tapedist.runtime_flags.XLA_FLAGS, "exact"), ("--xla_cpu_enable_fast_math=true", "fast")):
        done = tapedist_command(
            "train", "--n_samples=1001", "--num_epochs=40", "--learning_rate=0.01", f"--arithmetic={arithmetic}",
            *words, env={"XLA_FLAGS": flags}, warm=True,
        )  # fmt: skip
        assert done.code == 0, done.err
        learned.append([float(number) for number in re.findall(r"Learned W: (\S+), learned B: (\S+)", done.out)[0]])
    np.testing.assert_allclose(learned[1], learned[0], rtol=1e-5)
