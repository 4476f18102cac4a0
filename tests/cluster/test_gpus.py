"""GPUs of a cluster's workers, with lists of devices that are not there: who computes on what, and what is refused."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished

from tapedist import cli
from tapedist.cluster.launch import LaunchConfig, found_gpus, shares, visible_gpus
from tapedist.cluster.resolve import ONE_PROCESS, ClusterSpec
from tapedist.config import TrainConfig
from tapedist.errors import InputError

FOUR = ("GPU-a0", "GPU-b1", "GPU-c2", "GPU-d3")


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        (None, FOUR),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0,1", ("0", "1")),
        (" 2 , 0 ", ("2", "0")),
        ("1,-1,2", ("1",)),
        ("0,7,1", ("0",)),
        ("3,3,03", ("3",)),
        ("GPU-c2,GPU-a", ("GPU-c2", "GPU-a")),
        ("GPU-c2,GPU-", ("GPU-c2",)),
        ("GPU-x,0", ()),
        ("MIG-1,MIG-2", ("MIG-1", "MIG-2")),
    ],
)
def test_the_users_list_is_read_as_cuda_reads_it(visible: str | None, wanted: tuple[str, ...]):
    assert visible_gpus(FOUR, visible) == wanted


def test_a_list_without_gpus_means_nothing():
    assert visible_gpus((), "0,1") == ()


@pytest.mark.parametrize(
    ("visible", "workers", "per_worker", "wanted"),
    [
        (FOUR, 2, 0, ["GPU-a0,GPU-b1", "GPU-c2,GPU-d3"]),
        (FOUR, 4, 0, list(FOUR)),
        (FOUR, 3, 0, ["GPU-a0", "GPU-b1", "GPU-c2"]),
        (FOUR, 3, 1, ["GPU-a0", "GPU-b1", "GPU-c2"]),
        (FOUR, 1, 2, ["GPU-a0,GPU-b1"]),
        (("2", "0"), 2, 1, ["2", "0"]),
        (FOUR, 1, 0, [None]),
        ((), 2, 0, [None, None]),
    ],
)
def test_no_two_workers_see_one_gpu(visible: tuple[str, ...], workers: int, per_worker: int, wanted: list[str | None]):
    found = shares(visible, workers=workers, per_worker=per_worker)
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in found] == wanted


@pytest.mark.parametrize(
    ("gpus", "workers", "per_worker", "fix"),
    [
        (4, 8, 0, {"workers": 4, "per_worker": 1}),
        (4, 8, 1, {"workers": 4, "per_worker": 1}),
        (4, 2, 3, {"workers": 2, "per_worker": 2}),
        (4, 1, 8, {"workers": 1, "per_worker": 4}),
        (0, 2, 1, {"workers": 2, "per_worker": 0}),
    ],
)
def test_more_than_there_are_is_refused_with_numbers_that_fit(
    gpus: int, workers: int, per_worker: int, fix: dict[str, int]
):
    with pytest.raises(InputError) as caught:
        shares(FOUR[:gpus], workers=workers, per_worker=per_worker)
    told = str(caught.value)
    assert f"there are {gpus} GPU(s)" in told or "there is no GPU" in told
    offered = told.split("; use ")[1].split(", or")[0].split()
    numbers = {word.split("=")[0].replace("--num_workers", "workers").replace("--gpus_per_worker", "per_worker"): int(
        word.split("=")[1]) for word in offered}  # fmt: skip
    assert {"workers": workers, **numbers} == fix
    assert len(shares(FOUR[:gpus], **fix)) == fix["workers"]
    assert shares((), workers=workers, per_worker=0) == [{}] * workers  # The other one, CUDA_VISIBLE_DEVICES=-1.


@pytest.fixture
def driver(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """An environment whose `nvidia-smi` is a script."""

    def make(script: str) -> dict[str, str]:
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return {"PATH": f"{path.parent}{os.pathsep}{os.environ['PATH']}"}

    return make


def test_gpus_are_those_that_the_driver_lists(driver: Callable[[str], dict[str, str]], monkeypatch: pytest.MonkeyPatch):
    def found(script: str) -> tuple[str, ...]:
        monkeypatch.setenv("PATH", driver(script)["PATH"])
        return found_gpus(os.environ)

    listed = '[ "$1 $2" = "--query-gpu=uuid --format=csv,noheader" ] && printf "GPU-a0\\nGPU-b1\\n"'
    assert found(listed) == FOUR[:2]
    assert found("echo 'No devices were found'; exit 6") == ()
    assert found("echo No devices were found") == ()
    assert found("exit 9") == ()
    monkeypatch.setenv("PATH", "/nowhere")
    assert found_gpus({}) == ()


_WORKER = """
import os
print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
"""


@pytest.mark.parametrize(
    ("gpus", "visible", "words", "wanted"),
    [
        (2, None, [], {"[0] sees GPU-0", "[1] sees GPU-1"}),
        (4, None, [], {"[0] sees GPU-0,GPU-1", "[1] sees GPU-2,GPU-3"}),
        (4, None, ["--gpus_per_worker=1"], {"[0] sees GPU-0", "[1] sees GPU-1"}),
        (4, "3,1", [], {"[0] sees 3", "[1] sees 1"}),
        (4, "-1", [], {"[0] sees -1", "[1] sees -1"}),
        (0, None, [], {"[0] sees None", "[1] sees None"}),
        (1, None, ["--virtual_devices_per_worker=1"], {"[0] sees None", "[1] sees None"}),
    ],
)
def test_launch_gives_each_worker_its_own(
    gpus: int,
    visible: str | None,
    words: list[str],
    wanted: set[str],
    driver: Callable[[str], dict[str, str]],
    run_python: Callable[..., Finished],
    tmp_path: Path,
):
    (tmp_path / "worker.py").write_text(_WORKER)
    code = (
        "import sys; from tapedist.cluster.launch import LaunchConfig, main; from tapedist.flags import CommandLine;"
        "options = CommandLine(LaunchConfig, sys.argv[1:], rest='worker_argv').options();"
        f"code = main(options, program=(sys.executable, {str(tmp_path / 'worker.py')!r}));"
        "sys.exit(3 if 'tensorflow' in sys.modules else code)"
    )
    lines = "".join(f"GPU-{i}\\n" for i in range(gpus))
    env = driver(f"printf '{lines}'") | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    done = run_python("-c", code, "--num_workers=2", *words, "--", "train", env=env)
    assert done.code == 0, done.err
    assert {line for line in done.out.splitlines() if "sees" in line} == wanted


def test_launch_refuses_more_workers_than_gpus(
    driver: Callable[[str], dict[str, str]], tapedist_command: Callable[..., Finished]
):
    env = driver("echo GPU-0")
    done = tapedist_command("launch", "--num_workers=2", "--", "train", env=env)
    assert done.code == 2
    assert done.errors == [
        "tapedist: error: --num_workers=2: there are 1 GPU(s) here, and two workers cannot share one; use "
        "--num_workers=1 --gpus_per_worker=1, or set CUDA_VISIBLE_DEVICES=-1 and --gpus_per_worker=0 to train on CPUs"
    ]
    assert "starting" not in done.err


def test_gpus_and_cpus_are_not_asked_for_together():
    with pytest.raises(InputError, match="--gpus_per_worker=1: has no meaning with --virtual_devices_per_worker=2"):
        LaunchConfig(gpus_per_worker=1, virtual_devices_per_worker=2)
    with pytest.raises(InputError, match="--collective=nccl: needs GPUs, and --num_virtual_devices=2"):
        TrainConfig(collective="nccl", num_virtual_devices=2)


def _see(gpus: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`strategies`, where TensorFlow sees so many GPUs."""
    from tapedist.cluster import strategies

    real = strategies.tf.config.list_physical_devices
    monkeypatch.setattr(
        strategies.tf.config,
        "list_physical_devices",
        lambda kind=None: [f"GPU:{i}" for i in range(gpus)] if kind == "GPU" else real(kind),
    )
    return strategies


