"""TrainConfig: ranges, words, combinations, what it takes from library users, and its fingerprint."""

from __future__ import annotations

import dataclasses
import decimal
import enum
import fractions
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapedist.config import TrainConfig
from tapedist.errors import InputError

# field -> (values at the edge that are valid, values just beyond it)
EDGES: dict[str, tuple[list[Any], list[Any]]] = {
    "n_samples": ([1, 2**62 - 1], [0, -1, 2**62, 2**63, 10**5000]),
    "num_features": ([1, 2**20], [0, 2**20 + 1]),
    "m": ([0.0, -1e300], [math.nan, math.inf, ()]),
    "c": ([-1e300], [math.nan, -math.inf]),
    "mean": ([1e9], [math.inf]),
    "std": ([0.0], [-1e-9, math.nan, math.inf]),
    "noise_std": ([0.0], [-1.0, math.nan]),
    "test_fraction": ([0.0, 0.999], [1.0, -0.1, math.nan]),
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "huber_delta": ([1e-9], [0.0, math.inf]),
    "l2": ([0.0], [-1.0, math.nan]),
    "num_epochs": ([0, 2**53], [-1, 2**53 + 1]),
    "batch_size": ([1, 2**40], [0, -1, 2**40 + 1]),
    "learning_rate": ([1e-300, 1e300], [0.0, -1.0, math.nan, math.inf]),
    "momentum": ([0.0, 0.999], [1.0, -0.1]),
    "adam_beta_1": ([0.0], [1.0]),
    "adam_beta_2": ([0.0], [1.0]),
    "adam_epsilon": ([1e-300], [0.0]),
    "stop_at_se": ([0.0, 0.01], [-1.0, math.nan, math.inf]),
    "early_stop_patience": ([0, 3], [-1]),
    "early_stop_gradient_norm": ([0.0, 1e-300], [-1.0, math.nan, math.inf]),
    "early_stop_every_epochs": ([1], [0]),
    "num_virtual_devices": ([0, 16], [-1, 257]),
    "steps_per_call": ([0, 2**31], [-1, 2**31 + 1]),
    "worker_index": ([-1, 0], [-2]),
    "cluster_timeout_secs": ([0.1, 1e9], [0.0, -1.0, math.inf, math.nan]),
    "peer_timeout_secs": ([1.0, 1e9], [0.9, math.inf, math.nan]),
    "checkpoint_every_secs": ([0.0], [-1.0, math.nan, math.inf]),
    "checkpoint_every_steps": ([0], [-1]),
    "log_every_epochs": ([1], [0]),
    "eval_every_epochs": ([0], [-1]),
}


def test_every_number_has_edges():
    fields = dataclasses.fields(TrainConfig)
    of_numbers = ("tuple[float, ...]", "float | str", "int | str")
    numbers = {f.name for f in fields if type(f.default) in (int, float) or f.type in of_numbers}
    assert set(EDGES) == numbers


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str):
    inside, outside = EDGES[name]
    for value in inside:
        TrainConfig(**{name: value})
    for value in outside:
        with pytest.raises(InputError) as caught:
            TrainConfig(**{name: value})
        assert any(problem.startswith(f"--{name}=") for problem in caught.value.problems), value
        assert all(len(problem) < 250 for problem in caught.value.problems)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainConfig) if f.metadata["choices"]])
