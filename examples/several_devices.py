"""One digest on one device and on four: `python examples/several_devices.py`."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import tapedist


def trained(devices: int) -> str:
    """The digest of the tutorial's rows in mini-batches, on so many logical CPU devices."""
    config = tapedist.TrainConfig(mode="mini_batch", num_epochs=100, learning_rate=0.01, num_virtual_devices=devices)
    return tapedist.train(config).digest


if __name__ == "__main__":
    # TensorFlow splits the CPU into logical devices once in a process, so each run has a process of its own; and a new
    # one, because TensorFlow does not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        one, four = pool.map(trained, [1, 4])
    print(f"1 device:  {one}")
    print(f"4 devices: {four}")
    print("the same bits" if one == four else "different bits")
