"""The local launcher, with real processes and real signals; its workers are small programs instead of trainings."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tapedist import cli
from tapedist.cluster import exit_policy, launch
from tapedist.cluster.exit_policy import Action, describe, judge
from tapedist.cluster.launch import LaunchConfig, main
from tapedist.errors import InputError

REPO = Path(__file__).resolve().parents[2]

TWO_PROCESSES = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}'

# Behaves as `plan[attempt][rank]` says, in a folder where each start of each rank leaves a file.
WORKER = '''
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path
folder, plan = Path(sys.argv[2]), json.loads(sys.argv[3])
config = json.loads(os.environ.get("TF_CONFIG", "{}"))
rank = config.get("task", {}).get("index", 0)
attempt = len(list(folder.glob(f"start-*-{rank}.json")))
record = {"pid": os.getpid(), "argv": sys.argv[4:], "tf_config": config}

def saved(signum, frame):
    (folder / f"saved-{attempt}-{rank}").write_text(str(signum))
    sys.exit(128 + signum)

def start():
    temporary = folder / f"temporary-{rank}"
    temporary.write_text(json.dumps(record))
    temporary.rename(folder / f"start-{attempt}-{rank}.json")
    print("ready", attempt, flush=True)

def wait():
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, saved)
    start()
    time.sleep(60)

def after_others():
    """Until every other rank of this attempt has started."""
    size = len(config["cluster"]["worker"])
    while len(list(folder.glob(f"start-{attempt}-*.json"))) < size:
        time.sleep(0.01)

what = plan[attempt][rank]
if what == "wait":
    wait()
elif what == "hang":
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    start()
    time.sleep(60)
elif what == "stop":
    start()
    os.kill(os.getpid(), signal.SIGSTOP)
elif what == "listen":
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("", int(config["cluster"]["worker"][rank].split(":")[1])))
    server.listen()
    wait()
elif what == "child":
    record["child"] = subprocess.Popen(["sleep", "60"]).pid
    wait()
elif what == "noise":
    start()
    sys.stdout.buffer.write(b"bytes \\xff\\n" + b"x" * 200_000)
    print("to stderr", file=sys.stderr)
elif what == "many":
    start()
    for i in range(20_000):
        print("line", i)
else:
    start()
    if config:
        after_others()
    print(f"leaving with {what}", flush=True)
    if what < 0:
        os.kill(os.getpid(), -what)
    sys.exit(what)
'''


class Stage:
    """A folder with the worker program, and what its starts left there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.program = folder / "worker.py"
        self.program.write_text(WORKER)
        self.logs = folder / "logs"

    def argv(self, plan, *extra) -> tuple[str, ...]:
        return ("train", str(self.folder), json.dumps(plan), *extra)

    def run(self, plan, *extra, environ=None, **settings) -> int:
        settings.setdefault("num_workers", len(plan[0]))
        config = LaunchConfig(log_dir=str(self.logs), worker_argv=self.argv(plan, *extra), **settings)
        clean = {key: value for key, value in os.environ.items() if key != "TF_CONFIG"}
        program = (sys.executable, str(self.program))
        return main(config, program=program, environ=clean | (environ or {}))

    def starts(self, attempt: int) -> dict[int, dict]:
        files = self.folder.glob(f"start-{attempt}-*.json")
        return {int(file.stem.split("-")[2]): json.loads(file.read_text()) for file in files}

    def all_starts(self) -> list[dict]:
        return [json.loads(file.read_text()) for file in self.folder.glob("start-*.json")]

    def saved(self, attempt: int) -> dict[int, int]:
        return {int(file.name.split("-")[2]): int(file.read_text()) for file in self.folder.glob(f"saved-{attempt}-*")}

    def assert_nothing_left(self):
        for start in self.all_starts():
            for pid in (start["pid"], start.get("child")):
                assert pid is None or not psutil.pid_exists(pid)
            for address in start["tf_config"].get("cluster", {}).get("worker", []):
                with socket.socket() as server:
                    server.bind(("127.0.0.1", int(address.split(":")[1])))

    @contextlib.contextmanager
    def launcher(self, plan, **settings):
        """A launcher in a process of its own, once all its workers are ready."""
        settings = {"num_workers": len(plan[0]), "log_dir": str(self.logs), "worker_argv": self.argv(plan)} | settings
        code = (
            "import json, sys; from tapedist.cluster.launch import LaunchConfig, main;"
            f"sys.exit(main(LaunchConfig(**{settings!r}),"
            f" program=({sys.executable!r}, {str(self.program)!r})))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO
        )
        try:
            ready = 0
            while ready < len(plan[0]):
                line = process.stdout.readline()
                assert line, process.stderr.read()
                ready += "ready" in line
            yield process
        finally:
            process.kill()
            process.communicate()


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Stage:
    monkeypatch.setattr(exit_policy, "_SETTLE_SECS", 0.3)
    monkeypatch.setattr(exit_policy, "_ABANDON_SECS", 2.0)
    return Stage(tmp_path)