def _spec(hosts: int) -> ClusterSpec:
    return ClusterSpec(tuple(f"host{i}:2222" for i in range(hosts)), 0, "test") if hosts > 1 else ONE_PROCESS


@pytest.mark.parametrize("gpus", [0, 1, 4])
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_worker_computes_on_all_its_gpus(hosts: int, gpus: int, monkeypatch: pytest.MonkeyPatch):
    """As TensorFlow's own Python decides it; no strategy is started."""
    strategies = _see(gpus, monkeypatch)
    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended as Extended

    devices = strategies.worker_devices(TrainConfig())
    made, kind = Extended._initialize_local_devices(
        object.__new__(Extended), strategies.resolver(_spec(hosts), devices), "/job:worker/task:0"
    )
    assert (kind, len(made)) == (("GPU", gpus) if gpus else ("CPU", 1))
    strategies.check_replicas(_spec(hosts), devices, hosts * len(made), made)


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_cpu_in_the_place_of_gpus_is_refused(hosts: int, gpus: int, monkeypatch: pytest.MonkeyPatch):
    strategies = _see(gpus, monkeypatch)
    devices = strategies.worker_devices(TrainConfig())
    with pytest.raises(InputError) as caught:
        strategies.check_replicas(_spec(hosts), devices, hosts, ["/job:worker/task:0/device:CPU:0"])
    assert f"were to make {hosts * gpus} GPU replicas, but this TensorFlow made {hosts} on" in str(caught.value)
    assert "set CUDA_VISIBLE_DEVICES=-1" in str(caught.value)
    strategies = _see(0, monkeypatch)  # Which leaves no GPU.
    strategies.check_replicas(
        _spec(hosts), strategies.worker_devices(TrainConfig()), hosts, ["/job:worker/task:0/device:CPU:0"]
    )


