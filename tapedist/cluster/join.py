"""Joining a cluster: wait for the workers, agree on what all need, make the strategy, watch over the peers.

TensorFlow itself waits for ever, without a word and deaf to signals, and fails late and with obscure messages where
workers bring different devices. So each worker first opens its own port and connects to all others. The accepting side
sends who it is, then the connecting one does (`_Info`). Once all have answered, each closes its port and leaves the
rest to TensorFlow's server there, which is also what a worker that is a moment late then finds.
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
# So long the others can still hear what is wrong.
_LINGER_SECS = 1.0
_GREETING = b"tapedist "
_MAX_INFO_BYTES = 2**20
# What TensorFlow may take to connect workers that are all there.
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
    if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        yield
        return
    libc = ctypes.CDLL(None)
    text = ctypes.create_string_buffer(f"error: {words}".replace("%", "%%").encode())
    with contextlib.suppress(ValueError):  # warnx begins with the program's name; only glibc lets us say it.
        ctypes.c_char_p.in_dll(libc, "program_invocation_short_name").value = b"tapedist"
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
    times = _Times(0, 0, int(seconds), max(1, int(seconds % 1 * 1e9)))
    libc.timer_settime(timer, 0, ctypes.byref(times), None)
    return timer


@dataclasses.dataclass(frozen=True)
class _Info:
    """What a process sends about itself.

    Attributes:
        process: a number of its own, by which it is known again at another address.
        rank: its rank.
        num_workers: how many workers it knows of.
        facts: what must be equal on all workers.
    """

    process: str
    rank: int
    num_workers: int
    facts: Mapping[str, Any]

    def line(self) -> bytes:
        return _GREETING + json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> _Info | None:
        """None if it is none: another program, such as TensorFlow's server, says something else."""
        try:
            told = json.loads(line.removeprefix(_GREETING)) if line.startswith(_GREETING) else {}
            return cls(str(told["process"]), int(told["rank"]), int(told["num_workers"]), dict(told["facts"]))
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
    """Returns once every other worker of `spec` has answered, or somebody asked to stop.

    Args:
        spec: the cluster.
        timeout_secs: how long to wait.
        facts: by name, JSON values that must be equal on all workers.
        stopped: asked several times a second.
        clock: monotonic seconds.

    Raises:
        InputError: if this worker's address cannot be its own, two addresses lead to one process, a process takes
            itself for another worker, or facts differ; ranks and keys are named.
        PeerLostError: if some did not answer in time; they are named.
    """
    check_own_name(spec.address, stopped=stopped, timeout_secs=timeout_secs)
    own = _Info(secrets.token_hex(16), spec.index, spec.num_workers, facts or {})
    registry = _Registry(spec, own)
    end = clock() + timeout_secs
    with _Listener(spec.address, own, registry):
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
    """Who did not come, and what to do.

    Args:
        missing: rank -> what is known of why; the own rank does not count.
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
    """Connects to workers, side by side; those that did not answer, each with what is known of why."""

    def one(rank: int) -> tuple[int, str | None]:
        return rank, _visit(registry, own, rank, timeout_secs)

    with ThreadPoolExecutor(min(_MAX_PROBES, len(ranks))) as pool:
        return {rank: why for rank, why in pool.map(one, ranks) if why is not None}


def _visit(registry: _Registry, own: _Info, rank: int, timeout_secs: float) -> str | None:
    """Exchanges `_Info` at the address of worker `rank`: None if it has answered."""
    host, port = split_address(registry.spec.workers[rank])
    try:
        with socket.create_connection((host, port), timeout=timeout_secs) as connection:
            # Who has come here, and left, has TensorFlow's server there by now, which says nothing. So does a stopped
            # process, for which the kernel accepts; but that one never came.
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
            stream.readline(_MAX_INFO_BYTES)  # It has been read.
            return None
    except (socket.gaierror, UnicodeError) as error:
        return f", whose name cannot be looked up: {getattr(error, 'strerror', None) or error}"
    except ConnectionError:
        # Who has called here and closed its port by now is on its way to TensorFlow's server, which opens it again.
        return None if registry.has_called(rank) else _why(host, registry)
    except OSError:
        return _why(host, registry)


def _why(host: str, registry: _Registry) -> str:
    """What may be wrong with an address at which nobody answers; empty if nothing is known."""
    own_host = split_address(registry.spec.address)[0]
    return ", which every machine takes for itself" if is_this_machine(host) and not is_this_machine(own_host) else ""


class _Registry:
    """What is known of all workers, as it comes in from several threads.

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
        """Notes that the process at the address of worker `rank` has sent `info`."""
        with self._lock:
            if problem := self._wrong_place(rank, info):
                self.problems.append(problem)
            else:
                self._at[info.process] = rank
                self._infos[rank] = info

    def has_called(self, rank: int) -> bool:
        """Whether worker `rank` is known already."""
        with self._lock:
            return rank in self._infos and rank != self._own.rank

    def add_caller(self, info: _Info) -> None:
        """Notes that a process has connected here and sent `info`."""
        with self._lock:
            if info.process == self._own.process:
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
        """Facts that are not those of rank 0, as far as workers are known."""
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
        # Wakes the thread; closing the socket under its feet would not.
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
        with connection, contextlib.suppress(OSError):  # Others only look whether somebody is here.
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
    """A strategy over all workers of `spec`, and the team they make, watched until the block is left.

    Args:
        config: the run's settings.
        spec: the cluster; one process makes a team of its own.
        stop_signal: the signal that asked this process to stop, if one did.
        quiet: whether not to say which port is open.

    Raises:
        InputError: as `strategies.create`.
        PeerLostError: if the cluster did not form in time.
        Interrupted: if a stop was asked for meanwhile.
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
    """TensorFlow's server takes SIGTERM for itself; what handled it before does so again afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