def test_words_are_listed(name: str):
    field = next(field for field in dataclasses.fields(TrainConfig) if field.name == name)
    with pytest.raises(InputError) as caught:
        TrainConfig(**{name: "nonsense"})
    assert caught.value.problems[0] == f"--{name}=nonsense: must be one of {', '.join(field.metadata['choices'])}"


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"m": (1, 2), "num_features": 3}, "--m=1.0,2.0: has 2 values for --num_features=3"),
        ({"full_batch_engine": "moments", "loss": "huber"}, "--full_batch_engine=moments: needs --loss=squared"),
        ({"full_batch_engine": "stream", "mode": "mini_batch"}, "--full_batch_engine=stream: has no meaning with"),
        ({"num_virtual_devices": 2, "strategy": "default"}, "--num_virtual_devices=2: has no meaning with"),
        ({"resume": "must"}, "--resume=must: needs --run_dir"),
        ({"data": ""}, "--data=: must name a source"),
        ({"run_dir": "gs://b/r"}, "--run_dir=gs://b/r: must be a local path"),
        ({"data": "a\0b"}, r"--data='a\x00b': must not hold control characters"),
        ({"tpu": " x"}, "--tpu=' x': must not hold control characters, nor blanks at its ends"),
        ({"seed": True}, "--seed=True: must be of type int, not bool"),
        ({"seed": 1.0}, "--seed=1.0: must be of type int, not float"),
        ({"plots": 1}, "--plots=1: must be of type bool, not int"),
        ({"learning_rate": "0.1"}, "--learning_rate=0.1: must be finite and above 0, or auto"),
        ({"learning_rate": 10**400}, "--learning_rate=1000"),
        ({"m": "9"}, "--m='9': must be a list of numbers, not str"),
        ({"run_dir": b"x"}, "--run_dir=b'x': must be of type str, not bytes"),
        ({"target": "y"}, "--target=y: has no meaning with --data=synthetic"),
        ({"features": ("a", "b")}, "--features=a,b: has no meaning with --data=synthetic"),
        ({"weight": "w"}, "--weight=w: has no meaning with --data=synthetic"),
        ({"on_bad_rows": "drop"}, "--on_bad_rows=drop: has no meaning with --data=synthetic"),
        ({"split": "hash"}, "--split=hash: has no meaning with --data=synthetic"),
        ({"data": "t.csv", "features": ("a", "b\n")}, "--features='b\\n': must not hold control characters"),
        ({"data": "t.csv", "features": (1,)}, "--features=(1,): must be a list of names, not tuple"),
        ({"standardize": 1}, "--standardize=1: must be of type str, not int"),
        ({"stop_at_se": 0.1, "loss": "huber"}, "--stop_at_se=0.1: needs --loss=squared"),
        ({"stop_at_se": 0.1, "l2": 0.5}, "--stop_at_se=0.1: has no meaning with --l2=0.5"),
        ({"early_stop_patience": 2, "test_fraction": 0}, "--early_stop_patience=2: needs test rows"),
    ],
)
def test_one_problem(settings: dict[str, Any], start: str):
    with pytest.raises(InputError) as caught:
        TrainConfig(**settings)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(start)


def test_all_problems_at_once():
    with pytest.raises(InputError) as caught:
        TrainConfig(mode="x", batch_size=0, learning_rate=-1, m=(1, 2), resume="must")
    assert [problem.partition("=")[0] for problem in caught.value.problems] == [
        "--mode",
        "--batch_size",
        "--learning_rate",
        "--m",
        "--resume",
    ]
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert isinstance(caught.value, ValueError)


def test_what_library_users_pass():
    config = TrainConfig(
        n_samples=np.int64(5),
        learning_rate=np.float32(0.5),
        c=3,
        m=[1, np.float64(2)],
        num_features=2,
        run_dir=Path("a"),
    )
    values = (config.n_samples, config.learning_rate, config.c, config.m, config.run_dir)
    assert values == (5, 0.5, 3.0, (1.0, 2.0), "a")
    assert [type(value) for value in values] == [int, float, float, tuple, str]
    assert TrainConfig(num_features=3, m=7).m == (7.0, 7.0, 7.0)


class Mode(str, enum.Enum):  # noqa: UP042  (What older programs write; its `str` is "Mode.MINI".)
    MINI = "mini_batch"


