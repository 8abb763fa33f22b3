"""Devices and processes: the only file that knows them.

A batch is split over the mesh's one axis, `data`; parameters are on every device. Host arrays
become global ones here, a few steps ahead, so that a step does not wait for its transfer.
"""

import collections
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mbv2_jax.errors import UserError


def create(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices`, by default all of all processes, with the axis `data`.

    They are in the order of the processes, and not, as jax.make_mesh has it, of how they are wired:
    so the rows of a global batch do not depend on how many processes bring them, and what goes
    over the wires, sums over all devices, has no order.

    Raises:
      UserError: no device is found, or some process has more of them than another.
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
            f"jax finds no device of {wanted}: install the extra for it (pip install "
            f"'mbv2_jax[cuda]' or '[tpu]'), or unset JAX_PLATFORMS. {' '.join(str(error).split())}"
        ) from None


def describe(mesh: Mesh) -> str:
    """Returns such as "2 processes, 8 devices (TPU v5 lite)"."""
    processes = jax.process_count()
    devices = f"{mesh.size} device{'s' if mesh.size > 1 else ''}"
    devices += f" ({mesh.devices.flat[0].device_kind})"
    return devices if processes == 1 else f"{processes} processes, {devices}"


def on_cpu() -> bool:
    """Whether the devices are CPUs; raises UserError if there are none at all."""
    return _all_devices()[0].platform == "cpu"


def accelerator(mesh: Mesh) -> str | None:
    """Returns what the mesh is made of, such as "8 x TPU v5 lite"; None: of CPUs."""
    device = mesh.devices.flat[0]
    return None if device.platform == "cpu" else f"{mesh.size} x {device.device_kind}"


def peak_memory() -> int | None:
    """Returns the most bytes in use at once, so far, on that of this process's devices with most.

    None where the devices don't count them, as CPUs.
    """
    counts = [(device.memory_stats() or {}) for device in jax.local_devices()]
    peaks = [count["peak_bytes_in_use"] for count in counts if "peak_bytes_in_use" in count]
    return max(peaks, default=None)


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises UserError if a global batch does not divide evenly over the devices."""
    if batch_size % mesh.size:
        nearest = max(1, round(batch_size / mesh.size)) * mesh.size
        raise UserError(
            f"batch_size {batch_size} does not divide over {mesh.size} devices: "
            f"give a multiple of {mesh.size}, such as {nearest}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Sharding of what is split over devices along its first axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


class Process(TypedDict):
    """A process's place among all, as data/loader.py takes it."""

    process_index: int
    process_count: int


def process() -> Process:
    """Returns this process's place among all, as data/loader.py takes it."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def prefetch(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Iterator[dict[str, Any]]:
    """Yields each process's host batches as global arrays split over the mesh.

    Args:
      batches: host batches, (N / processes, ...) each.
      mesh: where they go.
      ahead: how many are in transfer while one is used.
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
        del batch  # its memory, shared with a worker, is free when it is transferred
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue
