"""`synthetic_linear`: the rows of `tapedist.data.synthetic.SyntheticSource`, stored by TensorFlow Datasets.

Build it with `tfds build` in this folder, or from Python:

    Builder(config="tutorial", data_dir=DIR).download_and_prepare()

The `tfds` command imports apache_beam and mlcroissant, which TFDS does not install (tensorflow/datasets#5463); Python
needs neither. Then `tfds.load("synthetic_linear/tutorial", split="train", data_dir=DIR)`. Importing this module
registers the builder with TFDS, so nothing else of the package imports it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from tapedist.data.synthetic import SyntheticSource

_BLOCK_ROWS = 65_536


@dataclasses.dataclass(kw_only=True)
class SyntheticLinearConfig(tfds.core.BuilderConfig):
    """Which rows to store; one feature, and otherwise the defaults of `tapedist train`.

    Attributes:
        n_samples: rows of both splits together.
    """

    n_samples: int

    def source(self) -> SyntheticSource:
        """The source whose rows these are."""
        return SyntheticSource(
            n_samples=self.n_samples, test_fraction=0.2, seed=0, m=(9.0,), c=-2.0, mean=0.0, std=1.0, noise_std=1.0
        )  # fmt: skip


class Builder(tfds.core.GeneratorBasedBuilder):
    """Rows of `y = 9 x - 2 + noise`, in the order of their numbers."""

    # Finding it by itself, TFDS 4.9.10 imports importlib_resources, which nothing installs.
    code_path = epath.Path(__file__)
    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"1.0.0": "First release.", "2.0.0": "Rows have the same bits on every machine."}  # noqa: RUF012  (the base class declares it so)
    BUILDER_CONFIGS = [  # noqa: RUF012
        SyntheticLinearConfig(name="tutorial", description="10,000 rows.", n_samples=10_000),
        SyntheticLinearConfig(name="million", description="1,000,000 rows.", n_samples=1_000_000),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"x": np.float32, "y": np.float32}),
            supervised_keys=("x", "y"),
            disable_shuffling=True,  # Row i of a split is row i of the source.
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, np.float32]]]:
        source = self.builder_config.source()
        total = source.num_rows(split)
        for first in range(0, total, _BLOCK_ROWS):
            numbers = tf.range(first, min(first + _BLOCK_ROWS, total), dtype=tf.int64)
            x, y = source.take(split, numbers)
            for number, x_i, y_i in zip(numbers.numpy().tolist(), x.numpy()[:, 0], y.numpy(), strict=True):
                yield number, {"x": x_i, "y": y_i}