class Choice(enum.Enum):
    MINI = "mini_batch"
    RATE = np.float32(0.1)
    LEVEL = 7


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        *((name, given, bool(given)) for name in ("fit_intercept", "plots") for given in np.array([True, False])),
        ("fit_intercept", np.array(False), False),
        ("standardize", np.True_, "true"),
        ("statistics", np.False_, "false"),
        ("num_epochs", np.uint8(7), 7),
        ("num_epochs", np.array(7), 7),
        ("num_epochs", Choice.LEVEL, 7),
        # A float32 means its own decimal number, not the float64 of the same bits.
        ("learning_rate", np.float32(0.1), 0.1),
        ("learning_rate", np.float16(0.1), 0.1),
        ("learning_rate", np.array(0.1, np.float32), 0.1),
        ("learning_rate", np.longdouble(0.5), 0.5),
        ("learning_rate", Choice.RATE, 0.1),
        ("learning_rate", decimal.Decimal("0.1"), 0.1),
        ("learning_rate", fractions.Fraction(1, 10), 0.1),
        ("learning_rate", np.str_("auto"), "auto"),
        ("mode", np.array(["mini_batch"])[0], "mini_batch"),
        ("mode", Mode.MINI, "mini_batch"),
        ("mode", Choice.MINI, "mini_batch"),
        ("run_dir", np.str_("runs/a"), "runs/a"),
        ("data", Path("t.csv"), "t.csv"),
        ("features", np.array(["a", "b"]), ("a", "b")),
        ("features", ["a", np.str_("b"), Mode.MINI], ("a", "b", "mini_batch")),
        ("m", np.array([0.1, 2], np.float32), (0.1, 2.0)),
        ("m", [np.float32(0.1), 2], (0.1, 2.0)),
    ],
)
def test_values_that_come_out_of_numpy_or_an_enumeration(name: str, given: Any, meant: Any):
    beside = {"features": {"data": "t.csv"}, "data": {"target": "y"}, "m": {"num_features": 2}}.get(name, {})
    config = TrainConfig(**{name: given, **beside})
    value = getattr(config, name)
    assert value == meant
    assert type(value) is type(meant)
    if isinstance(meant, tuple):
        assert [type(item) for item in value] == [type(item) for item in meant]
    assert config.fingerprint() == TrainConfig(**{name: meant, **beside}).fingerprint()


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("fit_intercept", np.int64(1), "--fit_intercept=np.int64(1): must be of type bool, not int64"),
        ("fit_intercept", np.array([True]), "--fit_intercept=array([ True]): must be of type bool, not ndarray"),
        ("num_epochs", np.True_, "--num_epochs=np.True_: must be of type int, not bool"),
        ("num_epochs", np.float64(5), "--num_epochs=np.float64(5.0): must be of type int, not float64; give 5"),
        ("num_epochs", 1e3, "--num_epochs=1000.0: must be of type int, not float; give 1000"),
        ("num_epochs", 2.5, "--num_epochs=2.5: must be of type int, not float"),
        ("learning_rate", np.complex64(1), "--learning_rate=np.complex64(1+0j): must be of type float, not complex64"),
        ("learning_rate", np.timedelta64(5, "s"), "must be of type float, not timedelta64"),
        ("learning_rate", np.array([0.1]), "--learning_rate=array([0.1]): must be of type float, not ndarray"),
        ("mode", Choice.LEVEL, "--mode=<Choice.LEVEL: 7>: must be of type str, not Choice"),
        ("data", np.zeros((2, 2)), "--data='array([[0., 0.],\\n       [0., 0.]])': must be of type str, not ndarray"),
        ("features", {"a", "b"}, "must be a list of names, not set"),
        ("m", np.zeros((1, 1)), "--m=array([[0.]]): must be a list of numbers, not ndarray"),
    ],
)
def test_values_that_only_look_right(name: str, given: Any, said: str):
    with pytest.raises(InputError) as caught:
        TrainConfig(**{name: given})
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


class TwoSplits:
    """As much of a source as is asked for its rows."""

    def __init__(self, test: int = 0):
        self._rows = {"train": 80, "test": test}

    def num_rows(self, split: str) -> int:
        return self._rows[split]


