import io
import subprocess
import sys

import pytest

from tapedist.errors import StorageError
from tapedist.results.console import Console
from tapedist.results.events import EventFiles
from tapedist.results.monitor import Monitor
from tapedist.storage.metrics_file import MetricsFile, read_rows
from tapedist.training.interfaces import NullObserver, Observer, Row


def drive(observer: Observer, steps: range) -> None:
    """What the trainer does with an observer; the annotation lets the type checker hold both to the protocol."""
    observer.begin(epochs=20, first_epoch=steps.start, train_rows=80, test_rows=20, steps_per_epoch=1)
    for step in steps:
        observer.record(
            Row(step=step, epoch=step, split="train", loss=2.0, penalty=0.0, examples_per_sec=None, seconds=1e9)
        )
    observer.advance(epoch=steps.stop, step=steps.stop, loss=2.0, examples_per_sec=1e6)
    observer.close()


def test_one_call_reaches_console_and_files(tmp_path):
    stream = io.StringIO()
    monitor = Monitor(
        console=Console(log_every_epochs=10, stream=stream),
        metrics=MetricsFile(tmp_path / "metrics.jsonl"),
        events=EventFiles(tmp_path / "events"),
    )
    drive(monitor, range(20))
    monitor.log("Learned W: 9.00")
    monitor.close()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 20
    assert len(list((tmp_path / "events").iterdir())) == 1
    assert "Epoch: 10, loss 2.000\nLearned W: 9.00\n" in stream.getvalue()


def test_the_summary_stands_below_the_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream = io.StringIO()
    monitor = Monitor(console=Console(log_every_epochs=10, stream=stream, terminal=True))
    monitor.begin(epochs=20, first_epoch=0, train_rows=80, test_rows=20, steps_per_epoch=1)
    monitor.advance(epoch=20, step=20, loss=2.0, examples_per_sec=1e6)
    monitor.end()
    monitor.log("Learned W: 9.00")
    monitor.close()
    assert "epoch 20/20" in stream.getvalue()
    assert "epoch" not in stream.getvalue().partition("Learned W: 9.00")[2]


def test_a_resumed_run(tmp_path):
    first = Monitor(metrics=MetricsFile(tmp_path / "metrics.jsonl"))
    drive(first, range(10))
    position = (tmp_path / "metrics.jsonl").stat().st_size
    second = Monitor(metrics=MetricsFile(tmp_path / "metrics.jsonl"))
    second.rewind(position)
    drive(second, range(10, 20))
    assert [row.step for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(20))


@pytest.mark.parametrize("observer", [Monitor(), Monitor.of_run(None, log_every_epochs=1, quiet=True), NullObserver()])
def test_nothing_to_keep(observer, capsys):
    drive(observer, range(3))
    observer.rewind(0)
    assert observer.position() == 0
    assert capsys.readouterr().out == ""


def test_a_failing_file_does_not_keep_the_others_open(tmp_path):
    monitor = Monitor(metrics=MetricsFile(tmp_path / "absent" / "m"), events=EventFiles(tmp_path / "events"))
    with pytest.raises(StorageError):
        drive(monitor, range(3))
    monitor.record(Row(step=0, epoch=0, split="test", loss=1.0, penalty=0.0, examples_per_sec=None, seconds=0.0))
    with pytest.raises(StorageError):
        monitor.close()
    events = list((tmp_path / "events").iterdir())
    assert events[0].stat().st_size > 0


def test_nothing_imports_tensorflow_before_the_first_row():
    code = "import sys, tapedist.results.monitor; sys.exit('tensorflow' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
