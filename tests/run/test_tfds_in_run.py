"""A dataset of TFDS through `tapedist train`: its rows, weights, bad rows, and resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Finished

SYNTHETIC = "tfds:synthetic_linear/tutorial"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the synthetic dataset, and `odd`: weights, and a feature that is not finite in 7 rows."""
    import tensorflow_datasets as tfds

    from tapedist.data.synthetic_linear.synthetic_linear_dataset_builder import Builder

    class Odd(tfds.core.GeneratorBasedBuilder):
        """Rows of known numbers."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            columns = {"x": np.float64, "y": np.float64, "w": np.float64}
            features = tfds.features.FeaturesDict(columns)
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("x", "y"))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(400):
                yield i, {"x": np.nan if i % 60 == 5 else i / 100, "y": 2.0 * (i / 100) - 1, "w": float(i % 3)}

    root = tmp_path_factory.mktemp("tfds")
    Odd(data_dir=root).download_and_prepare()
    Builder(config="tutorial", data_dir=root).download_and_prepare()
    return root


@pytest.fixture
def train(tapedist_command: Callable[..., Finished], data_dir: Path) -> Callable[..., Finished]:
    env = {"TFDS_DATA_DIR": str(data_dir)}
    return lambda *words: tapedist_command("train", *words, "--plots=false", env=env, warm=True)


def test_rows_are_the_synthetic_sources(data_dir: Path, monkeypatch: pytest.MonkeyPatch):
    from tapedist.data.synthetic_linear.synthetic_linear_dataset_builder import Builder
    from tapedist.data.tables.table import open_table

    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    table = open_table(SYNTHETIC, split="index", test_fraction=0.2)
    source = Builder(config="tutorial", data_dir=data_dir).builder_config.source()
    for split, count in (("train", 8000), ("test", 2000)):
        assert table.num_rows(split) == count
        found = table.rows(split, np.arange(count))
        for column, expected in zip(found, source.take(split, np.arange(count)), strict=True):
            np.testing.assert_array_equal(column, expected.numpy())


@pytest.mark.parametrize(
    "mode", [[], ["--full_batch_engine=stream"], ["--mode=mini_batch", "--batch_size=128", "--shuffle=batches"]]
)
def test_one_digest_with_the_same_rows_in_a_file(
    train: Callable[..., Finished], tmp_path: Path, mode: list[str], data_dir: Path
):
    """The synthetic source has its bounds from its settings, not from its rows: its bits are others, its fit the same.

    The bounds of tables are those of their rows, whatever holds them.
    """
    from tapedist.data.synthetic_linear.synthetic_linear_dataset_builder import Builder

    source = Builder(config="tutorial", data_dir=data_dir).builder_config.source()
    x, y = (np.concatenate([source.take(split, np.arange(count))[column].numpy() for split, count in
            (("train", 8000), ("test", 2000))]) for column in (0, 1))  # fmt: skip
    np.savez(tmp_path / "rows.npz", x=x, y=y)
    same = ["--num_epochs=30", "--learning_rate=0.001", "--init=normal", "--statistics=false", *mode]
    as_table = ["--standardize=false", "--split=index", "--test_fraction=0.2"]
    models = []
    file = [f"--data={tmp_path / 'rows.npz'}", "--target=y", *as_table]
    for name, words in (("tfds", [f"--data={SYNTHETIC}", *as_table]), ("file", file), ("source", [])):
        done = train(*same, *words, f"--run_dir={tmp_path / name}")
        assert done.code == 0, done.err
        models.append(json.loads((tmp_path / name / "model.json").read_text()))
    table, arrays, generated = models
    assert table["digest"] == arrays["digest"]
    np.testing.assert_allclose(table["parameters"], generated["parameters"], rtol=1e-6)


def test_weights_bad_rows_and_resume(train: Callable[..., Finished], tmp_path: Path):
    flags = ["--data=tfds:odd", "--target=y", "--features=x", "--weight=w", "--learning_rate=0.3", "--dtype=float64"]
    flags += ["--test_fraction=0", "--mode=mini_batch", "--batch_size=50"]
    refused = train(*flags, "--num_epochs=3")
    assert refused.code == 2
    assert len(refused.errors) == 1
    assert "tfds:odd:train:row " in refused.errors[0]
    assert "nan is not finite" in refused.errors[0]
    flags += ["--on_bad_rows=drop"]
    whole = train(*flags, "--num_epochs=40", f"--run_dir={tmp_path}/whole")
    assert whole.code == 0, whole.err
    assert "7 of 400 rows have bad cells and are left out" in whole.out
    for epochs in (15, 40):
        assert train(*flags, f"--num_epochs={epochs}", f"--run_dir={tmp_path}/parts").code == 0
    models = [json.loads((tmp_path / name / "model.json").read_text()) for name in ("whole", "parts")]
    assert models[0]["digest"] == models[1]["digest"]
    np.testing.assert_allclose([models[0]["weights"][0], models[0]["bias"]], [2, -1], rtol=1e-6)
