"""What SLURM says about a job step: its variables in, one address per task out. Pure and TensorFlow-free.

Only the step's own variables count. The job's (`SLURM_NTASKS`, `SLURM_PROCID`) are also set in the batch script, where
one process runs and not the whole cluster. See the "output environment variables" of `man srun`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from tapedist.errors import InputError

_MAX_NODES = 65_536
# Below Linux's ephemeral ports (from 32768), so that no outgoing connection holds one by chance.
_FIRST_PORT, _NUM_PORTS = 12_000, 20_000


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
    """Names that one item stands for; brackets may follow one another, the last counts fastest."""
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
    """Refuses a layout other than blocks, under which the ranks would name other tasks' nodes."""
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
