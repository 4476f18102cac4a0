"""The doctor: every check's verdicts, and the whole of it once for real."""

import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tapedist.cluster import doctor
from tapedist.cluster.doctor import Check, DoctorConfig, main
from tapedist.errors import InputError

REPO = Path(__file__).resolve().parents[2]
CPU = {"version": "2.21.0", "devices": ["CPU"], "cuda": "12.5", "rows_per_sec": 1e9}
GPU = CPU | {"devices": ["CPU", "GPU", "GPU"]}
BROKEN = {"problem": "exit code 1: ImportError: no"}


def fake_program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_line_is_one_line():
    check = Check("Cluster", "failed", "a\nb\x1b[2J", "c")
    assert check.line() == "failed  Cluster: a b [2J; fix: c"
    assert Check("TPU", "ok", "none").line() == "ok      TPU: none"


@pytest.mark.parametrize(
    ("statuses", "code"), [(["ok", "warning"], 0), (["ok", "failed", "ok"], 2), (["failed", "failed"], 2)]
)
def test_exit_code(statuses, code):
    out = io.StringIO()
    found = [Check("x", status, "y") for status in statuses]
    assert main(DoctorConfig(), run=lambda config, environ: found, out=out) == code
    assert out.getvalue().splitlines() == [check.line() for check in found]


@pytest.mark.parametrize(
    ("settings", "said"), [({"run_dir": "a\x1b"}, "--run_dir='a\\x1b'"), ({"worker_index": -2}, "--worker_index=-2")]
)
def test_wrong_settings(settings, said):
    with pytest.raises(InputError) as caught:
        DoctorConfig(**settings)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 9), "failed"), ((3, 11, 0), "ok"), ((3, 13, 1), "ok"), ((3, 14, 0), "failed"), ((4, 0, 0), "failed")],
)
def test_python(version, status):
    assert doctor.python(version).status == status


def test_probe_collects_what_was_said_and_why_it_ended():
    said = 'print("noise"); print(\'{"version": "1"}\', flush=True);'
    assert doctor.probe_devices(fake_program(said)) == {"version": "1"}
    crashed = doctor.probe_devices(fake_program(said + "import sys; sys.exit('first\\nlast')"))
    assert crashed == {"version": "1", "problem": "exit code 1: last"}
    killed = doctor.probe_devices(fake_program("import os; os.kill(os.getpid(), 4)"))
    assert killed == {"problem": "exit code -4"}
    hung = doctor.probe_devices(fake_program(said + "import time; time.sleep(60)"), timeout_secs=0.5)
    assert hung == {"version": "1", "problem": "no answer within 0.5 s"}


@pytest.mark.parametrize(
    ("findings", "status"), [(CPU, "ok"), (CPU | {"version": "2.19.0"}, "warning"), (BROKEN, "failed"), ({}, "failed")]
)
def test_tensorflow(findings, status):
    assert doctor.tensorflow(findings).status == status


def test_a_broken_tensorflow_is_quoted_and_has_a_fix():
    check = doctor.tensorflow(BROKEN)
    assert "ImportError: no" in check.detail
    assert check.fix.startswith("pip install")


def test_devices():
    assert doctor.devices(GPU).detail.startswith("1 CPU, 2 GPU; ")
    assert doctor.devices(BROKEN).status == "failed"


@pytest.mark.parametrize(
    ("findings", "driver", "missing", "status", "said"),
    [
        (GPU, True, [], "ok", "CUDA 12.5"),
        (CPU, False, [], "ok", "no NVIDIA driver"),
        (CPU, True, ["libcudnn.so.9"], "failed", "not libcudnn.so.9; fix: pip install 'tapedist[gpu]'"),
        (CPU | {"cuda": ""}, True, [], "failed", "without CUDA"),
        (CPU, True, [], "failed", "does not see"),
        (BROKEN, True, ["libcublas.so.12"], "failed", "libcublas.so.12"),
    ],
)
def test_gpu_libraries(findings, driver, missing, status, said):
    check = doctor.gpu_libraries(findings, driver=driver, missing=missing)
    assert check.status == status
    assert said in check.line()


