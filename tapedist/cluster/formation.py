"""Before TensorFlow forms a cluster: wait until every worker is there, for a limited time.

TensorFlow itself waits for ever, without a word and deaf to signals. So each worker first opens its own port and
connects to all others; once all have answered, each closes its port and leaves the rest to TensorFlow's server there,
which is also what a worker that is a moment late then finds.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from tapedist.cluster.peers import unreachable
from tapedist.cluster.resolve import ClusterSpec, split_address
from tapedist.errors import PeerLostError

_RETRY_SECS = 0.1
_PROBE_SECS = 2.0


def await_peers(
    spec: ClusterSpec,
    timeout_secs: float,
    *,
    stopped: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Returns once every other worker of `spec` has answered, or somebody asked to stop.

    Args:
        spec: the cluster.
        timeout_secs: how long to wait.
        stopped: asked several times a second.
        clock: monotonic seconds.

    Raises:
        PeerLostError: if some did not answer in time; they are named.
    """
    end = clock() + timeout_secs
    with _Door(spec.address):
        missing = [address for address in spec.workers if address != spec.address]
        while missing and not stopped():
            missing = unreachable(missing, min(_PROBE_SECS, max(0.1, end - clock())))
            if missing and clock() >= end:
                raise PeerLostError(missed(missing, spec, timeout_secs))
            if missing:
                time.sleep(_RETRY_SECS)


def missed(missing: list[str], spec: ClusterSpec, timeout_secs: float) -> str:
    """Who did not come, and what to do."""
    names = ", ".join(f"{address} (rank {spec.workers.index(address)})" for address in missing)
    return (
        f"no answer from {names} within --cluster_timeout_secs={timeout_secs:g}; start the missing worker, or open its "
        "port to this machine, and try again"
    )


class _Door:
    """Accepts connections on this worker's port and closes each at once."""

    def __init__(self, address: str):
        self._port = split_address(address)[1]
        self._closing = False

    def __enter__(self) -> _Door:
        dual = socket.has_dualstack_ipv6()
        self._server = socket.socket(socket.AF_INET6 if dual else socket.AF_INET, socket.SOCK_STREAM)
        if dual:
            self._server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._server.bind(("", self._port))
        self._server.listen(128)
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
                self._server.accept()[0].close()
            except OSError:
                if not self._closing:
                    time.sleep(_RETRY_SECS)  # Out of descriptors: others may free some.