CONTINUE, RESTART, FINISH = Action.CONTINUE, Action.RESTART, Action.FINISH


@pytest.mark.parametrize(
    ("exits", "restarts_left", "stop_signal", "action", "code", "rank"),
    [
        ({}, 1, None, CONTINUE, 0, None),
        ({0: 0}, 1, None, CONTINUE, 0, None),
        ({0: 0, 1: 0}, 1, None, FINISH, 0, None),
        ({1: 75}, 1, None, RESTART, 75, 1),
        ({1: -9}, 1, None, RESTART, 75, 1),
        ({0: 0, 1: -9}, 1, None, RESTART, 75, 1),
        ({1: 75}, 0, None, FINISH, 75, 1),
        ({1: -11}, 0, None, FINISH, 75, 1),
        ({1: 1}, 1, None, FINISH, 1, 1),
        ({1: 2}, 1, None, FINISH, 2, 1),
        ({0: 75, 1: 3}, 1, None, FINISH, 3, 1),
        ({0: -9, 1: 4}, 1, None, FINISH, 4, 1),
        ({0: 6, 1: 4}, 1, None, FINISH, 6, 0),
        ({1: 143}, 1, None, FINISH, 143, 1),
        ({0: 75, 1: 130}, 1, None, FINISH, 130, 1),
        ({}, 1, 15, FINISH, 143, None),
        ({}, 1, 2, FINISH, 130, None),
        ({0: 143, 1: 75}, 1, 15, FINISH, 143, None),
        ({0: -15, 1: -15}, 1, 15, FINISH, 143, None),
        ({0: 0, 1: 143}, 1, 15, FINISH, 143, None),
        ({0: 0, 1: 0}, 1, 15, FINISH, 0, None),
        ({0: 143, 1: 6}, 1, 15, FINISH, 6, 1),
    ],
)
def test_policy(exits, restarts_left, stop_signal, action, code, rank):
    verdict = judge(exits, 2, restarts_left=restarts_left, stop_signal=stop_signal, stop_timeout_secs=7)
    assert (verdict.action, verdict.code, verdict.rank) == (action, code, rank)


def test_policy_asks_the_others_to_leave_only_where_nobody_else_will():
    assert judge({0: 2}, 2, restarts_left=0).terminate
    assert not judge({0: 75}, 2, restarts_left=1).terminate
    stopping = judge({}, 2, restarts_left=0, stop_signal=15, stop_timeout_secs=7)
    assert (stopping.terminate, stopping.grace_secs) == (False, 7)


def test_exit_codes_in_words():
    assert describe(-9) == "was killed by SIGKILL"
    assert describe(75) == "exited with 75 (lost a peer)"
    assert describe(17) == "exited with 17"


def test_workers_get_a_cluster_their_flags_a_prefix_and_a_log(stage, capfd):
    assert stage.run([[0, 0, 0]], "--n_samples=5", virtual_devices_per_worker=2) == 0
    starts = stage.starts(0)
    clusters = [starts[rank]["tf_config"]["cluster"] for rank in range(3)]
    assert clusters[0] == clusters[1] == clusters[2]
    addresses = clusters[0]["worker"]
    assert len(set(addresses)) == 3
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    assert all(starts[rank]["argv"] == ["--n_samples=5", "--num_virtual_devices=2"] for rank in range(3))
    out, err = capfd.readouterr()
    for rank in range(3):
        assert f"[{rank}] leaving with 0\n" in out
        assert (stage.logs / f"worker-{rank}.log").read_text() == "ready 0\nleaving with 0\n"
    assert "starting 3 workers at" in err
    assert str(stage.logs) in err
    stage.assert_nothing_left()


def test_a_lone_worker_has_no_cluster_and_no_prefix(stage, capfd):
    assert stage.run([[0]]) == 0
    assert stage.starts(0)[0]["tf_config"] == {}
    assert capfd.readouterr().out == "ready 0\nleaving with 0\n"


