"""Every way to name a cluster, and every way to name it wrongly."""

import json
import re
import subprocess
import sys

import pytest

from tapedist.cluster import resolve as resolve_module
from tapedist.cluster.resolve import ClusterSpec, check_strategy, resolve, split_address
from tapedist.errors import InputError


def tf_config(cluster, task) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


TWO = {"worker": ["a:1", "b:2"]}
FIRST = {"type": "worker", "index": 0}
STEP = {
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "100",
    "SLURM_STEP_ID": "0",
}


def test_nothing_set_is_one_process():
    spec = resolve({})
    assert (spec.workers, spec.num_workers, spec.index, spec.address) == ((), 1, 0, "")
    assert spec.is_chief
    assert spec.to_tf_config() == "{}"
    assert spec.source == "no cluster setting"


@pytest.mark.parametrize("value", ["", " ", "{}"])
def test_empty_tf_config_is_no_cluster(value):
    assert resolve({"TF_CONFIG": value}).workers == ()


def test_tf_config_workers():
    spec = resolve(tf_config(TWO, {"type": "worker", "index": 1}))
    assert (spec.workers, spec.index, spec.source) == (("a:1", "b:2"), 1, "TF_CONFIG")
    assert spec.address == "b:2"
    assert not spec.is_chief


@pytest.mark.parametrize(("task", "rank"), [(("chief", 0), 0), (("worker", 0), 1), (("worker", 1), 2)])
def test_a_chief_job_is_rank_0(task, rank):
    environ = tf_config({"worker": ["a:1", "b:2"], "chief": ["c:3"]}, dict(zip(("type", "index"), task, strict=True)))
    spec = resolve(environ)
    assert spec.workers == ("c:3", "a:1", "b:2")
    assert spec.index == rank


def test_tf_config_survives_the_round_trip():
    spec = resolve({}, workers=("a:1", "[::1]:2"), worker_index=1)
    again = resolve({"TF_CONFIG": spec.to_tf_config()})
    assert (again.workers, again.index) == (spec.workers, spec.index)


def test_flags():
    spec = resolve({}, workers=["a:1", "b:2"], worker_index=1)
    assert spec == ClusterSpec(("a:1", "b:2"), 1, "--workers")


def test_one_worker_needs_no_index():
    assert resolve({}, workers=("a:1",)).index == 0


def test_order_of_sources_and_what_is_ignored_is_said():
    everything = tf_config(TWO, FIRST) | STEP
    spec = resolve(everything, workers=("x:1", "y:1"), worker_index=0)
    assert spec.source == "TF_CONFIG"
    assert spec.ignored == ("the SLURM step's variables", "--workers")
    spec = resolve(STEP, workers=("x:1", "y:1"), worker_index=0)
    assert spec.source == "the SLURM step's variables"
    assert spec.ignored == ("--workers",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be a JSON object, not a list"),
        ("3", "not a number"),
        ('"x"', "not a string"),
        ("null", "not null"),
        ('{"task": {}}', "key 'cluster' is missing"),
        ('{"cluster": {}}', "key 'task' is missing"),
        ('{"cluster": [], "task": {}}', "key 'cluster' is a list, not an object"),
        ('{"cluster": {}, "task": 1}', "key 'task' is a number, not an object"),
    ],
)
def test_tf_config_shape(text, said):
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        resolve({"TF_CONFIG": text})
    assert str(caught.value).startswith("TF_CONFIG: ")
    assert "\n" not in str(caught.value)
    assert "write {" in str(caught.value)


@pytest.mark.parametrize(
    ("cluster", "task", "said"),
    [
        (TWO, {"type": "worker", "index": 2}, "index 2 is out of range: the cluster has 2"),
        (TWO, {"type": "worker", "index": -1}, "index -1 is out of range"),
        (TWO, {"type": "worker", "index": "0"}, "index '0' must be an integer"),
        (TWO, {"type": "worker", "index": True}, "index True must be an integer"),
        (TWO, {"type": "worker", "index": 0.0}, "index 0.0 must be an integer"),
        (TWO, {"type": "worker"}, "index None must be an integer"),
        (TWO, {"index": 0}, "type None must be"),
        (TWO, {"type": "ps", "index": 0}, "type 'ps' must be"),
        (TWO, {"type": "evaluator", "index": 0}, "type 'evaluator' must be"),
        (TWO, {"type": "chief", "index": 0}, "has 0 of type 'chief'"),
        (TWO | {"ps": ["p:1"]}, FIRST, "job 'ps'"),
        ({"chief": ["a:1", "b:1"]}, {"type": "chief", "index": 0}, "must be one chief"),
        ({"worker": {"0": "a:1"}}, FIRST, "must be a list of host:port, not an object"),
        ({"worker": []}, FIRST, "names no process"),
        ({}, FIRST, "names no process"),
    ],
)
def test_tf_config_content(cluster, task, said):
    with pytest.raises(InputError, match=re.escape(said)):
        resolve(tf_config(cluster, task))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("b", "has no port"),
        ("b:", "port from 1 to 65535"),
        ("b:0", "port from 1 to 65535"),
        ("b:70000", "port from 1 to 65535"),
        ("b:-1", "port from 1 to 65535"),
        ("b:\u0662", "port from 1 to 65535"),
        (":1", "in the host"),
        ("b c:1", "in the host"),
        ("b\x1b[2J:1", "in the host"),
        ("grpc://b:1", "drop 'grpc://'"),
        ("::1:2", "put an IPv6 host in brackets"),
        ("[::1]", "has no port"),
        ("A:1", "give every process its own"),
        (7, "must be a string"),
        (None, "must be a string"),
    ],
)
def test_addresses(address, said):
    for attempt in (
        lambda: resolve(tf_config({"worker": ["a:1", address]}, FIRST)),
        lambda: resolve({}, workers=("a:1", address), worker_index=0),
    ):
        with pytest.raises(InputError, match=re.escape(said)) as caught:
            attempt()
        assert str(caught.value).isprintable()
        assert "rank 1" in str(caught.value)


def test_all_bad_addresses_are_reported_at_once():
    with pytest.raises(InputError) as caught:
        resolve({}, workers=("a", "b:0", "c:1"), worker_index=3)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("workers", "index", "said"),
    [
        ((), 0, "needs --workers"),
        (("a:1", "b:1"), None, "--worker_index must say"),
        (("a:1", "b:1"), 2, "must be from 0 to 1"),
        (("a:1", "b:1"), -1, "must be from 0 to 1"),
    ],
)
def test_wrong_flags(workers, index, said):
    with pytest.raises(InputError, match=re.escape(said)):
        resolve({}, workers=workers, worker_index=index)


def test_split_address():
    assert split_address("host-1.x:22") == ("host-1.x", 22)
    assert split_address("[::1]:22") == ("::1", 22)
    with pytest.raises(InputError, match="has no port"):
        split_address("host")


@pytest.mark.parametrize("strategy", ["default", "mirrored", "tpu"])
def test_a_strategy_that_ignores_the_cluster_is_refused(strategy):
    spec = resolve(tf_config(TWO, FIRST))
    with pytest.raises(InputError, match=f"--strategy={strategy}.*TF_CONFIG"):
        check_strategy(spec, strategy)
    check_strategy(resolve({}), strategy)


@pytest.mark.parametrize("strategy", ["auto", "multiworker"])
def test_a_strategy_that_uses_the_cluster_passes(strategy):
    check_strategy(resolve(tf_config(TWO, FIRST)), strategy)


def test_slurm_step():
    spec = resolve(STEP)
    hosts = [worker.split(":")[0] for worker in spec.workers]
    ports = [int(worker.split(":")[1]) for worker in spec.workers]
    assert hosts == ["node01", "node01", "node02"]
    assert spec.index == 2
    assert ports[1] == ports[0] + 1
    assert ports[2] == ports[0]
    assert all(12_000 <= port < 32_768 for port in ports)


def test_slurm_jobs_and_steps_that_share_a_node_get_other_ports():
    ports = {
        worker
        for job in ("100", "101", "102")
        for step in ("0", "1")
        for worker in resolve(STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).workers
    }
    assert len(ports) == 3 * 2 * 3


def test_slurm_reserved_ports_are_used():
    workers = resolve(STEP | {"SLURM_STEP_RESV_PORTS": "13001-13002"}).workers
    assert workers == ("node01:13001", "node01:13002", "node02:13001")
    too_few = resolve(STEP | {"SLURM_STEP_RESV_PORTS": "13001"}).workers
    assert len(set(too_few)) == 3


def test_slurm_step_without_a_task_layout_has_one_task_a_node():
    environ = {key: value for key, value in STEP.items() if key != "SLURM_STEP_TASKS_PER_NODE"}
    spec = resolve(environ | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"})
    assert [worker.split(":")[0] for worker in spec.workers] == ["node01", "node02"]


def test_outside_a_step_the_job_variables_do_not_count():
    assert resolve({"SLURM_JOB_NODELIST": "a,b", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}).workers == ()
    assert resolve(STEP | {"SLURM_STEP_NUM_TASKS": "1"}).workers == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SLURM_PROCID": "3"}, "must be below SLURM_STEP_NUM_TASKS=3"),
        ({"SLURM_PROCID": "x"}, "must be an integer"),
        ({"SLURM_PROCID": "-1"}, "must be an integer"),
        ({"SLURM_STEP_NUM_TASKS": "0"}, "at least 1"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "must describe SLURM_STEP_NUM_TASKS=4"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3"}, "on the 2 nodes"),
        ({"SLURM_STEP_TASKS_PER_NODE": "x"}, "must be counts"),
        ({"SLURM_NODEID": "0"}, "--distribution=block"),
        ({"SLURM_NODEID": "9"}, "--distribution=block"),
        ({"SLURM_STEP_NODELIST": ""}, "must be node names"),
        ({"SLURM_STEP_NODELIST": "node[01-"}, "must be node names"),
        ({"SLURM_STEP_NODELIST": "node[3-1]"}, "must be node names"),
        ({"SLURM_STEP_NODELIST": "n[]"}, "must be node names"),
        ({"SLURM_STEP_NODELIST": "a,,b"}, "must be node names"),
        ({"SLURM_STEP_NODELIST": "a b"}, "must be node names"),
        ({"SLURM_STEP_NODELIST": "n[0-99999999999]"}, "more than 65536 nodes"),
        ({"SLURM_STEP_NODELIST": "a,a"}, "give every process its own"),
    ],
)
def test_wrong_slurm_variables(change, said):
    with pytest.raises(InputError, match=re.escape(said)):
        resolve(STEP | change)


def test_missing_slurm_variable():
    environ = {key: value for key, value in STEP.items() if key != "SLURM_PROCID"}
    with pytest.raises(InputError, match="SLURM_PROCID is not set"):
        resolve(environ)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("a", ["a"]),
        ("a,b.c-d", ["a", "b.c-d"]),
        ("node[01-03,07],gpu5", ["node01", "node02", "node03", "node07", "gpu5"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("n[1,3]-ib,x[2]", ["n1-ib", "n3-ib", "x2"]),
    ],
)
def test_nodelist(text, nodes):
    assert resolve_module.expand_nodelist(text) == nodes


def test_resolving_imports_no_tensorflow():
    code = f"import sys; import {resolve_module.__name__}; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("localhost:2222", "127.0.0.1:2222"),
        ("127.0.0.1:2222", "127.0.0.1:02222"),
        ("localhost:2222", "LocalHost:2222"),
        ("localhost:2222", "localhost.:2222"),
        ("localhost:2222", "[::1]:2222"),
        ("127.0.0.1:2222", "127.0.0.2:2222"),
        ("127.0.0.1:2222", "0.0.0.0:2222"),
        ("[::]:2222", "[::1]:2222"),
        ("[::1]:2222", "[0:0:0:0:0:0:0:1]:2222"),
        ("[::ffff:10.0.0.1]:2222", "10.0.0.1:2222"),
        ("[2001:db8::1]:2222", "[2001:0DB8:0::1]:2222"),
        ("host0:2222", "HOST0.:2222"),
        ("ip6-localhost:2222", "localhost.localdomain:2222"),
    ],
)
def test_one_address_under_two_spellings(first, second):
    said = f"{second!r} is given to rank 1 and, as {first!r}, to rank 0; give every process its own host:port"
    for environ, workers in (({}, (first, second)), (tf_config({"worker": [first, second]}, FIRST), ())):
        with pytest.raises(InputError, match=re.escape(said)):
            resolve(environ, workers=workers, worker_index=0)


def test_other_addresses_stay_apart():
    workers = ("localhost:2222", "127.0.0.1:2223", "10.0.0.1:2222", "10.0.0.10:2222", "host:2222", "host.domain:2222")
    assert resolve({}, workers=workers, worker_index=0).workers == workers


@pytest.mark.parametrize("job", ["chief", "worker"])
def test_one_process_is_no_cluster_whatever_names_it(job):
    spec = resolve(tf_config({job: ["a:1"]}, {"type": job, "index": 0}), workers=["x:1", "y:1"], worker_index=0)
    assert (spec.workers, spec.num_workers, spec.index, spec.address) == ((), 1, 0, "")
    assert spec.source == "TF_CONFIG names this process alone"
    assert spec.ignored == ("--workers",)
    for strategy in ("auto", "default", "mirrored", "multiworker", "tpu"):
        check_strategy(spec, strategy)
    assert resolve({}, workers=["a:1"], worker_index=0).workers == ()
