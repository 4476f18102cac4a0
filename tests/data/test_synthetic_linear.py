"""The dataset that TensorFlow Datasets builds holds the rows of the built-in source, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import unittest
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tapedist.data.synthetic_linear.synthetic_linear_dataset_builder import Builder

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "tapedist" / "data" / "synthetic_linear"
# The `tfds` command imports these whatever it is asked to do (tensorflow/datasets#5463); where one is missing, the same
# build command is run without the other commands beside it.
_OF_THE_COMMAND = ("apache_beam", "mlcroissant")
_BUILD = """
import sys
from absl import app
from tensorflow_datasets.scripts.cli import build, cli_utils
app.run(lambda args: args.execute(), flags_parser=cli_utils.make_flags_parser(build.Args, description="build"))
"""


def test_passes_the_checks_of_tensorflow_datasets():
    class Checks(tfds.testing.DatasetBuilderTestCase):
        DATASET_CLASS = Builder
        BUILDER_CONFIG_NAMES_TO_TEST = ["tutorial"]  # noqa: RUF012
        SPLITS = {"train": 8000, "test": 2000}  # noqa: RUF012
        EXAMPLE_DIR = str(FOLDER)  # Any folder: nothing is downloaded, so there is no download to fake.

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Checks).run(result)
    assert result.testsRun > 0
    assert not [*result.errors, *result.failures]


def _rows(dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    block = next(iter(dataset.batch(10**6)))
    return block["x"].numpy(), block["y"].numpy()


def test_built_rows_equal_the_source(tmp_path):
    command = [sys.executable, "-c", _BUILD]
    if all(map(importlib.util.find_spec, _OF_THE_COMMAND)):
        command = [sys.executable, "-m", "tensorflow_datasets.scripts.cli.main", "build"]
    subprocess.run(
        [*command, "--config=tutorial", f"--data_dir={tmp_path}"],
        cwd=FOLDER,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        check=True,
        capture_output=True,
    )
    source = Builder(config="tutorial", data_dir=str(tmp_path)).builder_config.source()
    for split, count in [("train", 8000), ("test", 2000)]:
        x, y = _rows(tfds.load("synthetic_linear/tutorial", split=split, data_dir=str(tmp_path), download=False))
        expected_x, expected_y = source.take(split, tf.range(count, dtype=tf.int64))
        assert x.dtype == y.dtype == np.float32
        assert np.array_equal(x, expected_x.numpy()[:, 0])
        assert np.array_equal(y, expected_y.numpy())


def test_configs_are_the_tutorial_and_a_million():
    configs = {config.name: config.source() for config in Builder.BUILDER_CONFIGS}
    sizes = {name: (source.num_rows("train"), source.num_rows("test")) for name, source in configs.items()}
    assert sizes == {"tutorial": (8000, 2000), "million": (800_000, 200_000)}


@pytest.mark.parametrize("module", ["tapedist", "tapedist.data.synthetic", "tapedist.data.synthetic_linear"])
def test_nothing_else_imports_the_builder(module):
    program = f"import sys, {module}; assert not any('tensorflow_datasets' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(REPO)}, check=True)
