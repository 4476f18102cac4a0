"""From a name to a `tf.distribute.Strategy`. Exactly one is made per process, before any other TensorFlow operation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import os
from collections.abc import Iterator, Mapping
from typing import Any

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

from tapedist.cluster.patience import TooLateError, within
from tapedist.cluster.peers import check_tpu
from tapedist.cluster.resolve import ONE_PROCESS, ClusterSpec
from tapedist.config import TrainConfig
from tapedist.errors import InputError, PeerLostError, TapedistError
from tapedist.text_values import shown


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which strategy, and why.

    Attributes:
        name: "default", "mirrored", "multiworker" or "tpu".
        reason: a clause for the log.
    """

    name: str
    reason: str


def choose(config: TrainConfig, *, num_workers: int, num_gpus: int, environ: Mapping[str, str] = os.environ) -> Choice:
    """What `--strategy` means here; `auto` goes by what is found, in a fixed order."""
    if config.strategy != "auto":
        return Choice(config.strategy, "asked for")
    if num_workers > 1:
        return Choice("multiworker", f"the cluster has {num_workers} workers")
    if config.num_virtual_devices > 1:
        return Choice("mirrored", f"--num_virtual_devices={config.num_virtual_devices}")
    if "TPU_NAME" in environ or glob.glob("/dev/accel*"):
        return Choice("tpu", "a TPU is attached")
    if num_gpus > 1:
        return Choice("mirrored", f"{num_gpus} GPUs are visible")
    return Choice("default", "one GPU is visible" if num_gpus else "no GPU, one CPU device")


def split_cpu(num_devices: int, *, look: bool = True) -> None:
    """Splits the CPU into logical devices, once per process.

    Args:
        num_devices: how many.
        look: whether to see that it worked, which starts TensorFlow.

    Raises:
        InputError: if TensorFlow has already started with another number of devices.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    # A RuntimeError says that TensorFlow has started; all is well if it has what we need.
    with contextlib.suppress(RuntimeError):
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * num_devices)
    found = len(tf.config.list_logical_devices("CPU")) if look else num_devices
    if found != num_devices:
        raise InputError(
            f"--num_virtual_devices={num_devices}: TensorFlow has already started in this process with {found}; "
            "set it before the first TensorFlow operation, or train in a new process"
        )


def create(config: TrainConfig, *, spec: ClusterSpec = ONE_PROCESS) -> tuple[tf.distribute.Strategy, Choice]:
    """Sets the devices up and makes the strategy.

    Args:
        config: its `strategy`, `num_virtual_devices`, `tpu` and `virtual_shards`.
        spec: the cluster; all its workers must be there, because TensorFlow waits for them.

    Raises:
        InputError: if the devices it needs are not here, or are more than there are shards.
        PeerLostError: if a TPU's server accepts connections, but does not answer in time.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:
            break  # Started already: the program that did so has decided.
    choice = choose(config, num_workers=spec.num_workers, num_gpus=len(gpus))
    if config.num_virtual_devices > 0 and choice.name != "tpu":
        split_cpu(config.num_virtual_devices, look=choice.name != "multiworker")
    strategy = {
        "default": tf.distribute.get_strategy,
        "mirrored": lambda: _mirrored(config, len(gpus)),
        "multiworker": lambda: _multiworker(spec, num_gpus=len(gpus), num_cpus=config.num_virtual_devices),
        "tpu": lambda: _tpu(config.tpu, config.cluster_timeout_secs),
    }[choice.name]()
    replicas = strategy.num_replicas_in_sync
    if replicas > config.virtual_shards:
        raise InputError(
            f"--virtual_shards={config.virtual_shards}: must be at least the {replicas} replicas found; "
            f"use --virtual_shards={replicas} (this changes the digest) or fewer devices"
        )
    return strategy, choice


def _mirrored(config: TrainConfig, num_gpus: int) -> tf.distribute.Strategy:
    if config.num_virtual_devices:
        return _mirrored_on(tuple(f"CPU:{i}" for i in range(config.num_virtual_devices)))
    if not num_gpus:
        raise InputError(
            "--strategy=mirrored: needs a GPU, and TensorFlow sees none; use --num_virtual_devices=N to mirror on "
            "logical CPUs, or install the GPU libraries with pip install 'tapedist[gpu]'"
        )
    return _mirrored_on(())


@functools.cache
def _mirrored_on(devices: tuple[str, ...]) -> tf.distribute.Strategy:
    """One strategy for all runs of a process: a second one would number its collectives from the start again, and
    TensorFlow takes equal numbers for one collective, which fails where shapes differ."""
    return tf.distribute.MirroredStrategy(devices or None)


def _multiworker(spec: ClusterSpec, *, num_gpus: int, num_cpus: int) -> tf.distribute.Strategy:
    jobs = {"worker": list(spec.workers)} if spec.num_workers > 1 else {}
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(jobs), task_type="worker", task_id=spec.index, rpc_layer="grpc"
    )
    kinds = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(implementation=kinds.AUTO if num_gpus else kinds.RING)
    with _all_cpus(num_cpus) if num_cpus > 1 and not num_gpus else contextlib.nullcontext():
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
        except RuntimeError as error:
            raise InputError(
                f"--strategy=multiworker: TensorFlow has already started in this process ({error}); train in a new one"
            ) from None
    wanted = spec.num_workers * max(1, num_gpus or num_cpus)
    if strategy.num_replicas_in_sync != wanted:
        raise InputError(
            f"--num_virtual_devices={num_cpus}: this TensorFlow uses {strategy.num_replicas_in_sync} devices of "
            f"{spec.num_workers} workers, not {wanted}; use more workers with one device each"
        )
    return strategy


@contextlib.contextmanager
def _all_cpus(count: int) -> Iterator[None]:
    """Lets a worker compute on all its logical CPUs: TensorFlow takes all GPUs, but the first CPU only."""
    from tensorflow.python.distribute import collective_all_reduce_strategy as module

    def devices(extended: Any, resolver: Any, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:CPU:{i}" for i in range(count)), "CPU"

    name, owner = "_initialize_local_devices", module.CollectiveAllReduceExtended
    before = getattr(owner, name)
    setattr(owner, name, devices)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _tpu(address: str, timeout_secs: float) -> tf.distribute.Strategy:
    """The documented pattern: resolve, connect, initialise."""
    local = address in ("", "local")
    if local and "TPU_NAME" not in os.environ and not glob.glob("/dev/accel*"):
        raise InputError(
            f"--strategy=tpu: no TPU is attached to this machine (--tpu={address}); run on a TPU VM with "
            "pip install 'tapedist[tpu]', or choose another --strategy"
        )

    def connect() -> tf.distribute.cluster_resolver.TPUClusterResolver:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=address)
        if not local:
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return resolver

    try:
        if local:
            return tf.distribute.TPUStrategy(connect())
        check_tpu(address)
        # TensorFlow waits for ever for a server that accepts and says nothing, and deaf to signals.
        return tf.distribute.TPUStrategy(within(timeout_secs, connect))
    except TooLateError:
        raise PeerLostError(
            f"--tpu={shown(address)}: accepts connections, but gave no answer within --cluster_timeout_secs="
            f"{timeout_secs:g}; check that a TensorFlow server of a TPU runs there, and try again"
        ) from None
    except (ValueError, tf.errors.OpError, RuntimeError, OSError, ImportError) as error:  # OSError: no network.
        if isinstance(error, TapedistError):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--tpu={shown(address)}: cannot be reached ({first_line}); check the name and the zone"
        ) from error
