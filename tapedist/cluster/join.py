"""Joining a cluster: wait for the workers, make the strategy, watch over the peers."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import tensorflow as tf

from tapedist.cluster import strategies
from tapedist.cluster.deadline import deadline
from tapedist.cluster.formation import await_peers
from tapedist.cluster.ports import exposure
from tapedist.cluster.proxies import without_proxy
from tapedist.cluster.resolve import ClusterSpec
from tapedist.cluster.strategies import Choice
from tapedist.cluster.team import Solo, Team
from tapedist.cluster.watchdog import Watchdog
from tapedist.config import TrainConfig
from tapedist.errors import Interrupted, PeerLostError

# What TensorFlow may take to connect workers that are all there.
_CONNECT_SECS = 30.0


@contextlib.contextmanager
def joined(
    config: TrainConfig, spec: ClusterSpec, *, stop_signal: Callable[[], int | None], quiet: bool
) -> Iterator[tuple[tf.distribute.Strategy, Choice, Team | Solo]]:
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
        yield *strategies.create(config, spec=spec), Solo()
        return
    with without_proxy(spec.workers):
        strategy, choice = _form(config, spec, stop_signal)
        if not quiet:
            print(f"tapedist: {exposure(spec.index, spec.address)}", file=sys.stderr, flush=True)
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
