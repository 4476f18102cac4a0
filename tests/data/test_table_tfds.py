"""Datasets of TFDS that lie on disk are tables; their headers are judged without TensorFlow."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tapedist.data.tables.table import check_table, open_table
from tapedist.errors import InputError, StateError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the dataset `tiny`: 60 rows in `train`, 10 in `test`."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        """Rows of known numbers."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            columns = {
                "x": tfds.features.Tensor(shape=(2,), dtype=np.float32),
                "y": np.float64,
                "k": np.int64,
                "w": np.float64,
                "word": tfds.features.Text(),
                "image": tfds.features.Tensor(shape=(2, 2), dtype=np.float32),
            }
            features = tfds.features.FeaturesDict(columns)
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("x", "y"))

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples(60, 70), "train": self._generate_examples(0, 60)}

        def _generate_examples(self, first, last):
            for i in range(first, last):
                image = np.zeros((2, 2), np.float32)
                yield i, {"x": [i, i / 2], "y": 3.0 * i, "k": i, "w": i + 1.0, "word": f"row {i}", "image": image}

    root = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=root).download_and_prepare()
    return root


@pytest.fixture(autouse=True)
def _data_dir(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))


def test_supervised_keys_need_no_flags():
    source = open_table("tfds:tiny", test_fraction=0.0)
    assert (source.feature_names, source.target_name, source.weighted) == (("x0", "x1"), "y", False)
    x, y = source.rows("train", np.arange(source.num_rows("train")))
    np.testing.assert_array_equal(x[:, 1], x[:, 0] / 2)
    np.testing.assert_array_equal(y, 3 * x[:, 0])
    # TFDS shuffles when it writes; the train split comes first.
    assert sorted(y[:60] / 3) == list(range(60))
    assert sorted(y[60:] / 3) == list(range(60, 70))


def test_columns_by_name_and_the_same_rows_each_time():
    first, second = (open_table("tfds:tiny:1.0.0", target="y", features=("k",), weight="w") for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    x, y, w = first.rows("train", np.arange(first.num_rows("train")))
    np.testing.assert_array_equal(y, 3 * x[:, 0])
    np.testing.assert_array_equal(w, x[:, 0] + 1)
    assert first.notices == ()  # Whoever names the features knows what is left out.


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ("tfds:other", {}, "is not in"),
        ("tfds:other", {}, "nothing is downloaded"),
        ("tfds:tiny:2.0.0", {}, "present: 1.0.0"),
        ("tfds:tiny/config", {}, "is not in"),
        ("tfds:", {}, "must be tfds:NAME"),
        ("tfds:../tiny", {}, "must be tfds:NAME"),
        ("tfds:tiny", {"target": "word"}, "--target=word: holds no real scalar or vector"),
        ("tfds:tiny", {"target": "z"}, "present: image, k, w, word, x0, x1, y"),
    ],
)
def test_header(data: str, settings: dict, message: str):
    with pytest.raises(InputError) as caught:
        check_table(data, **settings)
    assert message in str(caught.value)


def test_header_needs_no_tensorflow(run_python, data_dir: Path):
    code = (
        "import sys; from tapedist.data.tables.table import check_table; check_table('tfds:tiny')\n"
        "assert 'tensorflow' not in sys.modules; print('fine')"
    )
    done = run_python("-c", code, env={"TFDS_DATA_DIR": str(data_dir)})
    assert done.out == "fine\n", done.err


def test_change_between_header_and_rows(data_dir: Path):
    reader = check_table("tfds:tiny").reader
    record = next(data_dir.glob("tiny/1.0.0/*train*"))
    times = record.stat()
    os.utime(record, ns=(1, 1))
    try:
        with pytest.raises(StateError, match="changed while in use"):
            list(reader.batches(("y",)))
    finally:
        os.utime(record, ns=(times.st_atime_ns, times.st_mtime_ns))
