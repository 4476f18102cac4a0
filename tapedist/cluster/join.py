"""Joining a cluster: wait for the workers, compare their devices, make the strategy, start the watchdog.

TensorFlow itself waits forever, without a message and without handling signals, and fails late and with obscure
messages where workers have different devices. So each worker first opens its own port and connects to all others. The
accepting side sends its `_Info`, then the connecting one does. Once all have answered, each closes its port, and
TensorFlow's server opens it again; a worker that is a moment late may find that server.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow as tf

from tapedist.cluster import strategies
from tapedist.cluster.network import check_own_name, listening_notice, port_taken, without_proxy
from tapedist.cluster.resolve import ClusterSpec, is_this_machine, split_address
from tapedist.cluster.strategies import Choice
from tapedist.cluster.team import SingleProcessTeam, Team
from tapedist.cluster.watchdog import Watchdog
from tapedist.config import TrainConfig
from tapedist.errors import InputError, Interrupted, PeerLostError

_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2
_AFTER_WORDS_SECS = 0.2
_RETRY_SECS = 0.1
_PROBE_SECS = 2.0
_SILENCE_SECS = 0.5
_MAX_PROBES = 64
# Before an error ends the process, so that the others still get its `_Info` and can report the same error.
_LINGER_SECS = 1.0
_GREETING = b"tapedist "
_MAX_INFO_BYTES = 2**20
# Least time for TensorFlow to connect workers that are all there.
_CONNECT_SECS = 30.0


class _Event(ctypes.Structure):
    """`struct sigevent` of glibc and musl on 64-bit Linux (`man 7 sigevent`), 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class _Times(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = (
        ("interval_secs", ctypes.c_long),
        ("interval_nanos", ctypes.c_long),
        ("secs", ctypes.c_long),
        ("nanos", ctypes.c_long),
    )


@contextlib.contextmanager
def deadline(seconds: float, *, words: str, code: int) -> Iterator[None]:
    """Ends the process with `code` after `words` on stderr, unless the block is left before `seconds` have passed.

    The C library's timers call `warnx` and `_exit` in threads of their own. Without them (not Linux), there is no
    deadline.
    """
    # Not a Python thread: TensorFlow holds the interpreter's lock while it waits for peers, so no Python code runs.
    if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        yield
        return
    libc = ctypes.CDLL(None)
    text = ctypes.create_string_buffer(f"error: {words}".replace("%", "%%").encode())
    with contextlib.suppress(ValueError):  # `warnx` begins with the program's name, which only glibc lets us set.
        ctypes.c_char_p.in_dll(libc, "program_invocation_short_name").value = b"tapedist"
    # `text` must stay alive until the timers are deleted: they hold its address, not a reference.
    timers = [
        _start_timer(libc, seconds, libc.warnx, ctypes.addressof(text)),
        _start_timer(libc, seconds + _AFTER_WORDS_SECS, libc._exit, code),
    ]
    try:
        yield
    finally:
        for timer in timers:
            libc.timer_delete(timer)


def _start_timer(libc: ctypes.CDLL, seconds: float, function: object, argument: int) -> ctypes.c_void_p:
    """A timer that calls the C `function(argument)` once."""
    event = _Event(argument, 0, _SIGEV_THREAD, ctypes.cast(function, ctypes.c_void_p), None, b"")  # type: ignore[arg-type]
    timer = ctypes.c_void_p()
    if libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError("timer_create failed")
    times = _Times(0, 0, int(seconds), max(1, int(seconds % 1 * 1e9)))  # All zeros would disarm the timer.
    libc.timer_settime(timer, 0, ctypes.byref(times), None)
    return timer


@dataclasses.dataclass(frozen=True)
class _Info:
    """The message of a process about itself.

    Attributes:
        process: a random number, the same at each address that leads to this process.
        rank: its rank.
        num_workers: the number of workers in its configuration.
        facts: values that must be equal on all workers.
    """

    process: str
    rank: int
    num_workers: int
    facts: Mapping[str, Any]

    def line(self) -> bytes:
        return _GREETING + json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> _Info | None:
        """Parses a line; None if another program sent it, such as TensorFlow's server."""
        try:
            content = json.loads(line.removeprefix(_GREETING)) if line.startswith(_GREETING) else {}
            return cls(
                str(content["process"]), int(content["rank"]), int(content["num_workers"]), dict(content["facts"])
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


def await_peers(
    spec: ClusterSpec,
    timeout_secs: float,
    *,
    facts: Mapping[str, Any] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Returns once every other worker of `spec` has answered, or a stop was requested.

    Args:
        spec: the cluster.
        timeout_secs: how long to wait.
        facts: by name, JSON values that must be equal on all workers.
        stopped: called several times a second.
        clock: monotonic seconds.

    Raises:
        InputError: if this worker's address cannot be its own, two addresses lead to one process, a process has
            another rank than expected, or facts differ; with ranks and keys.
        PeerLostError: if some did not answer in time, with their addresses.
    """
    check_own_name(spec.address, stopped=stopped, timeout_secs=timeout_secs)
    own = _Info(secrets.token_hex(16), spec.index, spec.num_workers, facts or {})
    registry = _Registry(spec, own)
    end = clock() + timeout_secs
    with _Listener(spec.address, own, registry):
        # This worker asks its own address, too: it may lead to another process, or to this one under a second rank.
        missing = dict.fromkeys(range(spec.num_workers), "")
        while missing.keys() - {spec.index} and not stopped():
            missing = _ask(registry, own, missing, min(_PROBE_SECS, max(0.1, end - clock())))
            if registry.problems:
                time.sleep(_LINGER_SECS)
                raise InputError(*registry.problems[:1])
            if missing.keys() - {spec.index}:
                if clock() >= end:
                    raise PeerLostError(missed(missing, spec, timeout_secs))
                time.sleep(_RETRY_SECS)
        if problems := registry.differences():
            time.sleep(_LINGER_SECS)
            raise InputError(*problems)


def missed(missing: Mapping[int, str], spec: ClusterSpec, timeout_secs: float) -> str:
    """The message about workers that did not answer.

    Args:
        missing: rank -> the reason, if known; this worker's own rank does not count.
        spec: the cluster.
        timeout_secs: how long they were waited for.
    """
    ranks = sorted(missing.keys() - {spec.index})
    names = ", ".join(f"{spec.workers[rank]} (rank {rank}{missing[rank]})" for rank in ranks)
    correct = "correct the address, " if any(missing[rank] for rank in ranks) else ""
    return (
        f"no answer from {names} within --cluster_timeout_secs={timeout_secs:g}; {correct}start the missing worker, or "
        "open its port to this machine, and try again"
    )


def _ask(registry: _Registry, own: _Info, ranks: Mapping[int, str], timeout_secs: float) -> dict[int, str]:
    """Connects to workers in parallel; returns those that did not answer, each with the reason, if known."""

    def one(rank: int) -> tuple[int, str | None]:
        return rank, _visit(registry, own, rank, timeout_secs)

    with ThreadPoolExecutor(min(_MAX_PROBES, len(ranks))) as pool:
        return {rank: why for rank, why in pool.map(one, ranks) if why is not None}


def _visit(registry: _Registry, own: _Info, rank: int, timeout_secs: float) -> str | None:
    """Exchanges `_Info` at the address of worker `rank`: None if it has answered."""
    host, port = split_address(registry.spec.workers[rank])
    try:
        with socket.create_connection((host, port), timeout=timeout_secs) as connection:
            # Two kinds of peers accept and send nothing: TensorFlow's server, in a worker that has connected to this
            # one before and gone on; and a stopped process, for which the kernel accepts, but which never connected
            # here.
            has_called = registry.has_called(rank)
            connection.settimeout(_SILENCE_SECS if has_called else timeout_secs)
            stream = connection.makefile("rwb")
            try:
                info = _Info.of_line(stream.readline(_MAX_INFO_BYTES))
            except TimeoutError:
                is_there = has_called or registry.has_called(rank)
                return None if is_there else ", where something listens that says nothing"
            if info is None:
                return None if has_called or registry.has_called(rank) else ", where something else listens"
            registry.add_answer(rank, info)
            stream.write(own.line())
            stream.flush()
            # Its acknowledgement: it has this worker's `_Info`, so that this one may close its port.
            stream.readline(_MAX_INFO_BYTES)
            return None
    except (socket.gaierror, UnicodeError) as error:
        return f", whose name cannot be looked up: {getattr(error, 'strerror', None) or error}"
    except ConnectionError:
        # A worker that has connected here and closed its port by now is about to start TensorFlow's server there.
        return None if registry.has_called(rank) else _why(host, registry)
    except OSError:
        return _why(host, registry)


def _why(host: str, registry: _Registry) -> str:
    """A possible reason why an address does not answer; empty if none is known."""
    own_host = split_address(registry.spec.address)[0]
    return ", which every machine takes for itself" if is_this_machine(host) and not is_this_machine(own_host) else ""


class _Registry:
    """The `_Info` of all workers, filled by several threads.

    Attributes:
        spec: the cluster.
        problems: contradictions, a sentence each.
    """

    def __init__(self, spec: ClusterSpec, own: _Info):
        self.spec = spec
        self.problems: list[str] = []
        self._own = own
        self._infos = {spec.index: own}
        self._at: dict[str, int] = {own.process: spec.index}
        self._lock = threading.Lock()

    def add_answer(self, rank: int, info: _Info) -> None:
        """Records that the process at the address of worker `rank` has sent `info`."""
        with self._lock:
            if problem := self._wrong_place(rank, info):
                self.problems.append(problem)
            else:
                self._at[info.process] = rank
                self._infos[rank] = info

    def has_called(self, rank: int) -> bool:
        """Returns whether worker `rank` has connected to this process, or answered it."""
        with self._lock:
            return rank in self._infos and rank != self._own.rank

    def add_caller(self, info: _Info) -> None:
        """Records that a process has connected here and sent `info`."""
        with self._lock:
            if info.process == self._own.process:  # This process has visited its own address.
                return
            if problem := self._wrong_worker(info):
                self.problems.append(f"a process that connected to this one {problem}")
            elif info.rank == self._own.rank:
                self.problems.append(
                    f"a process that connected to this one takes itself for rank {info.rank}, which this one is; give "
                    "every process its own --worker_index (or task index in TF_CONFIG)"
                )
            else:
                self._infos.setdefault(info.rank, info)

    def _wrong_place(self, rank: int, info: _Info) -> str:
        workers, own = self.spec.workers, self._own
        same = self._at.get(info.process, rank)
        if same != rank:
            who = "this process itself" if info.process == own.process else "one process"
            return (
                f"addresses {workers[same]!r} (rank {same}) and {workers[rank]!r} (rank {rank}) lead to {who}; give "
                "every process its own host:port, and its own --worker_index"
            )
        if rank == own.rank:
            if info.process == own.process:
                return ""
            return (
                f"own address {workers[rank]!r} (rank {rank}) leads to another process, which takes itself for rank "
                f"{info.rank}; give every process its own --worker_index, and the address of the machine it runs on"
            )
        if problem := self._wrong_worker(info):
            return f"the process at {workers[rank]!r} (rank {rank}) {problem}"
        if info.rank != rank:
            return (
                f"the process at {workers[rank]!r} takes itself for rank {info.rank}, but is rank {rank} here; give "
                "all processes the same list of workers, and every one its own --worker_index"
            )
        return ""

    def _wrong_worker(self, info: _Info) -> str:
        if info.num_workers == self._own.num_workers and 0 <= info.rank < info.num_workers:
            return ""
        return (
            f"knows of {info.num_workers} workers, but here are {self._own.num_workers}; give all processes the same "
            "list of workers"
        )

    def differences(self) -> list[str]:
        """Messages about facts that differ from those of rank 0, or of this worker if rank 0 is not known."""
        chief = self._infos.get(0, self._own)
        return [
            f"rank {rank} ({self.spec.workers[rank]}): {key} is {json.dumps(info.facts.get(key))}, but "
            f"{json.dumps(chief.facts.get(key))} on rank {chief.rank} ({self.spec.workers[chief.rank]}); give all "
            "workers as many devices of one kind (CUDA_VISIBLE_DEVICES, --num_virtual_devices) and one --collective"
            for rank, info in sorted(self._infos.items())
            for key in sorted(chief.facts.keys() | info.facts.keys())
            if info.facts.get(key) != chief.facts.get(key)
        ]


class _Listener:
    """Accepts connections on this worker's port and exchanges `_Info` on each.

    Raises:
        InputError: if the port is not free, when entered.
    """

    def __init__(self, address: str, own: _Info, registry: _Registry):
        self._address, self._own, self._registry = address, own, registry
        self._closing = False

    def __enter__(self) -> _Listener:
        dual = socket.has_dualstack_ipv6()
        try:
            self._server = socket.create_server(
                ("", split_address(self._address)[1]),
                family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=128,
            )  # fmt: skip
        except OSError:
            raise port_taken(self._address) from None
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        # `shutdown` wakes a thread that blocks in `accept`; `close` would not.
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=5)
        self._server.close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection = self._server.accept()[0]
            except OSError:
                if not self._closing:
                    time.sleep(_RETRY_SECS)  # Out of descriptors: others may free some.
                continue
            threading.Thread(target=self._receive, args=[connection], daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # `unreachable` connects and closes without a word.
            connection.settimeout(_PROBE_SECS)
            stream = connection.makefile("rwb")
            stream.write(self._own.line())
            stream.flush()
            info = _Info.of_line(stream.readline(_MAX_INFO_BYTES))
            if info:
                self._registry.add_caller(info)
                stream.write(b"heard\n")
                stream.flush()


@contextlib.contextmanager
def joined(
    config: TrainConfig, spec: ClusterSpec, *, stop_signal: Callable[[], int | None], quiet: bool
) -> Iterator[tuple[tf.distribute.Strategy, Choice, Team | SingleProcessTeam]]:
    """A strategy over all workers of `spec`, and their team, with a watchdog until the block is left.

    Args:
        config: the run's settings.
        spec: the cluster; a single process has a team of its own.
        stop_signal: the signal that asked this process to stop, if one did.
        quiet: whether to omit the notice of the open port.

    Raises:
        InputError: as `strategies.create`.
        PeerLostError: if the cluster did not form in time.
        Interrupted: if a signal asked to stop meanwhile.
    """
    if spec.num_workers == 1:
        yield *strategies.create(config, spec=spec), SingleProcessTeam()
        return
    with without_proxy(spec.workers):
        strategy, choice = _form(config, spec, stop_signal)
        if not quiet:
            print(f"tapedist: {listening_notice(spec.index, spec.address)}", file=sys.stderr, flush=True)
        with Watchdog(spec, config.peer_timeout_secs) as watchdog:
            yield strategy, choice, Team(strategy, spec, watchdog)


def _form(
    config: TrainConfig, spec: ClusterSpec, stop_signal: Callable[[], int | None]
) -> tuple[tf.distribute.Strategy, Choice]:
    limit, begun = config.cluster_timeout_secs, time.monotonic()
    await_peers(spec, limit, facts=strategies.shared_facts(config), stopped=lambda: stop_signal() is not None)
    if signum := stop_signal():
        raise Interrupted(signum, " before the cluster had formed; nothing to save")
    # What is left of the limit, but not less than a connection takes: the last peer may have come just in time.
    seconds = max(limit - (time.monotonic() - begun), min(_CONNECT_SECS, limit))
    late = (
        f"the cluster did not form within --cluster_timeout_secs={limit:g}, though all workers had answered: one of "
        f"{', '.join(spec.workers)} was lost since; start all workers again"
    )
    with deadline(seconds, words=late, code=PeerLostError.exit_code), _handlers_kept():
        try:
            return strategies.create(config, spec=spec)
        except tf.errors.OpError as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise PeerLostError(
                f"the cluster of {', '.join(spec.workers)} did not form ({first_line}); start all workers again"
            ) from error


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restores the handler of SIGTERM, which TensorFlow's server replaces by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
