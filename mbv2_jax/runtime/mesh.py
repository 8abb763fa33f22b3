"""The mesh of devices, and the placement of arrays on it.

A batch is split over the mesh's only axis, `data`; every device holds all parameters. Host batches
become global arrays a few steps ahead, so that a step does not wait for their transfer.
"""

import collections
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mbv2_jax.errors import UserError


def create(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices`, by default those of all processes, with the axis `data`.

    Devices are in the order of the processes, not of their wiring as jax.make_mesh has it: the rows
    of a global batch then do not depend on the number of processes that provide them. Sums over all
    devices, the only communication between them, have no order.

    Raises:
      UserError: there is no device, or some process has more of them than another.
    """
    found = _all_devices() if devices is None else devices
    found = sorted(found, key=lambda device: (device.process_index, device.id))
    counts = collections.Counter(device.process_index for device in found)
    if len(set(counts.values())) > 1:
        raise UserError(
            "every process must have as many devices as the others; by process they have "
            + ", ".join(str(counts[index]) for index in sorted(counts))
        )
    return Mesh(np.asarray(found), ("data",), axis_types=(AxisType.Auto,))


def _all_devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax: no such platform, or no plugin for it
        wanted = os.environ.get("JAX_PLATFORMS") or "any platform"
        raise UserError(
            f"jax finds no device of {wanted}: install the extra for it (pip install '.[cuda]' or "
            "'.[tpu]' in the clone of mbv2_jax), or unset JAX_PLATFORMS. "
            + " ".join(str(error).split())
        ) from None


def describe(mesh: Mesh) -> str:
    """Returns a description such as "2 processes, 8 devices (TPU v5 lite)"."""
    processes = jax.process_count()
    devices = f"{mesh.size} device{'s' if mesh.size > 1 else ''}"
    devices += f" ({mesh.devices.flat[0].device_kind})"
    return devices if processes == 1 else f"{processes} processes, {devices}"


def on_cpu() -> bool:
    """Returns whether the devices are CPUs; raises UserError where there is no device."""
    return _all_devices()[0].platform == "cpu"


def accelerator(mesh: Mesh) -> str | None:
    """Returns the number and kind of the devices, such as "8 x TPU v5 lite"; None for CPUs."""
    device = mesh.devices.flat[0]
    return None if device.platform == "cpu" else f"{mesh.size} x {device.device_kind}"


def peak_memory() -> int | None:
    """Returns the peak memory of this process's devices, in bytes: that of the fullest one.

    Returns None where the devices do not report it, as CPUs.
    """
    counts = [(device.memory_stats() or {}) for device in jax.local_devices()]
    peaks = [count["peak_bytes_in_use"] for count in counts if "peak_bytes_in_use" in count]
    return max(peaks, default=None)


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises UserError if a global batch does not divide evenly among the devices."""
    if batch_size % mesh.size:
        nearest = max(1, round(batch_size / mesh.size)) * mesh.size
        raise UserError(
            f"batch_size {batch_size} does not divide over {mesh.size} devices: "
            f"give a multiple of {mesh.size}, such as {nearest}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is split over the devices along its first axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


class Process(TypedDict):
    """The index of a process and the number of processes, as data/loader.py takes them."""

    process_index: int
    process_count: int


def process() -> Process:
    """Returns the index of this process and the number of processes."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def from_first(tree: Any) -> Any:
    """Returns process 0's numpy arrays in every process."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.broadcast_one_to_all(tree)


def prefetch(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Iterator[dict[str, Any]]:
    """Yields the host batches of every process as global arrays that are split over the mesh.

    Args:
      batches: this process's batches of numpy arrays, each (N / processes, ...).
      mesh: the mesh over which to split them.
      ahead: the number of batches that are in transfer while one is used.
    """
    sharding = split(mesh)
    queue: collections.deque[dict[str, Any]] = collections.deque()
    for batch in batches:
        queue.append(
            {
                name: jax.make_array_from_process_local_data(sharding, array)
                for name, array in batch.items()
            }
        )
        del batch  # its memory, shared with a worker, becomes free after the transfer
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue
