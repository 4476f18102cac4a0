"""`tapedist doctor`: checks of this machine with fixes, one line each.

TensorFlow itself runs in other processes, with a time limit.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from tapedist.cluster.network import PortReservation, port_in_use, unreachable
from tapedist.cluster.resolve import ClusterSpec, resolve
from tapedist.errors import InputError
from tapedist.options import RANK_OR_NONE, Options, option

Status = Literal["ok", "warning", "failed"]
Findings = Mapping[str, Any]

_PROBE_SECS = 120.0
_LOW_DISK_BYTES = 2**30
_INSTALL = "pip install --force-reinstall tapedist"
_INSTALL_GPU = "pip install 'tapedist[gpu]'"
# The libraries that TensorFlow 2.20 and 2.21 load for a GPU, by their folder in the nvidia wheels.
_GPU_LIBRARIES = {
    "cuda_runtime": "libcudart.so.12",
    "cublas": "libcublas.so.12",
    "cufft": "libcufft.so.11",
    "curand": "libcurand.so.10",
    "cusolver": "libcusolver.so.11",
    "cusparse": "libcusparse.so.12",
    "cudnn": "libcudnn.so.9",
    "nccl": "libnccl.so.2",
    "nvjitlink": "libnvJitLink.so.12",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: the subject.
        status: "ok", "warning" or "failed".
        detail: the finding.
        fix: the remedy; empty if ok.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""

    def line(self) -> str:
        """The check on one line, without control characters."""
        text = f"{self.status:8}{self.name}: {self.detail}" + (f"; fix: {self.fix}" if self.fix else "")
        return "".join(c if c.isprintable() else " " for c in text)


def python(version: Sequence[int] = tuple(sys.version_info[:3])) -> Check:
    text = f"{'.'.join(map(str, version))} at {sys.executable}"
    if not (3, 11) <= tuple(version[:2]) <= (3, 13):
        return Check("Python", "failed", text, "use Python 3.11, 3.12 or 3.13")
    return Check("Python", "ok", text)


def probe_devices(argv: Sequence[str] = (), timeout_secs: float = _PROBE_SECS) -> Findings:
    """Runs the probe, which imports TensorFlow; "problem" in the findings is the reason why some are missing.

    Args:
        argv: the program; by default the probe.
        timeout_secs: how long it may take.
    """
    argv = argv or (sys.executable, "-m", "tapedist.cluster.probe", "devices")
    # Without the cluster: TensorFlow would wait for its other workers.
    environ = {key: value for key, value in os.environ.items() if key != "TF_CONFIG"}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_secs, env=environ, check=False)
        out, err, problem = done.stdout, done.stderr, f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        out, err = ((s or b"").decode("utf-8", "replace") for s in (error.stdout, error.stderr))
        problem = f"no answer within {timeout_secs:g} s"
    findings: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith("{"):
            findings |= json.loads(line)
    if problem:
        findings["problem"] = f"{problem}: {_last_line(err)}" if err.strip() else problem
    return findings


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


def tensorflow(findings: Findings) -> Check:
    if "version" not in findings:
        return Check("TensorFlow", "failed", findings.get("problem", "cannot be imported"), _INSTALL)
    version = findings["version"]
    if not version.startswith(("2.20.", "2.21.")):
        return Check("TensorFlow", "warning", f"{version}, which tapedist was not tried with", _INSTALL)
    return Check("TensorFlow", "ok", version)


def devices(findings: Findings) -> Check:
    if "devices" not in findings:
        return Check("Devices", "failed", "unknown, because TensorFlow does not work", _INSTALL)
    counts = {kind: findings["devices"].count(kind) for kind in dict.fromkeys(findings["devices"])}
    found = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return Check("Devices", "ok", f"{found}; {os.cpu_count()} CPU cores")


def has_nvidia_driver() -> bool:
    """Returns whether this machine has an NVIDIA GPU with its driver."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def missing_gpu_libraries() -> list[str]:
    """CUDA's libraries that neither the nvidia wheels nor the system's loader have."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    missing = []
    for folder, library in _GPU_LIBRARIES.items():
        if not any((wheel / folder / "lib" / library).exists() for wheel in wheels):
            try:
                ctypes.CDLL(library)
            except OSError:
                missing.append(library)
    return missing


def gpu_libraries(findings: Findings, *, driver: bool | None = None, missing: Sequence[str] | None = None) -> Check:
    """Checks whether a GPU of this machine can be used, and why not.

    Args:
        findings: of `probe_devices`.
        driver: whether there is an NVIDIA driver; None to find out.
        missing: libraries that are not found; None to find out.
    """
    name = "GPU libraries"
    if "GPU" in findings.get("devices", ()):
        return Check(name, "ok", f"complete, CUDA {findings.get('cuda') or 'unknown'}")
    if not (has_nvidia_driver() if driver is None else driver):
        return Check(name, "ok", "not needed: no NVIDIA driver on this machine")
    if "version" in findings and not findings.get("cuda"):
        return Check(name, "failed", "TensorFlow was built without CUDA", _INSTALL_GPU)
    missing = missing_gpu_libraries() if missing is None else missing
    if missing:
        return Check(name, "failed", f"there is a GPU, but not {', '.join(missing)}", _INSTALL_GPU)
    return Check(
        name, "failed", "there is a GPU that TensorFlow does not see", "check nvidia-smi, CUDA_VISIBLE_DEVICES"
    )


def tpu(findings: Findings, environ: Mapping[str, str], *, chips: bool | None = None) -> Check:
    """Returns whether TensorFlow can use the TPU of this machine, if there is one.

    Args:
        findings: of `probe_devices`.
        environ: environment variables.
        chips: whether there are TPU chips; None to find out.
    """
    named = [name for name in ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE") if environ.get(name)]
    if chips is None:
        chips = any(Path("/dev").glob("accel[0-9]*"))
    if "TPU" in findings.get("devices", ()) or (chips and importlib.util.find_spec("libtpu")):
        return Check("TPU", "ok", "found")
    if chips or named:
        why = "there are TPU chips" if chips else f"{', '.join(named)} set"
        fix = "replace tensorflow by tensorflow-tpu, as scripts/launch_tpu_vm.sh does"
        return Check("TPU", "warning", f"{why}, but no libtpu", fix)
    return Check("TPU", "ok", "none on this machine")


def cluster(environ: Mapping[str, str], workers: Sequence[str], worker_index: int | None) -> Check:
    """Checks the cluster's settings, this process's port, and whether the others answer."""
    try:
        spec = resolve(environ, workers=workers, worker_index=worker_index)
    except InputError as error:
        return Check("Cluster", "failed", " | ".join(error.problems), "correct or unset it")
    ignored = f"; ignored: {', '.join(spec.ignored)}" if spec.ignored else ""
    if not spec.workers:
        return Check("Cluster", "ok", f"one process ({spec.source}){ignored}")
    detail = f"worker {spec.index} of {spec.num_workers}, {spec.address} (from {spec.source}){ignored}"
    if port_in_use(spec.address):
        return Check("Cluster", "failed", f"{detail}; its port is in use here", "stop what holds it, or choose another")
    silent = unreachable([address for address in spec.workers if address != spec.address], timeout_secs=2.0)
    if silent:
        fix = "start them; if they run, check names and firewalls"
        return Check("Cluster", "warning", f"{detail}; no answer from {', '.join(silent)}", fix)
    return Check("Cluster", "ok", detail)


def run_dir(path: str) -> Check:
    """Checks whether `path` could be a run folder; nothing is created there."""
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"tapedist")
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check("Run folder", "failed", f"{path!r}: {error.strerror}", "choose another --run_dir")
    detail = f"{folder} can be written, {free / 2**30:.1f} GiB free"
    if free < _LOW_DISK_BYTES:
        return Check("Run folder", "warning", detail, "make room")
    return Check("Run folder", "ok", detail)


def exchange(argv: Sequence[str] = (), timeout_secs: float = 60.0) -> Check:
    """Checks whether two processes of this machine can exchange sums, as training does.

    Args:
        argv: the program of both; by default the probe.
        timeout_secs: how long they may take.
    """
    name = "Two processes"
    argv = argv or (sys.executable, "-m", "tapedist.cluster.probe", "exchange")
    die_with_parent = str(Path(__file__).with_name("die_with_parent.py"))
    reservation = PortReservation(2)
    addresses = tuple(f"127.0.0.1:{port}" for port in reservation.ports)
    processes = []
    try:
        for rank in range(2):
            # On the CPU: two processes cannot share one GPU in a collective.
            own = {"TF_CONFIG": ClusterSpec(addresses, rank, name).to_tf_config(), "CUDA_VISIBLE_DEVICES": "-1"}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-I", "-S", die_with_parent, str(os.getpid()), *argv],
                    env=dict(os.environ) | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        answers = [process.communicate(timeout=timeout_secs) for process in processes]
    except subprocess.TimeoutExpired:
        fix = "try again on a less busy machine; allow connections to 127.0.0.1"
        return Check(name, "failed", f"no answer of both within {timeout_secs:g} s", fix)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        reservation.close()
    for rank, ((out, err), process) in enumerate(zip(answers, processes, strict=True)):
        if process.returncode or '"exchanged": [1, 2]' not in out:
            detail = f"worker {rank} exited with {process.returncode}: {_last_line(err or out)}"
            return Check(name, "failed", detail, "see the message; single-process training is not affected")
    return Check(name, "ok", "they exchange numbers over 127.0.0.1")


def speed(findings: Findings) -> Check:
    if "rows_per_sec" not in findings:
        return Check("Speed", "failed", findings.get("problem", "not measured"), _INSTALL)
    return Check(
        "Speed",
        "ok",
        f"about {findings['rows_per_sec'] / 1e6:,.0f} million rows/s (1 feature, a million rows in memory)",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig(Options):
    """Settings of `tapedist doctor`.

    Raises:
        InputError: if a field is invalid.
    """

    run_dir: str = option("", "The folder that a run would be kept in; empty checks this folder.", path=True)
    workers: tuple[str, ...] = option((), "Addresses of all processes, host:port each, in rank order.")
    worker_index: int = option(-1, "This process's place in --workers; -1 where it has none.", rule=RANK_OR_NONE)


def run_checks(config: DoctorConfig, environ: Mapping[str, str]) -> Iterator[Check]:
    """Yields the checks in order, each as soon as it is done."""
    yield python()
    findings: Findings = probe_devices()
    yield tensorflow(findings)
    yield devices(findings)
    yield gpu_libraries(findings)
    yield tpu(findings, environ)
    yield cluster(environ, config.workers, None if config.worker_index < 0 else config.worker_index)
    yield run_dir(config.run_dir or ".")
    yield exchange()
    yield speed(findings)


def main(
    config: DoctorConfig,
    *,
    environ: Mapping[str, str] = os.environ,
    run: Callable[[DoctorConfig, Mapping[str, str]], Iterator[Check] | Sequence[Check]] = run_checks,
    out: TextIO | None = None,
) -> int:
    """Prints every check on its own line.

    Returns:
        0 if nothing failed, else 2.
    """
    out = out or sys.stdout
    failed = 0
    for check in run(config, environ):
        failed += check.status == "failed"
        print(check.line(), file=out, flush=True)
    return 2 if failed else 0
