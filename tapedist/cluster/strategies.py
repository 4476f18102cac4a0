"""Makes the `tf.distribute.Strategy` of a run: one in a process, before any other TensorFlow operation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tapedist.cluster.network import CallTimeoutError, call_with_timeout, check_tpu
from tapedist.cluster.resolve import ONE_PROCESS, ClusterSpec
from tapedist.config import TrainConfig
from tapedist.errors import InputError, PeerLostError, TapedistError
from tapedist.text import display


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen strategy and the reason.

    Attributes:
        name: "default", "mirrored", "multiworker" or "tpu".
        reason: a clause for the log.
    """

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of one process; each has a replica.

    Attributes:
        kind: "GPU" or "CPU".
        count: how many.
    """

    kind: str
    count: int

    def __str__(self) -> str:
        return f"{self.count} {self.kind}{'s' if self.count > 1 else ''}"


def worker_devices(config: TrainConfig) -> Devices:
    """The devices of a worker: the logical CPUs of `--num_virtual_devices`, else its GPUs, else its CPU."""
    if config.num_virtual_devices:
        return Devices("CPU", config.num_virtual_devices)
    num_gpus = len(tf.config.list_physical_devices("GPU"))
    return Devices("GPU", num_gpus) if num_gpus else Devices("CPU", 1)


def shared_facts(config: TrainConfig) -> dict[str, Any]:
    """Facts by name that must be equal on all workers for their collectives to work.

    Raises:
        InputError: if `--collective` does not fit this worker's devices.
    """
    devices = worker_devices(config)
    return {
        "device_kind": devices.kind,
        "devices": devices.count,
        "collective": _communication(config.collective, devices).value.lower(),
    }


def choose(config: TrainConfig, *, num_workers: int, num_gpus: int, environ: Mapping[str, str] = os.environ) -> Choice:
    """Resolves `--strategy`; `auto` depends on the devices found, in a fixed order."""
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
        look: whether to check the result, which starts TensorFlow.

    Raises:
        InputError: if TensorFlow has already started with another number of devices.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    # A RuntimeError means that TensorFlow has started, which is fine if it has as many devices already.
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
        config: its `strategy`, `num_virtual_devices`, `collective` and `tpu`.
        spec: the cluster; all its workers must be there, because TensorFlow waits for them.

    Raises:
        InputError: if the devices it needs are not here.
        PeerLostError: if a TPU's server accepts connections, but does not answer in time.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:
            break  # Started already, with the setting of the program that did so.
    choice = choose(config, num_workers=spec.num_workers, num_gpus=len(gpus))
    # Without a look for several workers: their strategy must be made before TensorFlow starts.
    if config.num_virtual_devices > 0 and choice.name != "tpu":
        split_cpu(config.num_virtual_devices, look=choice.name != "multiworker")
    strategy = {
        "default": tf.distribute.get_strategy,
        "mirrored": lambda: _mirrored(config, len(gpus)),
        "multiworker": lambda: _multiworker(spec, worker_devices(config), collective=config.collective),
        "tpu": lambda: _tpu(config.tpu, config.cluster_timeout_secs),
    }[choice.name]()
    return strategy, choice


def _mirrored(config: TrainConfig, num_gpus: int) -> tf.distribute.Strategy:
    if config.num_virtual_devices:
        _communication(config.collective, Devices("CPU", config.num_virtual_devices))
        return _mirrored_on(tuple(f"CPU:{i}" for i in range(config.num_virtual_devices)))
    if not num_gpus:
        raise InputError(
            "--strategy=mirrored: needs a GPU, and TensorFlow sees none; use --num_virtual_devices=N to mirror on "
            "logical CPUs, or install the GPU libraries with pip install 'tapedist[gpu]'"
        )
    return _mirrored_on((), without_nccl=config.collective == "ring")


@functools.cache
def _mirrored_on(devices: tuple[str, ...], *, without_nccl: bool = False) -> tf.distribute.Strategy:
    """One strategy for all runs of a process: a second one would number its collectives from the start again, and
    TensorFlow identifies collectives by their numbers, which fails where shapes differ."""
    # On GPUs TensorFlow uses NCCL unless it gets other operations.
    other_way = tf.distribute.ReductionToOneDevice() if without_nccl else None
    return tf.distribute.MirroredStrategy(devices or None, cross_device_ops=other_way)


def _multiworker(spec: ClusterSpec, devices: Devices, *, collective: str) -> tf.distribute.Strategy:
    options = tf.distribute.experimental.CommunicationOptions(implementation=_communication(collective, devices))
    with _all_cpus(devices.count) if devices.kind == "CPU" and devices.count > 1 else contextlib.nullcontext():
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver(spec, devices), options)
        except RuntimeError as error:
            raise InputError(
                f"--strategy=multiworker: TensorFlow has already started in this process ({error}); train in a new one"
            ) from None
    check_replicas(spec, devices, strategy.num_replicas_in_sync, strategy.extended.worker_devices)
    # All workers take equally many elements of fixed shapes. Otherwise TensorFlow adds an all-reduce for each element,
    # to find out whether any worker has one left, and makes the first dimension unknown, which XLA needs.
    strategy.extended.experimental_enable_get_next_as_optional = False
    return strategy


def _communication(collective: str, devices: Devices) -> tf.distribute.experimental.CommunicationImplementation:
    """The implementation of collectives on such devices; TensorFlow's own AUTO never chooses NCCL."""
    kinds = tf.distribute.experimental.CommunicationImplementation
    if collective == "nccl" and devices.kind != "GPU":
        raise InputError(
            "--collective=nccl: needs GPUs, and this process computes on its CPU; use --collective=auto or ring"
        )
    return kinds.NCCL if devices.kind == "GPU" and collective != "ring" else kinds.RING


def resolver(spec: ClusterSpec, devices: Devices) -> tf.distribute.cluster_resolver.SimpleClusterResolver:
    """The cluster as a resolver of TensorFlow, which counts GPUs by itself only for a cluster of TF_CONFIG."""
    jobs = {"worker": list(spec.workers)} if spec.num_workers > 1 else {}
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(jobs),
        task_type="worker",
        task_id=spec.index,
        rpc_layer="grpc",
        num_accelerators={"GPU": devices.count if devices.kind == "GPU" else 0},
    )


def check_replicas(spec: ClusterSpec, devices: Devices, num_replicas: int, found: Sequence[str]) -> None:
    """Raises if TensorFlow made replicas on other devices than requested.

    Args:
        spec: the cluster.
        devices: of each of its workers.
        num_replicas: of all workers, as TensorFlow made them.
        found: the devices of this worker's replicas.

    Raises:
        InputError: if they differ.
    """
    kinds = {tf.DeviceSpec.from_string(name).device_type for name in found}
    if num_replicas == spec.num_workers * devices.count and kinds == {devices.kind}:
        return
    raise InputError(
        f"--strategy=multiworker: {spec.num_workers} worker(s) with {devices} each were to make "
        f"{spec.num_workers * devices.count} {devices.kind} replicas, but this TensorFlow made {num_replicas} on "
        f"{', '.join(found)}; "
        + (
            "set CUDA_VISIBLE_DEVICES=-1 to train on CPUs"
            if devices.kind == "GPU"
            else "use more workers with --num_virtual_devices=0"
        )
    )


@contextlib.contextmanager
def _all_cpus(count: int) -> Iterator[None]:
    """Makes a worker's strategy use all its logical CPUs: TensorFlow uses all GPUs, but only the first CPU."""
    # By a private method of TensorFlow, as there is no public way; `check_replicas` notices if it has no effect.
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
        # TensorFlow waits forever for a server that accepts and sends nothing, and does not handle signals meanwhile.
        return tf.distribute.TPUStrategy(call_with_timeout(timeout_secs, connect))
    except CallTimeoutError:
        raise PeerLostError(
            f"--tpu={display(address)}: accepts connections, but gave no answer within --cluster_timeout_secs="
            f"{timeout_secs:g}; check that a TensorFlow server of a TPU runs there, and try again"
        ) from None
    except (ValueError, tf.errors.OpError, RuntimeError, OSError, ImportError) as error:  # OSError: no network.
        if isinstance(error, TapedistError):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--tpu={display(address)}: cannot be reached ({first_line}); check the name and the zone"
        ) from error