def test_missing_gpu_libraries_are_searched_in_the_nvidia_wheels(tmp_path, monkeypatch):
    wheel = tmp_path / "nvidia" / "cudnn" / "lib"
    wheel.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = doctor.missing_gpu_libraries()
    (wheel / "libcudnn.so.9").touch()
    assert set(before) - set(doctor.missing_gpu_libraries()) <= {"libcudnn.so.9"}
    assert "libcudnn.so.9" not in doctor.missing_gpu_libraries()


@pytest.mark.parametrize(
    ("findings", "environ", "chips", "status"),
    [
        (CPU, {}, False, "ok"),
        (CPU | {"devices": ["CPU", "TPU"]}, {"TPU_NAME": "x"}, True, "ok"),
        (CPU, {"TPU_NAME": "x"}, False, "warning"),
    ],
)
def test_tpu(findings, environ, chips, status):
    assert doctor.tpu(findings, environ, chips=chips).status == status


def test_cluster():
    assert doctor.cluster({}, (), None) == Check("Cluster", "ok", "one process (no cluster setting)")
    wrong = doctor.cluster({"TF_CONFIG": "[]"}, (), None)
    assert wrong.status == "failed"
    assert "must be a JSON object" in wrong.detail
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{server.getsockname()[1]}"
        with socket.socket() as peer:
            peer.bind(("127.0.0.1", 0))
            peer.listen()
            busy = f"127.0.0.1:{peer.getsockname()[1]}"
            assert doctor.cluster({}, (busy, free), 0).status == "failed"
            server.close()
            there = doctor.cluster({}, (busy, free), 1)
        silent = doctor.cluster({}, (busy, free), 1)
    assert there == Check("Cluster", "ok", f"worker 1 of 2, {free} (from --workers)")
    assert silent.status == "warning"
    assert f"no answer from {busy}" in silent.detail
    ignored = doctor.cluster(
        {"TF_CONFIG": json.dumps({"cluster": {"worker": [free]}, "task": {"type": "worker", "index": 0}})}, (busy,), 0
    )
    assert "ignored: --workers" in ignored.detail


def test_run_dir(tmp_path, monkeypatch):
    deep = tmp_path / "a" / "b"
    check = doctor.run_dir(str(deep))
    assert check.status == "ok"
    assert str(tmp_path) in check.detail
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    assert doctor.run_dir(str(file)).status == "failed"
    monkeypatch.setattr(doctor, "_LOW_DISK_BYTES", 2**80)
    assert doctor.run_dir(str(deep)).status == "warning"


def test_exchange_verdicts():
    good = "import os; assert 'TF_CONFIG' in os.environ; print('{\"exchanged\": [1, 2]}')"
    assert doctor.exchange(fake_program(good)).status == "ok"
    wrong = doctor.exchange(fake_program("print('{\"exchanged\": [1, 0]}')"))
    assert wrong.status == "failed"
    crashed = doctor.exchange(fake_program("import sys; sys.exit('no ports')"))
    assert "worker 0 exited with 1: no ports" in crashed.detail
    hung = doctor.exchange(fake_program("import time; time.sleep(60)"), timeout_secs=0.5)
    assert "no answer of both within 0.5 s" in hung.detail


def test_speed():
    assert "1,000 million rows/s" in doctor.speed(CPU).detail
    assert doctor.speed(BROKEN).status == "failed"


def test_every_failure_has_a_fix():
    found = [
        doctor.python((3, 9, 0)),
        *(check(BROKEN) for check in (doctor.tensorflow, doctor.devices, doctor.speed)),
        doctor.gpu_libraries(BROKEN, driver=True, missing=["x"]),
        doctor.cluster({"TF_CONFIG": "["}, (), None),
        doctor.exchange(fake_program("pass")),
    ]
    assert all(check.status == "failed" and check.fix for check in found)


def test_the_real_thing():
    code = "import sys; from tapedist.cluster.doctor import *; sys.exit(main(DoctorConfig()))"
    environ = {key: value for key, value in os.environ.items() if key != "TF_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environ, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [re.match(r"(?:ok|warning) +([\w ]+): ", line)[1] for line in lines] == [
        "Python", "TensorFlow", "Devices", "GPU libraries", "TPU", "Cluster", "Run folder", "Two processes", "Speed",
    ]  # fmt: skip


def test_the_doctor_itself_imports_no_tensorflow():
    code = f"import sys; import {doctor.__name__}; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPO).returncode == 0
