"""Many trainings in one process: what is compiled serves all of a kind, keeps nothing of a run, and memory stays."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tapedist.config import TrainConfig
from tapedist.data.array_source import ArraySource
from tapedist.run import train

FORMS: dict[str, dict[str, Any]] = {
    "moments": {},
    "stream": {"full_batch_engine": "stream"},
    "blocks": {"full_batch_engine": "stream", "cache": "none"},
    "mini-batch": {"mode": "mini_batch", "batch_size": 16, "shuffle": "rows"},
}
# What must not be met again in another run: numbers of the penalty, of the rules and of the loss.
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"learning_rate": 0.03},
    {"l2": 0.2},
    {"l2": 0.2, "standardize": "false", "learning_rate": 0.01},
    {"optimizer": "momentum"},
    {"optimizer": "momentum", "momentum": 0.5},
    {"optimizer": "adam", "adam_beta_1": 0.7, "l2": 0.1},
    {"fit_intercept": False},
    {"dtype": "float64"},
)


def _rows(seed: int, n: int = 80) -> ArraySource:
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 3)) * [1.0, 2.0, 0.5]
    return ArraySource(x, x @ [1.0, 2.0, 3.0] + random.normal(size=n))


def _train(seed: int = 0, **settings: Any) -> str:
    config = TrainConfig(**{"num_epochs": 5, "learning_rate": 0.1, "test_fraction": 0.0, **settings})
    return train.train(config, source=_rows(seed)).digest


def _forget() -> None:
    vars(tf.distribute.get_strategy()).pop("_tapedist_programs", None)


def test_trainings_in_threads_give_the_bits_of_each_alone():
    """Programs of float64 and float32 rows are traced side by side; only the former pin their products."""
    settings: list[dict[str, Any]] = [
        {**form, "dtype": dtype, "optimizer": optimizer}
        for form in FORMS.values()
        for dtype, optimizer in (("float64", "adam"), ("float32", "sgd"))
    ]
    alone = [_train(**each) for each in settings]
    _forget()
    with concurrent.futures.ThreadPoolExecutor(len(settings)) as pool:
        together = list(pool.map(lambda each: _train(**each), settings))
    assert together == alone


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_one_run_is_in_the_next(form: str, monkeypatch: pytest.MonkeyPatch):
    if form == "blocks":
        monkeypatch.setattr("tapedist.data.orders.RESIDENT_BYTES", 0)
    alone = []
    for number, settings in enumerate(SETTINGS):
        _forget()
        alone.append(_train(seed=number, **FORMS[form], **settings))
    assert len(set(alone)) == len(alone)
    for number, settings in reversed([*enumerate(SETTINGS)]):
        assert _train(seed=number, **FORMS[form], **settings) == alone[number], settings


def test_huber_knows_its_delta():
    alone = []
    for delta in (0.5, 2.0):
        _forget()
        alone.append(_train(loss="huber", huber_delta=delta))
    assert [_train(loss="huber", huber_delta=delta) for delta in (0.5, 2.0)] == alone
    assert alone[0] != alone[1]


def test_an_own_loss_is_looked_at_anew():
    power = 2.0

    def loss(y_hat: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return tf.abs(y_hat - y) ** power

    config = TrainConfig(num_epochs=5, learning_rate=0.05, test_fraction=0.0)
    first = train.train(config, source=_rows(0), loss=loss).digest
    power = 1.5
    assert train.train(config, source=_rows(0), loss=loss).digest != first


def test_threads_share_what_is_compiled():
    wanted = [_train(**form) for form in FORMS.values()]
    found: dict[int, list[str]] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: [_train(**form) for form in FORMS.values()]}))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: wanted, 1: wanted}


_MEMORY = """
import gc
import numpy as np
from tapedist import ArraySource, TrainConfig, train
from tapedist.sklearn import TapeRegressor

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

def fits(seed):
    random = np.random.default_rng(seed)
    x = random.normal(size=(80, 3))
    y = x @ [1.0, 2.0, 3.0] + random.normal(size=80)
    with open("t.csv", "w") as file:
        file.write("a,b,c,y\\n" + "".join(",".join(map(str, [*row, t])) + "\\n" for row, t in zip(x, y)))
    few = {"num_epochs": 5, "test_fraction": 0.0}
    train(TrainConfig(**few, learning_rate="auto"), source=ArraySource(x, y))
    ridge = TrainConfig(**few, learning_rate=0.1, l2=0.01 * (seed + 1), full_batch_engine="stream")
    train(ridge, source=ArraySource(x, y))
    train(TrainConfig(**few, learning_rate=0.1, mode="mini_batch", batch_size=16), source=ArraySource(x, y))
    train(TrainConfig(**few, learning_rate=0.1, data="t.csv", target="y"))
    train(TrainConfig(**few, learning_rate=0.1, n_samples=80, seed=seed))
    TapeRegressor(num_epochs=5, learning_rate=0.1, l2=0.1).fit(x, y)

for seed in range(3):
    fits(seed)
before = resident()
for seed in range(3, 8):
    fits(seed)
print(resident() - before)
"""


def test_memory_stays(run_python: Callable[..., Any]):
    done = run_python("-c", _MEMORY, warm=True)
    assert done.code == 0, done.err
    assert float(done.out) < 60  # Of 30 trainings; each took about 10 MiB when each compiled its own programs.
