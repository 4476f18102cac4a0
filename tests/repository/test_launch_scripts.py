"""The launch scripts: what a dry run prints is what they run, and what they run is right.

ssh, gcloud, srun and the like are replaced by small programs that write down their arguments; the fake ssh runs what it
is asked to run on this machine.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = REPO / "scripts"
LAUNCHERS = [*sorted(SCRIPTS.glob("launch_*.sh")), SCRIPTS / "launch_slurm.sbatch"]

# Stands for scripts/train.sh on a host: says that it is there, and leaves as FAKE_<rank>_<start> says.
TRAIN = """#!/usr/bin/env bash
for word in "$@"; do case $word in --worker_index=*) rank=${word#*=} ;; esac; done
rank=${rank:-0}
echo "$rank" >>starts
count=$(grep -c "^$rank$" starts)
what=FAKE_${rank}_$count
printf '%s\\n' "$@" >"args-$rank-$count"
trap 'echo "saved $rank"; touch "saved-$rank-TERM"; exit 143' TERM
trap 'echo "saved $rank"; touch "saved-$rank-INT"; exit 130' INT
touch "ready-$rank-$count"
echo "ready $rank"
here=0  # No $(...) in the loop: bash cannot run a trap while it reads one.
until ((here >= ${FAKE_SIZE:-1})); do sleep 0.02; all=(ready-*-"$count"); here=${#all[@]}; done
case ${!what:-0} in
  wait) while true; do sleep 0.05; done ;;
  hang) trap '' TERM INT; while true; do sleep 0.05; done ;;
  kill) kill -KILL $$ ;;
  *) exit "${!what:-0}" ;;
esac
"""


def fake(folder: Path, name: str, body: str) -> None:
    program = folder / name
    program.write_text(f"#!/usr/bin/env bash\n{body}\n")
    program.chmod(0o755)


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """A folder of fake programs, first in PATH; each appends its arguments to calls.log."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = f'{{ printf "%q " "$(basename "$0")" "$@"; echo; }} >>{tmp_path}/calls.log'
    for name, body in {
        "ssh": 'exec bash -c "${!#}"',
        "gcloud": "",
        "nvidia-smi": "",
        "scontrol": "",
        "squeue": "echo ${FAKE_STATE:-RUNNING}",
        "srun": 'shift 4; exec "$@"',
    }.items():
        fake(folder, name, f"{log}\n{body}")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("DRY_RUN", raising=False)
    return tmp_path


@pytest.fixture
def host_dir(tools) -> Path:
    """What the hosts see as the checkout."""
    folder = tools / "host"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "train.sh").write_text(TRAIN)
    (folder / "scripts" / "train.sh").chmod(0o755)
    shutil.copy(SCRIPTS / "_launch.sh", folder / "scripts")
    return folder


def run(script: str, *words: str, **environ: str) -> subprocess.CompletedProcess:
    settings = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(
        [str(SCRIPTS / script), *words], env=settings | environ, capture_output=True, text=True, check=False, timeout=60
    )