def test_a_lone_worker_keeps_the_cluster_it_is_told(stage):
    outer = {"cluster": {"worker": ["127.0.0.1:1"]}, "task": {"type": "worker", "index": 0}}
    assert stage.run([[0]], environ={"TF_CONFIG": json.dumps(outer)}) == 0
    assert stage.starts(0)[0]["tf_config"] == outer


@pytest.mark.parametrize("loss", [75, -signal.SIGKILL, -signal.SIGSEGV])
def test_all_restart_when_one_is_lost(stage, capfd, loss):
    assert stage.run([["wait", loss], [loss, 75], [0, 0]], "--resume=must", max_restarts=2) == 0
    first, second, third = (stage.starts(attempt) for attempt in range(3))
    assert set(first) == set(second) == set(third) == {0, 1}
    assert first[0]["tf_config"]["cluster"] != second[0]["tf_config"]["cluster"]
    assert first[0]["argv"] == ["--resume=must"]
    assert second[1]["argv"] == third[0]["argv"] == ["--resume=must", "--resume=auto"]
    err = capfd.readouterr().err
    assert f"worker 1 {describe(loss)}" in err
    assert "restarting all workers from the last checkpoint (2 of 2)" in err
    stage.assert_nothing_left()


def test_a_lone_worker_restarts(stage):
    assert stage.run([[-9], [75], [0]], max_restarts=2) == 0
    assert stage.starts(2)


def test_gives_up_when_restarts_are_used_up(stage, capfd):
    assert stage.run([[-9, 75], [75, 75]], max_restarts=1) == 75
    assert "the end of" in capfd.readouterr().err
    assert not stage.starts(2)


def test_a_stopped_worker_does_not_survive_the_restart(stage, capfd):
    assert stage.run([[75, "stop"], [0, 0]], max_restarts=1) == 0
    assert "worker 1 did not leave within 0.3 s; killed" in capfd.readouterr().err
    stage.assert_nothing_left()


@pytest.mark.parametrize("code", [1, 2, 3, 4, 6])
def test_a_real_error_ends_it_at_once_and_the_others_may_save(stage, capfd, code):
    assert stage.run([["wait", code]], max_restarts=5) == code
    assert stage.saved(0) == {0: signal.SIGTERM}
    assert not stage.starts(1)
    err = capfd.readouterr().err
    log = stage.logs / "worker-1.log"
    assert err.endswith(f"tapedist: worker 1 ended the run; the end of {log}:\n[1] ready 0\n[1] leaving with {code}\n")
    stage.assert_nothing_left()


def test_a_real_error_beats_the_loss_that_it_causes(stage):
    assert stage.run([[75, 3]], max_restarts=5) == 3
    assert not stage.starts(1)


@pytest.mark.parametrize(
    ("signum", "forwarded", "code"),
    [(signal.SIGTERM, 15, 143), (signal.SIGINT, 2, 130), (signal.SIGHUP, 1, 129), (signal.SIGUSR1, 10, 138)],
)
def test_a_signal_lets_the_cluster_save(stage, signum, forwarded, code):
    with stage.launcher([["wait", "listen"]], max_restarts=3) as launcher:
        launcher.send_signal(signum)
        _, err = launcher.communicate(timeout=20)
        assert launcher.returncode == code
    assert stage.saved(0) == {0: forwarded, 1: forwarded}
    assert f"{signum.name}: asking the workers to save and leave" in err
    stage.assert_nothing_left()


def test_a_second_interrupt_kills_at_once(stage):
    with stage.launcher([["hang", "hang"]]) as launcher:
        launcher.send_signal(signal.SIGINT)
        assert any("SIGINT: asking" in line for line in launcher.stderr)
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=10)
        assert launcher.returncode == 130
    stage.assert_nothing_left()


def test_workers_that_do_not_save_in_time_are_killed(stage):
    with stage.launcher([["hang", "wait"]], stop_timeout_secs=0.5) as launcher:
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=10)
        assert launcher.returncode == 143
    assert "worker 0 did not leave within 0.5 s; killed" in err
    stage.assert_nothing_left()


def test_a_stop_after_a_loss_gives_the_others_their_full_time(stage):
    with stage.launcher([[75, "hang"]], stop_timeout_secs=1.0, max_restarts=1) as launcher:
        assert any("worker 0 exited with 75" in line for line in launcher.stderr)
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=20)
        assert launcher.returncode == 143
    assert "worker 1 did not leave within 1 s; killed" in err
    assert not stage.starts(1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a killed parent")
def test_no_worker_survives_a_killed_launcher(stage):
    with stage.launcher([["hang", "listen", "stop"]]) as launcher:
        workers = [psutil.Process(start["pid"]) for start in stage.starts(0).values()]
        assert len(workers) == 3
        launcher.kill()
        launcher.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
    stage.assert_nothing_left()


def test_what_a_worker_started_goes_with_it(stage):
    with stage.launcher([["child", "wait"]]) as launcher:
        child = psutil.Process(stage.starts(0)[0]["child"])
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=20)
        _, alive = psutil.wait_procs([child], timeout=10)
        assert not alive


