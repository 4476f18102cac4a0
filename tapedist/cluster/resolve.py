"""Resolves environment and flags to one `ClusterSpec`. Pure, without TensorFlow.

The first of these that is set decides: `TF_CONFIG`, the variables of a SLURM step of several tasks, `--workers` with
`--worker_index`. If none is, the run is one process.

Of SLURM only the step's own variables count. The job's (`SLURM_NTASKS`, `SLURM_PROCID`) are also set in the batch
script, where one process runs and not the whole cluster. See the "output environment variables" of `man srun`.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tapedist.config import TrainConfig
from tapedist.errors import InputError

_MAX_NODES = 65_536
# Below Linux's ephemeral ports (from 32768), so that no outgoing connection holds one by chance.
_FIRST_PORT, _NUM_PORTS = 12_000, 20_000
_TASK_TYPES = ("chief", "worker")
_LOCAL_NAMES = ("localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
_TF_CONFIG_EXAMPLE = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'


def step_workers(environ: Mapping[str, str]) -> tuple[tuple[str, ...], int] | None:
    """Addresses of the tasks of the SLURM step that this process belongs to, and its own rank.

    Tasks are laid out in blocks, node after node, which is srun's default. A node's tasks get consecutive ports, from
    the ports that `srun --resv-ports` reserved, else from one that follows from the job's and the step's numbers.

    Args:
        environ: environment variables, such as `os.environ`.

    Returns:
        `(addresses, rank)`, or None outside a step and in a step of one task.

    Raises:
        InputError: if a variable is missing, malformed or contradicts another.
    """
    if "SLURM_STEP_NODELIST" not in environ:
        return None
    num_tasks = _integer(environ, "SLURM_STEP_NUM_TASKS", least=1)
    if num_tasks == 1:
        return None
    rank = _integer(environ, "SLURM_PROCID", least=0)
    if rank >= num_tasks:
        raise InputError(f"SLURM_PROCID={rank}: must be below SLURM_STEP_NUM_TASKS={num_tasks}; start with srun")
    nodes = expand_nodelist(environ["SLURM_STEP_NODELIST"])
    tasks = _tasks_per_node(environ, len(nodes), num_tasks)
    _check_layout(environ, tasks, rank)
    ports = _ports(environ, max(tasks))
    return tuple(f"{node}:{ports[i]}" for node, count in zip(nodes, tasks, strict=True) for i in range(count)), rank


def expand_nodelist(text: str) -> list[str]:
    """Node names of a SLURM node list such as `node[01-03,07],gpu5`, in its order.

    Raises:
        InputError: if the list is malformed or names more than 65,536 nodes.
    """
    nodes: list[str] = []
    for item in _split_outside_brackets(text):
        for name in _expand(item, text):
            nodes.append(name)
            if len(nodes) > _MAX_NODES:
                raise InputError(f"SLURM_STEP_NODELIST={text!r}: must not name more than {_MAX_NODES} nodes")
    return nodes


def _malformed(text: str) -> InputError:
    return InputError(f"SLURM_STEP_NODELIST={text!r}: must be node names such as node[01-03,07],gpu5; start with srun")


def _split_outside_brackets(text: str) -> list[str]:
    items = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not items or ",".join(items) != text:
        raise _malformed(text)
    return items


def _expand(item: str, text: str) -> Iterator[str]:
    """The names of one item; with several brackets, the last one varies fastest."""
    match = re.fullmatch(r"([\w.-]*)\[([\d,-]+)\](.*)", item, re.ASCII)
    if match is None:
        if not re.fullmatch(r"[\w.-]+", item, re.ASCII):
            raise _malformed(text)
        yield item
        return
    head, ranges, tail = match.groups()
    for span in ranges.split(","):
        bounds = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", span, re.ASCII)
        if bounds is None or int(bounds[2] or bounds[1]) < int(bounds[1]):
            raise _malformed(text)
        for number in range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1):
            # Leading zeros are part of a name: `node[08-10]` is node08, node09, node10.
            name = f"{head}{number:0{len(bounds[1])}d}"
            yield from (name + rest for rest in _expand(tail, text)) if tail else (name,)


def _tasks_per_node(environ: Mapping[str, str], num_nodes: int, num_tasks: int) -> list[int]:
    """Task counts of the nodes, from text such as `2(x3),1`."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in text.split(",") if text else [f"1(x{num_nodes})"]:
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part, re.ASCII)
        if match is None:
            raise InputError(f"SLURM_STEP_TASKS_PER_NODE={text!r}: must be counts such as 2(x3),1; start with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    if len(counts) != num_nodes or sum(counts) != num_tasks:
        raise InputError(
            f"SLURM_STEP_TASKS_PER_NODE={text!r}: must describe SLURM_STEP_NUM_TASKS={num_tasks} tasks on the "
            f"{num_nodes} nodes of SLURM_STEP_NODELIST={environ['SLURM_STEP_NODELIST']!r}; start with srun"
        )
    return counts


def _check_layout(environ: Mapping[str, str], tasks: list[int], rank: int) -> None:
    """Raises for a layout other than blocks, in which ranks would have other tasks' nodes."""
    if "SLURM_NODEID" not in environ:
        return
    node = _integer(environ, "SLURM_NODEID", least=0)
    first = sum(tasks[:node])
    if node >= len(tasks) or not first <= rank < first + tasks[node]:
        raise InputError(
            f"SLURM_NODEID={node}: does not hold task SLURM_PROCID={rank} when tasks are laid out in blocks; "
            "start with srun --distribution=block"
        )


def _ports(environ: Mapping[str, str], count: int) -> list[int]:
    reserved = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", environ.get("SLURM_STEP_RESV_PORTS", ""), re.ASCII)
    if reserved and int(reserved[2] or reserved[1]) - int(reserved[1]) + 1 >= count:
        return list(range(int(reserved[1]), int(reserved[1]) + count))
    job = _integer(environ, "SLURM_JOB_ID", least=0) if "SLURM_JOB_ID" in environ else 0
    step = environ.get("SLURM_STEP_ID", "0")
    # 61 spreads neighbouring jobs, 7 the steps of one job: they may share a node.
    first = (61 * job + 7 * (int(step) if step.isascii() and step.isdigit() else 0)) % (_NUM_PORTS - count)
    return list(range(_FIRST_PORT + first, _FIRST_PORT + first + count))


def _integer(environ: Mapping[str, str], name: str, *, least: int) -> int:
    text = environ.get(name)
    if text is None:
        raise InputError(f"{name} is not set, but SLURM_STEP_NODELIST is: start with srun, which sets both")
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or int(text) < least:
        raise InputError(f"{name}={text!r}: must be an integer of at least {least}; start with srun, which sets it")
    return int(text)


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """The processes of a run, in rank order, and the rank of this one.

    Attributes:
        workers: `host:port` of each; empty for a single process.
        index: this process's rank; rank 0 is the chief.
        source: the setting that it comes from, in words for a log line.
        ignored: settings that also name a cluster, but have a lower priority than `source`.
    """

    workers: tuple[str, ...]
    index: int
    source: str
    ignored: tuple[str, ...] = ()

    @property
    def num_workers(self) -> int:
        return max(1, len(self.workers))

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    @property
    def address(self) -> str:
        """This process's own `host:port`; empty for a single process."""
        return self.workers[self.index] if self.workers else ""

    def to_tf_config(self) -> str:
        """The value of `TF_CONFIG` for this cluster; ranks are worker indices, without a chief job."""
        if not self.workers:
            return "{}"
        task = {"type": "worker", "index": self.index}
        return json.dumps({"cluster": {"worker": list(self.workers)}, "task": task})


def resolve(environ: Mapping[str, str], *, workers: Sequence[str] = (), worker_index: int | None = None) -> ClusterSpec:
    """Finds the cluster that this process belongs to.

    Args:
        environ: environment variables, such as `os.environ`.
        workers: `--workers`, one `host:port` per process in rank order.
        worker_index: `--worker_index`, this process's rank; None where the flag is not given.

    Raises:
        InputError: if the deciding setting is malformed; `problems` lists all of its errors.
    """
    flags = ("--workers",) if workers else ("--worker_index",) if worker_index is not None else ()
    if environ.get("TF_CONFIG", "").strip() not in ("", "{}"):
        addresses, index = _from_tf_config(environ["TF_CONFIG"])
        also = ("the SLURM step's variables",) if "SLURM_STEP_NODELIST" in environ else ()
        return _of_several(ClusterSpec(addresses, index, "TF_CONFIG", also + flags))
    step = step_workers(environ)
    if step is not None:
        _refuse(*_wrong_addresses("SLURM_STEP_NODELIST", step[0]))
        return ClusterSpec(*step, "the SLURM step's variables", flags)
    if flags:
        _refuse(*_wrong_flags(workers, worker_index))
        return _of_several(ClusterSpec(tuple(workers), worker_index or 0, "--workers"))
    return ONE_PROCESS


def _of_several(spec: ClusterSpec) -> ClusterSpec:
    """Returns `spec`, or a single process for a cluster of one, which job managers set, too."""
    if len(spec.workers) > 1:
        return spec
    return ClusterSpec((), 0, f"{spec.source} names this process alone", spec.ignored)


ONE_PROCESS = ClusterSpec((), 0, "no cluster setting")


def of_run(config: TrainConfig, environ: Mapping[str, str]) -> ClusterSpec:
    """`resolve` for a run's settings, with its strategy checked.

    Raises:
        InputError: as `resolve` and `check_strategy`.
    """
    spec = resolve(
        environ, workers=config.workers, worker_index=None if config.worker_index < 0 else config.worker_index
    )
    check_strategy(spec, config.strategy)
    return spec


def check_strategy(spec: ClusterSpec, strategy: str) -> None:
    """Raises for a strategy with which the other workers of `spec` would wait forever.

    Raises:
        InputError: if a cluster is set and `strategy` is neither "auto" nor "multiworker".
    """
    if spec.workers and strategy not in ("auto", "multiworker"):
        raise InputError(
            f"--strategy={strategy}: cannot use the {len(spec.workers)} worker(s) that {spec.source} names; "
            "use --strategy=auto or multiworker, or start without that setting"
        )


def split_address(address: str) -> tuple[str, int]:
    """`(host, port)` of `host:port` or `[IPv6]:port`.

    Raises:
        InputError: if `address` is anything else.
    """
    problem = _wrong_address(address)
    if problem:
        raise InputError(f"address {address!r} {problem}")
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _refuse(*problems: str) -> None:
    if problems:
        raise InputError(*problems)


def _wrong_addresses(setting: str, addresses: Sequence[Any]) -> Iterator[str]:
    """One sentence per address that is no `host:port` or names a process a second time."""
    seen: dict[tuple[str, int], int] = {}
    for rank, address in enumerate(addresses):
        problem = _wrong_address(address)
        if problem:
            yield f"{setting}: address {address!r} of rank {rank} {problem}"
        elif (key := _meaning(address)) in seen:
            first = addresses[seen[key]]
            other = "" if first == address else f", as {first!r},"
            yield (
                f"{setting}: address {address!r} is given to rank {rank} and{other} to rank {seen[key]}; "
                "give every process its own host:port"
            )
        else:
            seen[key] = rank


def is_this_machine(host: str) -> bool:
    """Returns whether `host` is a name of the machine itself on every machine."""
    if host.lower().removesuffix(".") in _LOCAL_NAMES:
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_loopback or ip.is_unspecified


def _meaning(address: str) -> tuple[str, int]:
    """A canonical host and port, equal for all spellings of an address that need no name server."""
    host, port = split_address(address)
    if is_this_machine(host):
        return "localhost", port  # Also for 0.0.0.0: TensorFlow's server listens on all interfaces anyway.
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().removesuffix("."), port
    return str(getattr(ip, "ipv4_mapped", None) or ip), port


def _wrong_address(address: Any) -> str:
    """The error in `address`; empty if it is `host:port`."""
    if not isinstance(address, str):
        return "must be a string host:port"
    if "://" in address:
        return f"must be host:port without a scheme; drop {address.split('://')[0] + '://'!r}"
    host, colon, port = address.rpartition(":")
    bracketed = re.fullmatch(r"\[[0-9A-Fa-f:.]+\]", host)
    if not colon or address.endswith("]"):
        return "has no port; write host:port, for example host0:2222"
    if colon and not bracketed and ":" in host:
        return "must be host:port; put an IPv6 host in brackets, as in [::1]:2222"
    if not bracketed and not re.fullmatch(r"[\w.-]+", host, re.ASCII):
        return "must be host:port with letters, digits, '.', '-' and '_' in the host"
    if not re.fullmatch(r"\d{1,9}", port, re.ASCII) or not 1 <= int(port) <= 65535:
        return "must have a port from 1 to 65535"
    return ""


def _wrong_flags(workers: Sequence[str], worker_index: int | None) -> Iterator[str]:
    yield from _wrong_addresses("--workers", workers)
    if not workers:
        yield f"--worker_index={worker_index}: needs --workers=host:port,..., the addresses of all processes"
    elif worker_index is None and len(workers) > 1:
        yield f"--workers: names {len(workers)} processes, so --worker_index must say which of them this one is"
    elif worker_index is not None and not 0 <= worker_index < len(workers):
        yield f"--worker_index={worker_index}: must be from 0 to {len(workers) - 1}, one for each of --workers"


def _from_tf_config(text: str) -> tuple[tuple[str, ...], int]:
    """Addresses in rank order (a chief is rank 0) and this process's rank."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _tf_config(f"is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise _tf_config(f"must be a JSON object, not {_json_kind(config)}")
    for key in ("cluster", "task"):
        if not isinstance(config.get(key), dict):
            found = f"is {_json_kind(config[key])}, not an object" if key in config else "is missing"
            raise _tf_config(f"key {key!r} {found}")
    chief, worker = _jobs(config["cluster"])
    _refuse(*_wrong_addresses("TF_CONFIG", chief + worker))
    return tuple(chief + worker), _rank(config["task"], len(chief), len(worker))


def _tf_config(problem: str) -> InputError:
    return InputError(f"TF_CONFIG: {problem}; write {_TF_CONFIG_EXAMPLE}")


def _json_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _jobs(cluster: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Address lists of the chief job and of the worker job."""
    for name, addresses in cluster.items():
        if name not in _TASK_TYPES:
            raise _tf_config(f"cluster holds job {name!r}, but all processes must be 'chief' or 'worker'")
        if not isinstance(addresses, list):
            raise _tf_config(f"job {name!r} must be a list of host:port, not {_json_kind(addresses)}")
    chief, worker = cluster.get("chief", []), cluster.get("worker", [])
    if len(chief) > 1:
        raise _tf_config(f"job 'chief' holds {len(chief)} addresses, but there must be one chief")
    if not chief and not worker:
        raise _tf_config("cluster names no process")
    return chief, worker


def _rank(task: dict[str, Any], num_chiefs: int, num_workers: int) -> int:
    kind, index = task.get("type"), task.get("index")
    if kind not in _TASK_TYPES:
        raise _tf_config(f"task type {kind!r} must be 'chief' or 'worker'")
    size = num_chiefs if kind == "chief" else num_workers
    if type(index) is not int:
        raise _tf_config(f"task index {index!r} must be an integer")
    if not 0 <= index < size:
        raise _tf_config(f"task index {index} is out of range: the cluster has {size} of type {kind!r}")
    return index if kind == "chief" else num_chiefs + index