def calls(tools: Path) -> list[str]:
    log = tools / "calls.log"
    return [line.strip() for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize(
    "script", [*LAUNCHERS, SCRIPTS / "_launch.sh", SCRIPTS / "_ssh_round.sh"], ids=lambda p: p.name
)
def test_shellcheck(script):
    result = subprocess.run(
        ["shellcheck", "--external-sources", str(script)], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda p: p.name)
def test_is_executable_and_explains_itself(script):
    assert os.access(script, os.X_OK)
    result = subprocess.run([str(script), "--help"], cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert script.name in result.stdout
    assert "dry_run" in result.stdout
    assert "#" not in result.stdout


def test_multi_gpu_dry_run(tools):
    result = run("launch_multi_gpu.sh", "--gpus=0,1", "--dry_run", "--n_samples=5")
    assert result.stdout == (
        f"env TAPEDIST_EXTRAS=gpu CUDA_VISIBLE_DEVICES=0,1 {REPO}/scripts/train.sh "
        f"--flagfile={REPO}/configs/multi_gpu.flags --n_samples=5 --strategy=mirrored\n"
    )
    assert calls(tools) == []
    everything = run("launch_multi_gpu.sh", "--flagfile=my file", DRY_RUN="1")
    assert everything.stdout == (
        f"env TAPEDIST_EXTRAS=gpu {REPO}/scripts/train.sh '--flagfile=my file' --strategy=mirrored\n"
    )


def test_multi_gpu_runs_what_it_prints(tools):
    checkout = tools / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    for name in ("launch_multi_gpu.sh", "_launch.sh"):
        shutil.copy(SCRIPTS / name, checkout / "scripts")
    fake(checkout / "scripts", "train.sh", 'echo "$CUDA_VISIBLE_DEVICES" "$TAPEDIST_EXTRAS" "$@"; exit 4')
    result = subprocess.run(
        [str(checkout / "scripts" / "launch_multi_gpu.sh"), "--gpus=1", "--seed=3"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 4
    assert result.stdout == f"1 gpu --flagfile={checkout}/configs/multi_gpu.flags --seed=3 --strategy=mirrored\n"


def test_multi_gpu_without_a_gpu(tools):
    fake(tools / "bin", "nvidia-smi", "exit 9")
    result = run("launch_multi_gpu.sh")
    assert result.returncode == 2
    assert "finds no GPU" in result.stderr


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("launch_multi_gpu.sh", ["--gpus=0;rm"], "must be GPU numbers"),
        ("launch_multi_gpu.sh", ["--gpus=0,0"], "names a GPU twice"),
        ("launch_multi_host.sh", [], "--hosts=''"),
        ("launch_multi_host.sh", ["--hosts=a,-oProxyCommand=x"], "must be host names"),
        ("launch_multi_host.sh", ["--hosts=a,a"], "names a host twice"),
        ("launch_multi_host.sh", ["--hosts=a,x@a"], "names a host twice"),
        ("launch_multi_host.sh", ["--hosts=a", "--port=70000"], "must be from 1 to 65535"),
        ("launch_multi_host.sh", ["--hosts=a", "--port=0"], "must be from 1 to 65535"),
        ("launch_multi_host.sh", ["--hosts=a", "--max_restarts=-1"], "must be 0 or more"),
        ("launch_multi_host.sh", ["--hosts=a", "--grace_secs=soon"], "must be seconds"),
        ("launch_tpu_vm.sh", ["--zone=us-central1-b"], "must be the name of a TPU VM"),
        ("launch_tpu_vm.sh", ["a", "b", "--zone=us-central1-b"], "already named"),
        ("launch_tpu_vm.sh", ["a"], "must be a zone"),
        ("launch_tpu_vm.sh", ["a", "--zone=us-central1-b", "--dir=/etc"], "under the home folder"),
    ],
)
def test_wrong_words(tools, script, words, said):
    result = run(script, *words)
    assert result.returncode == 2
    assert said in result.stderr
    assert calls(tools) == []


def test_multi_host_dry_run(tools):
    words = ["--hosts=a,bob@b", "--port=1234", "--dir=/opt/t", "--copy", "--run_dir=it's here"]
    result = run("launch_multi_host.sh", *words, "--dry_run")
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith(f"tar -C {REPO} -czf - LICENSE ")
    assert lines[1].endswith(
        " | ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 bob@b "
        "'mkdir -p /opt/t && tar -xzf - -C /opt/t'"
    )
    assert calls(tools) == []
    # The printed line is a command: a shell hands the fake ssh the host and one word, which runs the worker.
    subprocess.run(["bash", "-c", lines[3].replace("/opt/t", str(tools))], check=False, stdin=subprocess.DEVNULL)
    assert len(calls(tools)) == 1
    assert "ServerAliveInterval=15 bob@b exec" in calls(tools)[0]
    for flag in ("--flagfile=configs/multi_host.flags", "--workers=a:1234,b:1234", "--worker_index=1"):
        assert flag in lines[3]


def test_multi_host_runs_every_worker_and_keeps_its_log(host_dir, tools):
    logs = tools / "logs"
    result = run(
        "launch_multi_host.sh", "--hosts=a,b,c", f"--dir={host_dir}", f"--log_dir={logs}", "--run_dir=it's  here"
    )
    assert result.returncode == 0, result.stderr
    for rank in range(3):
        assert (host_dir / f"args-{rank}-1").read_text().splitlines() == [
            "--flagfile=configs/multi_host.flags",
            "--run_dir=it's  here",
            "--workers=a:2222,b:2222,c:2222",
            f"--worker_index={rank}",
        ]
        assert (logs / f"worker-{rank}.log").read_text() == f"ready {rank}\n"
        assert f"[{rank}] ready {rank}\n" in result.stdout


def test_multi_host_ends_with_the_real_error_and_lets_the_others_save(host_dir, tools):
    result = run(
        "launch_multi_host.sh", "--hosts=a,b,c", f"--dir={host_dir}", f"--log_dir={tools}/logs", "--max_restarts=3",
        FAKE_SIZE="3", FAKE_0_1="wait", FAKE_1_1="4", FAKE_2_1="wait",
    )  # fmt: skip
    assert result.returncode == 4
    assert "worker 1 on b exited with 4" in result.stderr
    assert (host_dir / "saved-0-TERM").exists()
    assert (host_dir / "saved-2-TERM").exists()


def test_multi_host_starts_all_again_when_one_is_lost(host_dir, tools):
    result = run(
        "launch_multi_host.sh", "--hosts=a,b", f"--dir={host_dir}", f"--log_dir={tools}/logs", "--max_restarts=2",
        FAKE_0_1="75", FAKE_1_1="kill", FAKE_0_2="75", FAKE_1_2="0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "restarting all workers from the last checkpoint (2 of 2)" in result.stderr
    assert sorted((host_dir / "starts").read_text().split()) == ["0"] * 3 + ["1"] * 3


def test_multi_host_does_not_wait_for_a_worker_that_hangs(host_dir, tools):
    result = run(
        "launch_multi_host.sh", "--hosts=a,b", f"--dir={host_dir}", f"--log_dir={tools}/logs", "--grace_secs=1",
        FAKE_SIZE="2", FAKE_0_1="75", FAKE_1_1="hang",
    )  # fmt: skip
    assert result.returncode == 75
    assert "worker 1 on b exited with 137" in result.stderr


def start_two_hosts(host_dir: Path, tools: Path, what: str) -> subprocess.Popen:
    launcher = subprocess.Popen(
        [str(SCRIPTS / "launch_multi_host.sh"), "--hosts=a,b", f"--dir={host_dir}", f"--log_dir={tools}/logs"],
        env=os.environ | {"FAKE_0_1": what, "FAKE_1_1": what},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(2):
        assert "ready" in launcher.stdout.readline()
    return launcher


@pytest.mark.parametrize(("signum", "name", "code"), [(signal.SIGTERM, "TERM", 143), (signal.SIGHUP, "TERM", 143)])
def test_multi_host_forwards_signals(host_dir, tools, signum, name, code):
    launcher = start_two_hosts(host_dir, tools, "wait")
    launcher.send_signal(signum)
    out, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == code
    assert "[0] saved 0" in out
    assert (host_dir / f"saved-0-{name}").exists()
    assert (host_dir / f"saved-1-{name}").exists()


def test_multi_host_second_interrupt_kills(host_dir, tools):
    launcher = start_two_hosts(host_dir, tools, "hang")
    launcher.send_signal(signal.SIGINT)
    launcher.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 30
    while launcher.poll() is None and time.monotonic() < deadline:  # Two signals may arrive as one.
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert launcher.wait() == 130
    launcher.communicate()


def test_multi_host_workers_save_when_the_launcher_is_killed(host_dir, tools):
    launcher = start_two_hosts(host_dir, tools, "wait")
    launcher.kill()
    launcher.communicate(timeout=30)  # Until the last holder of its output has gone.
    assert (host_dir / "saved-0-TERM").exists()
    assert (host_dir / "saved-1-TERM").exists()


def test_tpu_vm_dry_run(tools):
    words = ["my-tpu", "--zone=us-central1-b", "--project=p", "--seed=1"]
    lines = run("launch_tpu_vm.sh", *words, "--dry_run").stdout.splitlines()
    where = "--zone=us-central1-b --project=p"
    ssh = f"gcloud compute tpus tpu-vm ssh my-tpu {where}"
    assert lines[0] == f"{ssh} --worker=all '--command=mkdir -p tapedist'"
    assert lines[1].startswith(f"gcloud compute tpus tpu-vm scp --recurse {REPO}/LICENSE ")
    assert lines[1].endswith(f"{REPO}/scripts my-tpu:tapedist/ {where} --worker=all")
    assert lines[2].startswith(
        f"{ssh} --worker=all '--command=cd tapedist && TAPEDIST_EXTRAS=tpu scripts/train.sh --help"
    )
    assert "tensorflow-tpu>=2.20,<2.22" in lines[2]
    assert lines[3] == (
        f"{ssh} --worker=all '--command=cd tapedist && .venv/bin/python -m tapedist train "
        "--flagfile=configs/tpu_vm.flags --seed=1 --strategy=tpu --tpu=local'"
    )
    assert lines[4] == (
        f"# fetch the results: gcloud compute tpus tpu-vm scp --recurse my-tpu:tapedist/runs . {where} --worker=0"
    )
    assert calls(tools) == []


def test_tpu_pod_slice_is_driven_from_its_first_host(tools):
    words = ["my-tpu", "--zone=us-central1-b", "--pod", "--skip_setup", "--iap", "--dry_run"]
    lines = run("launch_tpu_vm.sh", *words).stdout.splitlines()
    assert lines[0] == (
        "gcloud compute tpus tpu-vm ssh my-tpu --zone=us-central1-b --worker=0 --tunnel-through-iap "
        "'--command=cd tapedist && TPU_NAME=my-tpu TPU_LOAD_LIBRARY=0 .venv/bin/python -m tapedist train "
        "--flagfile=configs/tpu_vm.flags --strategy=tpu --tpu=my-tpu'"
    )


def test_tpu_vm_runs_what_it_prints(tools):
    words = ["my-tpu", "--zone=us-central1-b"]
    printed = run("launch_tpu_vm.sh", *words, "--dry_run").stdout.splitlines()[:4]
    assert run("launch_tpu_vm.sh", *words).returncode == 0
    done = calls(tools)
    (tools / "calls.log").unlink()
    for line in printed:
        subprocess.run(["bash", "-c", line], check=True)
    assert calls(tools) == done


def test_slurm_directives():
    lines = (SCRIPTS / "launch_slurm.sbatch").read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = {line for line in lines[:end] if line.startswith("#SBATCH ")}
    assert {line for line in lines if line.startswith("#SBATCH ")} == directives
    assert {"#SBATCH --signal=TERM@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= directives


def submit(host_dir: Path, *words: str, **environ: str) -> subprocess.CompletedProcess:
    return run("launch_slurm.sbatch", *words, SLURM_SUBMIT_DIR=str(host_dir), SLURM_JOB_ID="42", **environ)


def test_slurm_dry_run(host_dir, tools):
    result = submit(host_dir, "--dry_run", "--seed=1")
    assert result.stdout.splitlines()[:3] == [
        f"cd {host_dir}",
        "scripts/train.sh --help >/dev/null",
        "srun --kill-on-bad-exit=0 --wait=120 --distribution=block --label scripts/train.sh "
        "--flagfile=configs/slurm.flags --seed=1",
    ]
    assert calls(tools) == []


def test_slurm_outside_a_checkout(tools):
    result = submit(tools)
    assert result.returncode == 2
    assert "is not a checkout of tapedist" in result.stderr


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_slurm_requeues_at_the_time_limit_but_not_when_cancelled(host_dir, tools, state, requeued):
    result = submit(host_dir, FAKE_0_2="143", FAKE_STATE=state)  # The first start is --help.
    assert result.returncode == 143
    assert ("scontrol requeue 42" in calls(tools)) == requeued


def test_slurm_starts_again_when_a_worker_is_lost(host_dir, tools):
    result = submit(host_dir, FAKE_0_2="75", FAKE_0_3="137", MAX_RESTARTS="2")
    assert result.returncode == 0, result.stderr
    assert sum(call.startswith("srun ") for call in calls(tools)) == 3
    assert submit(host_dir, FAKE_0_6="75", FAKE_0_7="75", MAX_RESTARTS="1").returncode == 75


def test_slurm_gives_up_on_a_real_error(host_dir, tools):
    assert submit(host_dir, FAKE_0_2="4").returncode == 4
    assert sum(call.startswith("srun ") for call in calls(tools)) == 1