@pytest.mark.parametrize(
    ("settings", "test_rows", "said"),
    [
        ({}, 0, []),
        ({"test_fraction": 0.0}, 0, []),
        ({"test_fraction": 0.0}, 9, ["--test_fraction=0.0; ArraySource(..., test_rows=N) holds rows out"]),
        (
            {"test_fraction": 0.5, "data": "no_such.csv", "target": "y"},
            0,
            ["--data=no_such.csv, --target=y, --test_fraction=0.5; ArraySource(..., test_rows=N) holds rows out"],
        ),
        ({"n_samples": 50, "m": (1.0, 2.0), "num_features": 2}, 0, ["--n_samples=50, --num_features=2, --m=1.0,2.0"]),
        (
            {"data": "t.csv", "split": "index", "on_bad_rows": "drop"},
            0,
            ["--data=t.csv, --on_bad_rows=drop, --split=index"],
        ),
    ],
)
def test_settings_of_rows_do_nothing_beside_a_source(settings: dict[str, Any], test_rows: int, said: list[str]):
    wanted = [f"no effect with rows from a source of your own: {text}" for text in said]
    assert list(TrainConfig(**settings).without_effect_beside(TwoSplits(test_rows))) == wanted
    config = TrainConfig(**settings, momentum=0.5)
    assert list(config.without_effect_beside(TwoSplits(test_rows)))[-1] == (
        "no effect with --optimizer=sgd: --momentum=0.5"
    )


def test_what_depends_on_the_source():
    synthetic, table = TrainConfig(), TrainConfig(data="t.csv", features="a")
    assert (synthetic.standardizes, synthetic.split_kind) == (False, "index")
    assert (table.standardizes, table.split_kind, table.features) == (True, "hash", ("a",))
    assert TrainConfig(standardize=True).standardizes
    assert not TrainConfig(data="t.csv", standardize=False).standardizes
    assert TrainConfig(data="t.csv", split="index").split_kind == "index"


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        TrainConfig("synthetic")  # type: ignore[misc]


def test_fingerprint_tells_answers_apart_and_nothing_else():
    base = TrainConfig().fingerprint()
    assert len(base) == 64
    assert TrainConfig(m=9).fingerprint() == base
    for same in ({"num_virtual_devices": 4}, {"strategy": "mirrored"}, {"run_dir": "x"}, {"num_epochs": 7}):
        assert TrainConfig(**same).fingerprint() == base
    other = [{"seed": 1}, {"learning_rate": 0.1}, {"m": 8}, {"arithmetic": "fast"}, {"dtype": "float64"}, {"data": "x"}]
    assert len({base, *(TrainConfig(**settings).fingerprint() for settings in other)}) == len(other) + 1


@pytest.mark.parametrize("asked", ["auto", "exact", "fast"])
def test_arithmetic_is_exact_but_on_a_tpu(asked: str):
    config = TrainConfig(arithmetic=asked)
    for strategy in ("default", "mirrored", "multiworker"):
        assert config.with_arithmetic(strategy).arithmetic == {"auto": "exact"}.get(asked, asked)
    if asked == "exact":
        with pytest.raises(InputError, match=r"^--arithmetic=exact: a TPU has no .*; use --arithmetic=fast$"):
            config.with_arithmetic("tpu")
    else:
        assert config.with_arithmetic("tpu").arithmetic == "fast"


def test_every_field_explains_itself():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"].endswith(".")
        assert isinstance(field.metadata["changes_answer"], bool)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"num_features": 2, "n_samples": 50}, []),
        (
            {"momentum": 0.5, "huber_delta": 2.0},
            ["--optimizer=sgd: --momentum=0.5", "--loss=squared: --huber_delta=2.0"],
        ),
        ({"momentum": 0.5, "optimizer": "nesterov"}, []),
        (
            {"data": "t.csv", "target": "y", "n_samples": 50, "m": (9.0, 9.0), "num_features": 2},
            ["--data=t.csv: --n_samples=50, --num_features=2"],
        ),
    ],
)
def test_what_has_no_effect_is_said(settings: dict[str, Any], said: list[str]):
    assert list(TrainConfig(**settings).without_effect()) == [f"no effect with {text}" for text in said]
