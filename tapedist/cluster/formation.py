"""Before TensorFlow forms a cluster: wait until every worker is there, for a limited time, and agree on what all need.

TensorFlow itself waits for ever, without a word and deaf to signals, and fails late and in riddles where workers bring
other devices. So each worker first opens its own port and connects to all others. Whoever is connected to says who it
is, by a card; whoever connects answers by its own. Once all have answered, each closes its port and leaves the rest to
TensorFlow's server there, which is also what a worker that is a moment late then finds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tapedist.cluster.peers import check_own_name, port_taken
from tapedist.cluster.resolve import ClusterSpec, is_this_machine, split_address
from tapedist.errors import InputError, PeerLostError

_RETRY_SECS = 0.1
_PROBE_SECS = 2.0
_SILENCE_SECS = 0.5
_MAX_PROBES = 64
# So long the others can still hear what is wrong.
_LINGER_SECS = 1.0
_GREETING = b"tapedist "
_MAX_CARD_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class _Card:
    """Who a process takes itself for.

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
    def of_line(cls, line: bytes) -> _Card | None:
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
    own = _Card(secrets.token_hex(16), spec.index, spec.num_workers, facts or {})
    roll = _Roll(spec, own)
    end = clock() + timeout_secs
    with _Door(spec.address, own, roll):
        missing = dict.fromkeys(range(spec.num_workers), "")
        while missing.keys() - {spec.index} and not stopped():
            missing = _ask(roll, own, missing, min(_PROBE_SECS, max(0.1, end - clock())))
            if roll.problems:
                time.sleep(_LINGER_SECS)
                raise InputError(*roll.problems[:1])
            if missing.keys() - {spec.index}:
                if clock() >= end:
                    raise PeerLostError(missed(missing, spec, timeout_secs))
                time.sleep(_RETRY_SECS)
        if problems := roll.differences():
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


def _ask(roll: _Roll, own: _Card, ranks: Mapping[int, str], timeout_secs: float) -> dict[int, str]:
    """Connects to workers, side by side; those that did not answer, each with what is known of why."""

    def one(rank: int) -> tuple[int, str | None]:
        return rank, _visit(roll, own, rank, timeout_secs)

    with ThreadPoolExecutor(min(_MAX_PROBES, len(ranks))) as pool:
        return {rank: why for rank, why in pool.map(one, ranks) if why is not None}


def _visit(roll: _Roll, own: _Card, rank: int, timeout_secs: float) -> str | None:
    """Exchanges cards at the address of worker `rank`: None if it has answered."""
    host, port = split_address(roll.spec.workers[rank])
    try:
        with socket.create_connection((host, port), timeout=timeout_secs) as connection:
            # Who has come here, and left, has TensorFlow's server there by now, which says nothing. So does a stopped
            # process, for which the kernel accepts; but that one never came.
            has_come = roll.has(rank)
            connection.settimeout(_SILENCE_SECS if has_come else timeout_secs)
            stream = connection.makefile("rwb")
            try:
                card = _Card.of_line(stream.readline(_MAX_CARD_BYTES))
            except TimeoutError:
                return None if has_come or roll.has(rank) else ", where something listens that says nothing"
            if card is None:
                return None if has_come or roll.has(rank) else ", where something else listens"
            roll.found(rank, card)
            stream.write(own.line())
            stream.flush()
            stream.readline(_MAX_CARD_BYTES)  # It has been read.
            return None
    except socket.gaierror as error:
        return f", whose name cannot be looked up: {error.strerror}"
    except OSError:
        here = is_this_machine(host) and not is_this_machine(split_address(roll.spec.address)[0])
        return ", which every machine takes for itself" if here else ""


class _Roll:
    """The cards of all workers, as they come in from several threads.

    Attributes:
        spec: the cluster.
        problems: what cannot be, a sentence each.
    """

    def __init__(self, spec: ClusterSpec, own: _Card):
        self.spec = spec
        self.problems: list[str] = []
        self._own = own
        self._cards = {spec.index: own}
        self._at: dict[str, int] = {own.process: spec.index}
        self._lock = threading.Lock()

    def found(self, rank: int, card: _Card) -> None:
        """Worker `rank`'s address leads to the process of `card`."""
        with self._lock:
            if problem := self._wrong_place(rank, card):
                self.problems.append(problem)
            else:
                self._at[card.process] = rank
                self._cards[rank] = card

    def has(self, rank: int) -> bool:
        """Whether the card of `rank` has come."""
        with self._lock:
            return rank in self._cards and rank != self._own.rank

    def told(self, card: _Card) -> None:
        """A process has come, which says who it is."""
        with self._lock:
            if card.process == self._own.process:
                return
            if problem := self._wrong_worker(card):
                self.problems.append(f"a process that has come {problem}")
            elif card.rank == self._own.rank:
                self.problems.append(
                    f"another process, which has come, is rank {card.rank} as well; give every process its own "
                    "--worker_index (or task index in TF_CONFIG)"
                )
            else:
                self._cards.setdefault(card.rank, card)

    def _wrong_place(self, rank: int, card: _Card) -> str:
        workers, own = self.spec.workers, self._own
        same = self._at.get(card.process, rank)
        if same != rank:
            who = "this process itself" if card.process == own.process else "one process"
            return (
                f"addresses {workers[same]!r} (rank {same}) and {workers[rank]!r} (rank {rank}) lead to {who}; give "
                "every process its own host:port, and its own --worker_index"
            )
        if rank == own.rank:
            if card.process == own.process:
                return ""
            return (
                f"own address {workers[rank]!r} (rank {rank}) leads to another process, which takes itself for rank "
                f"{card.rank}; give every process its own --worker_index, and the address of the machine it runs on"
            )
        if problem := self._wrong_worker(card):
            return f"the process at {workers[rank]!r} (rank {rank}) {problem}"
        if card.rank != rank:
            return (
                f"the process at {workers[rank]!r} takes itself for rank {card.rank}, but is rank {rank} here; give "
                "all processes the same list of workers, and every one its own --worker_index"
            )
        return ""

    def _wrong_worker(self, card: _Card) -> str:
        if card.num_workers == self._own.num_workers:
            return ""
        return (
            f"knows of {card.num_workers} workers, but here are {self._own.num_workers}; give all processes the same "
            "list of workers"
        )

    def differences(self) -> list[str]:
        """Facts that are not those of rank 0, as far as cards have come."""
        chief = self._cards.get(0, self._own)
        return [
            f"rank {rank} ({self.spec.workers[rank]}): {key} is {json.dumps(card.facts.get(key))}, but "
            f"{json.dumps(chief.facts.get(key))} on rank {chief.rank} ({self.spec.workers[chief.rank]}); give all "
            "workers as many devices of one kind (CUDA_VISIBLE_DEVICES, --num_virtual_devices) and one --collective"
            for rank, card in sorted(self._cards.items())
            for key in sorted(chief.facts.keys() | card.facts.keys())
            if card.facts.get(key) != chief.facts.get(key)
        ]


class _Door:
    """Accepts connections on this worker's port and says to each who it is.

    Raises:
        InputError: if the port is not free, when entered.
    """

    def __init__(self, address: str, own: _Card, roll: _Roll):
        self._address, self._own, self._roll = address, own, roll
        self._closing = False

    def __enter__(self) -> _Door:
        dual = socket.has_dualstack_ipv6()
        self._server = socket.socket(socket.AF_INET6 if dual else socket.AF_INET, socket.SOCK_STREAM)
        try:
            if dual:
                self._server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._server.bind(("", split_address(self._address)[1]))
            self._server.listen(128)
        except OSError:
            self._server.close()
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
            card = _Card.of_line(stream.readline(_MAX_CARD_BYTES))
            if card:
                self._roll.told(card)
                stream.write(b"heard\n")
                stream.flush()
