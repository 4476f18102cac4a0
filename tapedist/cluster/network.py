"""Checks of addresses and ports, and calls into the network that may never return. Without TensorFlow.

Plain TCP, no protocol; used before a cluster forms and when a peer seems lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import psutil

from tapedist.cluster.resolve import split_address
from tapedist.errors import InputError
from tapedist.text import display

_MAX_PROBES = 64
_TPU_SECS = 5.0
_LOOKUP_EVERY_SECS = 0.5
_LISTEN_EVERY_SECS = 0.2

Result = TypeVar("Result")
# gRPC reads only the first of these that is set.
_EXEMPTIONS = ("no_grpc_proxy", "no_proxy")


def unreachable(addresses: Iterable[str], timeout_secs: float) -> list[str]:
    """Returns those of `addresses` where nothing accepts a TCP connection in time, in their order.

    A stopped process still accepts connections, because its kernel does: an address that answers may belong to a
    process that hangs.

    Args:
        addresses: `host:port` each; they are tried in parallel.
        timeout_secs: how long to try one address, above 0. Resolving a host's name is not bounded by it.

    Raises:
        InputError: if an address is not `host:port`.
    """
    addresses = list(addresses)
    targets = [split_address(address) for address in addresses]
    if not addresses:
        return []
    with ThreadPoolExecutor(min(_MAX_PROBES, len(addresses))) as pool:
        answers = list(pool.map(lambda target: _answers(target, timeout_secs), targets))
    return [address for address, answer in zip(addresses, answers, strict=True) if not answer]


def _answers(target: tuple[str, int], timeout_secs: float) -> bool:
    try:
        socket.create_connection(target, timeout=timeout_secs).close()
    except (OSError, UnicodeError):  # UnicodeError: a part of a host's name is empty or too long.
        return False
    return True


def check_tpu(address: str) -> None:
    """Raises for a TPU `grpc://host:port` where nothing listens, for which TensorFlow would wait forever.

    Raises:
        InputError: if the address is malformed, or nothing accepts a connection within seconds.
    """
    if not address.startswith("grpc://"):
        return
    target = address.removeprefix("grpc://")
    try:
        silent = call_with_timeout(_TPU_SECS + 1, lambda: unreachable([target], _TPU_SECS))
    except CallTimeoutError:  # The connection has a timeout of its own, so it is the name server that hangs.
        silent = [target]
    except InputError as error:
        raise InputError(*(f"--tpu={display(address)}: {problem}" for problem in error.problems)) from None
    if silent:
        raise InputError(
            f"--tpu={display(address)}: nothing accepts a connection there within {_TPU_SECS:g} s; must be the "
            "grpc://host:port of a running TPU; check the address, its state and the firewall, or use --tpu=local on a "
            "TPU VM"
        )


def port_in_use(address: str) -> bool:
    """Returns whether a server on this machine could not open the port of `address`.

    All interfaces count, because TensorFlow's server binds them all, whatever host the address names.

    Raises:
        InputError: if `address` is not `host:port`.
    """
    port = split_address(address)[1]
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                # As servers do, so that connections of an earlier server in TIME_WAIT do not count.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return True
            # Any other error means that this machine does not have the address family.
    return False


def check_own_port(address: str) -> None:
    """Raises if a worker's own port is taken.

    Raises:
        InputError: if the port of `address` is in use on this machine, or may not be opened.
    """
    if address and port_in_use(address):
        raise port_taken(address)


def port_taken(address: str) -> InputError:
    """The error for a worker whose own port cannot be opened."""
    return InputError(
        f"own address {address!r}: port {split_address(address)[1]} of this machine is in use or not permitted; "
        "stop the process that holds it (an earlier run, or one of the same --worker_index?), or choose another port "
        "from 1024 to 65535"
    )


def check_own_name(
    address: str,
    *,
    stopped: Callable[[], bool] = lambda: False,
    timeout_secs: float = 0.0,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Raises if a worker's own host cannot be looked up; none of the others could reach it.

    Args:
        address: its `host:port`; empty for a single process.
        stopped: ends the wait early.
        timeout_secs: how long to retry on Kubernetes, which publishes a pod's name after its start.
        environ: environment variables.

    Raises:
        InputError: if the host has no address.
    """
    end = time.monotonic() + (timeout_secs if "KUBERNETES_SERVICE_HOST" in environ else 0.0)
    while address and not stopped():
        try:
            socket.getaddrinfo(split_address(address)[0], None, type=socket.SOCK_STREAM)
            return
        except (socket.gaierror, UnicodeError) as error:
            if time.monotonic() >= end:
                reason = getattr(error, "strerror", None) or error
                raise InputError(
                    f"own address {address!r}: this machine cannot look the host up ({reason}); give a name or an IP "
                    "address by which the other workers reach it"
                ) from None
        time.sleep(_LOOKUP_EVERY_SECS)


class PortReservation:
    """Free TCP ports of this machine that stay reserved until `close`, though a server may open them.

    Each port is bound, but never listens, by a socket with `SO_REUSEADDR`: Linux then lets a server with that option
    (gRPC sets it) bind and listen, and gives the port to no process by chance. Without this, another process could take
    the port in the seconds that a worker needs to start.

    Attributes:
        ports: the reserved ports, all different.
    """

    def __init__(self, count: int):
        self._sockets = [_bound_socket() for _ in range(count)]
        self.ports = tuple(sock.getsockname()[1] for sock in self._sockets)

    def close(self) -> None:
        """Frees the ports."""
        for sock in self._sockets:
            sock.close()


def _bound_socket() -> socket.socket:
    # Both families at once where the machine has IPv6: TensorFlow's server listens on [::].
    if socket.has_dualstack_ipv6():
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind(("", 0))
    # After the bind: with the option set before it, the kernel could choose a port that another such socket holds.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def listening(port: int) -> list[str]:
    """Local addresses `host:port` on which this process listens at `port`; empty if the system does not list them."""
    try:
        sockets = psutil.Process().net_connections("tcp")
    except psutil.Error:
        return []
    hosts = {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN and each.laddr.port == port}
    return sorted(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts)


def listening_notice(rank: int, address: str) -> str:
    """The notice of where worker `rank`, configured as `address`, can be reached and by whom."""
    port = int(address.rpartition(":")[2])
    bound = listening(port)
    everywhere = not bound or any(one.startswith(("[::]:", "0.0.0.0:")) for one in bound)
    where = "open on all interfaces and unauthenticated" if everywhere else "unauthenticated"
    return (
        f"worker {rank} listens at {', '.join(bound) or f'port {port}'}: {where}; let only the other workers reach it, "
        "by a firewall or a network of its own"
    )


class CallTimeoutError(Exception):
    """The call has not returned in time; it may still be running."""


def call_with_timeout(seconds: float, call: Callable[[], Result]) -> Result:
    """Returns or raises what `call` does, if it does so in time.

    It runs in a thread of its own, so that the caller's thread can go on and, if it is the main thread, handles signals
    meanwhile. The call must release the interpreter's lock while it waits.

    Args:
        seconds: the limit.
        call: the function to call.

    Raises:
        CallTimeoutError: if the limit has passed.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True, name="tapedist-call")
    thread.start()
    while thread.is_alive() and seconds > 0:
        # In short waits: Python runs signal handlers between them, even where a signal does not end a wait.
        thread.join(min(_LISTEN_EVERY_SECS, seconds))
        seconds -= _LISTEN_EVERY_SECS
    if errors:
        raise errors[0]
    if not results:
        raise CallTimeoutError
    return results[0]


@contextlib.contextmanager
def without_proxy(workers: Sequence[str], environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """A context in which gRPC uses no proxy for `workers`, `host:port` each; only gRPC reads the variable."""
    name = _EXEMPTIONS[0]
    before = environ.get(name)
    hosts = [split_address(address)[0] for address in workers]
    known = next((environ[name] for name in _EXEMPTIONS if name in environ), "")
    environ[name] = ",".join(dict.fromkeys([*filter(None, known.split(",")), *hosts]))
    try:
        yield
    finally:
        if before is None:
            environ.pop(name, None)
        else:
            environ[name] = before
