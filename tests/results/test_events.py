import math

import pytest
from fake_filesystem import file_size_limit

from tapedist.errors import StorageError
from tapedist.results.events import EventFiles
from tapedist.training.interfaces import Row


def row(step, loss=1.0, split="train", rate=2.5e6):
    return Row(step=step, epoch=step, split=split, loss=loss, penalty=0.0, examples_per_sec=rate, seconds=1.5e9 + step)


def read(directory):
    """All events of all files of a folder, in TensorBoard's order."""
    import tensorflow as tf

    names = sorted(map(str, directory.glob("events.out.tfevents.*")))
    return [tf.compat.v1.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(names)]


def scalars(directory):
    return [(e.step, e.wall_time, v.tag, v.simple_value) for e in read(directory) for v in e.summary.value]


def test_tensorboard_reads_what_was_recorded(tmp_path):
    files = EventFiles(tmp_path / "events", clock=lambda: 1.6e9)
    files.record(row(0, loss=51.5))
    files.record(row(0, loss=50.5, split="test", rate=None))
    files.record(row(2**40, loss=math.nan))
    files.close()
    assert read(tmp_path / "events")[0].file_version == "brain.Event:2"
    found = scalars(tmp_path / "events")
    assert found[:3] == [
        (0, 1.5e9, "loss/train", 51.5),
        (0, 1.5e9, "examples_per_sec", 2.5e6),
        (0, 1.5e9, "loss/test", 50.5),
    ]
    assert found[3][0] == 2**40
    assert math.isnan(found[3][3])


def test_a_resumed_run_has_its_own_file_and_replaces_later_steps(tmp_path):
    for first in (0, 3):
        files = EventFiles(tmp_path, clock=lambda: 1.6e9)  # Two files within one second.
        for step in range(first, 5):
            files.record(row(step))
        files.close()
    assert len(list(tmp_path.iterdir())) == 2
    starts = [e.step for e in read(tmp_path) if e.HasField("session_log")]
    assert starts == [0, 3]


def test_rows_reach_a_watching_tensorboard(tmp_path):
    now = [0.0]
    files = EventFiles(tmp_path, clock=lambda: now[0])
    files.record(row(1))
    now[0] = 5.0
    files.tick()
    assert len(scalars(tmp_path)) == 2
    files.close()


def test_no_rows_no_files(tmp_path):
    files = EventFiles(tmp_path / "events")
    files.tick()
    files.close()
    assert not (tmp_path / "events").exists()


def test_a_full_disk_is_a_storage_error(tmp_path):
    files = EventFiles(tmp_path)
    files.record(row(0))
    files.flush()
    for step in range(1, 100):
        files.record(row(step))
    with file_size_limit(500), pytest.raises(StorageError, match="cannot write"):
        files.flush()


def test_a_file_in_the_way_is_a_storage_error(tmp_path):
    (tmp_path / "events").write_text("not a folder")
    with pytest.raises(StorageError, match="events"):
        EventFiles(tmp_path / "events").record(row(0))