def test_logical_cpus_are_taken_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    strategies = _see(4, monkeypatch)
    assert strategies.worker_devices(TrainConfig(num_virtual_devices=2)) == strategies.Devices("CPU", 2)


@pytest.mark.parametrize(
    ("words", "on_cpus"),
    [
        (["--num_virtual_devices=2"], True),
        (["--num_virtual_devices", "2"], True),
        (["--flagfile=FILE"], True),
        (["--num_virtual_devices=0"], False),
        ([], False),
    ],
)
def test_launch_reads_the_workers_settings(
    words: list[str], on_cpus: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Workers on logical CPUs share no GPUs, wherever the setting stands."""
    (tmp_path / "file").write_text("--num_virtual_devices=2\n")
    given: list[dict[str, Any]] = []
    monkeypatch.setattr("tapedist.cluster.launch.main", lambda options, **more: given.append(more) or 0)
    words = [word.replace("FILE", str(tmp_path / "file")) for word in words]
    assert cli.main(["launch", "--num_workers=2", "--", "train", *words]) == 0
    assert given == [{"on_cpus": on_cpus}]


@pytest.mark.parametrize(
    ("gpus", "collective", "wanted"),
    [(2, "auto", "nccl"), (2, "nccl", "nccl"), (2, "ring", "ring"), (0, "auto", "ring"), (0, "ring", "ring")],
)
def test_how_sums_are_exchanged(gpus: int, collective: str, wanted: str, monkeypatch: pytest.MonkeyPatch):
    facts = _see(gpus, monkeypatch).shared_facts(TrainConfig(collective=collective))
    assert facts == {"device_kind": "GPU" if gpus else "CPU", "devices": gpus or 1, "collective": wanted}


def test_nccl_needs_gpus(tapedist_command: Callable[..., Finished]):
    words = ["train", "--strategy=multiworker", "--n_samples=100", "--num_epochs=1"]
    refused = tapedist_command(*words, "--collective=nccl", warm=True)
    assert refused.code == 2
    assert "--collective=nccl: needs GPUs, and this process computes on its CPU" in refused.err
    for fix in ("auto", "ring"):
        assert tapedist_command(*words, f"--collective={fix}", warm=True).code == 0


@pytest.mark.parametrize("kind", ["chief", "worker"])
def test_a_cluster_of_one_process_is_none(kind: str, tapedist_command: Callable[..., Finished]):
    config = json.dumps({"cluster": {kind: ["some-host:2222"]}, "task": {"type": kind, "index": 0}})
    words = ["train", "--n_samples=100", "--num_epochs=1"]
    for strategy in (["--strategy=default"], ["--strategy=mirrored", "--num_virtual_devices=2"], []):
        done = tapedist_command(*words, *strategy, env={"TF_CONFIG": config}, warm=True)
        assert done.code == 0, done.err
