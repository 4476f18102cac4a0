import json
import logging
import math
import time

import pytest
from fake_filesystem import file_size_limit

from tapedist.errors import StorageError
from tapedist.storage.metrics_file import MetricsFile, as_json, read_rows
from tapedist.training.interfaces import Row


def row(step, loss=1.0, split="train", rate=1e6):
    return Row(step=step, epoch=step // 2, split=split, loss=loss, penalty=0.5, examples_per_sec=rate, seconds=1.5e9)


def test_a_line_has_the_agreed_keys():
    assert json.loads(as_json(row(7))) == {
        "time": 1.5e9,
        "step": 7,
        "epoch": 3,
        "split": "train",
        "loss": 1.0,
        "penalty": 0.5,
        "examples_per_sec": 1e6,
    }


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(loss):
    def refuse(word):
        raise AssertionError(word)

    entry = json.loads(as_json(row(0, loss=loss, rate=math.inf)), parse_constant=refuse)
    assert entry["loss"] is None
    assert entry["examples_per_sec"] is None


def test_losses_keep_every_bit(tmp_path):
    loss = 0.1 + 0.2
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.record(row(1, loss=loss))
    file.record(row(2, loss=math.nan, rate=None))
    file.close()
    first, second = read_rows(file.path)
    assert first == row(1, loss=loss)
    assert math.isnan(second.loss)
    assert second.examples_per_sec is None


def test_position_is_what_is_on_disk(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.position() == 0
    file.record(row(1))
    assert file.position() == file.path.stat().st_size == len(as_json(row(1))) + 1
    file.close()


def test_rows_reach_followers_within_a_second(tmp_path):
    now = [0.0]
    file = MetricsFile(tmp_path / "metrics.jsonl", clock=lambda: now[0])
    file.start()
    file.record(row(1))
    file.tick()
    assert file.path.stat().st_size == 0
    now[0] = 1.0
    file.tick()
    assert len(read_rows(file.path)) == 1
    file.close()


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("of a run that died before its first checkpoint\n")
    file = MetricsFile(path)
    file.record(row(1))
    file.close()
    assert read_rows(path) == [row(1)]


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    whole = MetricsFile(tmp_path / "whole.jsonl")
    for step in range(10):
        whole.record(row(step))
    whole.close()

    broken = MetricsFile(tmp_path / "broken.jsonl")
    for step in range(6):
        broken.record(row(step))
        if step == 3:
            position = broken.position()
    broken.close()
    with open(broken.path, "a") as file:
        file.write('{"time": 1.0, "st')  # torn by a kill

    resumed = MetricsFile(broken.path)
    resumed.rewind(position)
    for step in range(4, 10):
        resumed.record(row(step))
    resumed.close()
    assert broken.path.read_bytes() == whole.path.read_bytes()


def test_rewind_forgets_buffered_rows(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.record(row(1))
    position = file.position()
    file.record(row(2))
    file.rewind(position)
    file.record(row(3))
    file.close()
    assert [r.step for r in read_rows(file.path)] == [1, 3]


def test_rewind_of_a_shortened_file_keeps_whole_lines_and_warns(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text(as_json(row(1)) + '\n{"torn')
    file = MetricsFile(path)
    with caplog.at_level(logging.WARNING):
        file.rewind(10_000)
    file.record(row(2))
    file.close()
    assert [r.step for r in read_rows(path)] == [1, 2]
    assert len(caplog.records) == 1


def test_reading_stops_at_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(as_json(row(1)) + "\n" + as_json(row(2)))
    assert read_rows(path) == [row(1)]


def test_a_full_disk_is_a_storage_error_and_leaves_no_torn_line(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.record(row(1))
    good = file.position()
    for step in range(2, 100):
        file.record(row(step))
    with file_size_limit(good + 200), pytest.raises(StorageError, match="cannot write"):
        file.position()
    file.close()
    assert read_rows(file.path) == [row(1)]
    assert file.path.stat().st_size == good


def test_a_missing_folder_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        MetricsFile(tmp_path / "absent" / "metrics.jsonl").start()


def test_closing_twice_and_an_unused_file(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.close()
    file.close()
    assert not file.path.exists()


def test_thousands_of_rows_are_cheap(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    start = time.perf_counter()
    for step in range(6000):
        file.record(row(step, loss=1 / (step + 1)))
    file.close()
    assert time.perf_counter() - start < 2.0  # About 0.1 s; the limit only catches a write per row.
    assert len(read_rows(file.path)) == 6000