def test_a_closed_stdout_does_not_disturb_the_workers(stage):
    with stage.launcher([["many"]]) as launcher:
        launcher.stdout.close()
        assert launcher.wait(timeout=20) == 0
        assert launcher.stderr.read().count("\n") == 1
    assert (stage.logs / "worker-0.log").read_text().endswith("line 19999\n")


def test_any_bytes_pass(stage, capfd):
    assert stage.run([["noise", 0]]) == 0
    out, err = capfd.readouterr()
    assert "[0] bytes \ufffd\n" in out
    assert "[0] to stderr\n" in err
    assert sum(line.count("x") for line in out.splitlines() if line.startswith("[0] xxx")) == 200_000
    assert b"bytes \xff\n" in (stage.logs / "worker-0.log").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_log_not_the_run(stage, capfd):
    stage.logs.mkdir()
    (stage.logs / "worker-0.log").symlink_to("/dev/full")
    assert stage.run([["many"]]) == 0
    out, err = capfd.readouterr()
    assert "line 19999" in out
    assert err.count("its log ends here") == 1


def test_signal_handlers_are_restored(stage):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    assert stage.run([[0]]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_workers": 0}, "--num_workers=0: must be from 1 to 256"),
        ({"num_workers": True}, "--num_workers=True"),
        ({"num_workers": 257}, "--num_workers=257"),
        ({"max_restarts": -1}, "--max_restarts=-1"),
        ({"virtual_devices_per_worker": -1}, "--virtual_devices_per_worker=-1"),
        ({"stop_timeout_secs": 0.0}, "--stop_timeout_secs=0.0"),
        ({"stop_timeout_secs": float("nan")}, "--stop_timeout_secs=nan"),
        ({"log_dir": "a\x1b"}, "--log_dir='a\\x1b'"),
        ({"log_dir": "gs://a/b"}, "--log_dir='gs://a/b': must be a local path"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(InputError) as caught:
        LaunchConfig(**settings)
    assert said in str(caught.value)


def test_all_wrong_settings_at_once():
    with pytest.raises(InputError) as caught:
        LaunchConfig(num_workers=0, max_restarts=-1)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("num_workers", "argv", "environ", "said"),
    [
        (2, [], {}, "found nothing after '--'"),
        (2, ["report"], {}, "found 'report' after '--', but only train"),
        (2, ["train", "--workers=a:1,b:2"], {}, "--workers: has no meaning"),
        (2, ["train", "--worker_index=0"], {}, "--worker_index: has no meaning"),
        (2, ["train"], {"TF_CONFIG": "{1}"}, "TF_CONFIG: is not JSON"),
        (2, ["train"], {"TF_CONFIG": TWO_PROCESSES}, "TF_CONFIG: names a cluster, but --num_workers=2"),
    ],
)
def test_wrong_commands(num_workers, argv, environ, said):
    with pytest.raises(InputError, match=said):
        main(LaunchConfig(num_workers=num_workers, worker_argv=tuple(argv)), environ=environ)


def test_a_log_dir_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(InputError, match="cannot be written"):
            main(LaunchConfig(log_dir=str(folder)))


def test_launching_imports_no_tensorflow():
    code = "import sys; import tapedist.cluster.launch; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPO).returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_workers=2", "--", "train", "--virtual_shards=8"], "--virtual_shards=8: is gone"),
        (["--num_workers=2", "--", "train", "--strategy=mirrored"], "--strategy=mirrored: cannot use the 2 worker(s)"),
    ],
)
def test_what_no_worker_would_take_is_refused_before_any_is_started(words, said, capsys, monkeypatch):
    monkeypatch.setattr(launch, "main", lambda *_: pytest.fail("workers were started"))
    assert cli.main(["launch", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_a_cluster_of_one_process_is_no_obstacle(stage):
    alone = '{"cluster": {"chief": ["a:1"]}, "task": {"type": "chief", "index": 0}}'
    assert stage.run([[0, 0]], environ={"TF_CONFIG": alone}) == 0
    assert [len(start["tf_config"]["cluster"]["worker"]) for start in stage.all_starts()] == [2, 2]
