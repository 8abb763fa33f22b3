"""The training step of a config, compiled for a TPU slice that need not exist, and its costs.

libtpu holds the TPU's compiler, which runs on any x86-64 Linux machine: neither a TPU nor data is
touched.
"""

import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import RunFailed, UserError, first_line, nearest
from mbv2_jax.installed import require
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.spec import ModelSpec
from mbv2_jax.tasks.task import Task
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import program as program_lib
from mbv2_jax.training.config import Settings

# The number of sides of a slice, and further options for libtpu, by libtpu's names of generations.
# On Cloud TPU the two cores of a v4 chip are one device.
GENERATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "v4": (3, {"chip_config_name": "megacore"}),
    "v5e": (2, {}),
    "v5p": (3, {}),
    "v6e": (2, {}),
    "tpu7x": (3, {}),
}
FORM = (
    "names are a generation and its chips per side, such as v5e:2x4, v5e:16x16, v6e:4x4, v5p:2x2x2"
)

# Without these libtpu looks for the TPU of the machine it runs on, and only one process may use it.
# The type only silences a warning: the topology's name decides.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# Instructions of optimised HLO by which devices exchange data. The second half of an asynchronous
# one, -done, is not another exchange.
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|(?:ragged-)?all-to-all|collective-permute"
    r"|collective-broadcast)(?:-start)?\("
)

# For the schedule of the learning rate, which depends on the data; they do not change the cost.
_STEPS_PER_EPOCH, _EPOCHS = 1000, 100


def compile_for(
    config: ConfigDict, topology: str | None, options: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], jax.stages.Compiled]:
    """Compiles the training step of a config for a TPU slice.

    Args:
      config: the config of a recipe; its data is not opened.
      topology: the slice's name, such as "v5e:2x4"; the slice itself is not needed.
      options: XLA's options for this compilation.

    Returns:
      The compiled program, and a report of it:
      topology: its name. devices: their number. global_batch, per_device_batch: examples per step.
      hbm_bytes: the peak memory of a device, parameters and batch included.
      flops: floating-point operations of a step on one device.
      bytes_per_image: the bytes that the program of one device reads and writes, divided by
        per_device_batch: XLA's "bytes accessed", which counts the operands and results of every
        instruction in any memory, and copies between HBM and the chip's own memory
        (docs/tpu_step.md).
      all_reduces: exchanges of any kind between the devices, all-gather and others included.
      compile_seconds: how long compiling took, tracing included.

    Raises:
      UserError: libtpu is missing, there is no such topology, the batch does not divide over it, or
        the config leaves the head to the data. RunFailed: the step does not fit the memory.
    """
    settings = config_lib.read(config)
    _resolve(settings)  # a config that leaves the head open is refused without libtpu, too
    mesh = topology_mesh(topology)
    start = time.monotonic()
    compiled = compile_step(settings, mesh, options)
    seconds = time.monotonic() - start
    return report(compiled, topology, mesh, settings.run.batch_size, seconds), compiled


def report(
    compiled: jax.stages.Compiled, topology: str | None, mesh: Mesh, batch_size: int, seconds: float
) -> dict[str, Any]:
    """Returns the report of `compile_for` on a compiled program."""
    per_device = batch_size // mesh.size
    cost: Any = compiled.cost_analysis()
    return {
        "topology": topology,
        "devices": mesh.size,
        "global_batch": batch_size,
        "per_device_batch": per_device,
        "hbm_bytes": _memory(compiled.memory_analysis()),
        "flops": int(cost["flops"]),
        "bytes_per_image": round(cost["bytes accessed"] / per_device),
        "all_reduces": exchanges(compiled),
        "compile_seconds": round(seconds, 1),
    }


def exchanges(compiled: jax.stages.Compiled) -> int:
    """Returns the number of collective operations of any kind in a compiled program."""
    return len(_COLLECTIVE.findall(compiled.as_text() or ""))


def topology_mesh(name: str | None) -> Mesh:
    """Returns the mesh of a TPU slice by its name, such as "v5e:2x4"; its devices are descriptions.

    Raises:
      UserError: there is no such topology, or libtpu is missing.
    """
    if not name:
        raise UserError(f"--mode=compile needs --topology=NAME: {FORM}")
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match:
        raise UserError(f"--topology={name}: {FORM}")
    generation, chips = match.group(1), match.group(2).split("x")
    if generation not in GENERATIONS:
        raise UserError(
            f"--topology={name}: no TPU {generation!r}; {nearest(generation, GENERATIONS)}"
        )
    axes, options = GENERATIONS[generation]
    if len(chips) != axes:
        raise UserError(f"--topology={name}: a slice of {generation} has {axes} sides; {FORM}")
    require("compiling for a TPU (on x86-64 Linux, without a TPU)", "libtpu", extra="tpu")
    jax.config.update("jax_platforms", "cpu")  # do not occupy a TPU of this machine
    os.environ.update(ENVIRONMENT)
    if set(chips) == {"1"}:  # a host of one chip; by default libtpu assumes four
        options = options | {"chips_per_host_bounds": (1, 1, 1)}
    try:
        description = topologies.get_topology_desc(name, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={name}: libtpu refuses it ({first_line(error)}); {FORM}"
        ) from None
    return mesh_lib.create(description.devices)


def compile_step(
    settings: Settings, mesh: Mesh, options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compiles the training step of a config for the devices of `mesh`.

    Args:
      settings: the config; its data is not opened.
      mesh: real devices, or descriptions of devices.
      options: XLA's options for this compilation.

    Raises:
      UserError: the batch does not divide, or the config leaves the head to the data. RunFailed:
        the step does not fit the devices' memory.
    """
    batch_size = settings.run.batch_size
    mesh_lib.check_batch(mesh, batch_size)
    spec, task = _resolve(settings)
    steps = _STEPS_PER_EPOCH
    program = program_lib.build(settings, spec, task, mesh, steps, steps * _EPOCHS)
    transform = pipeline.make_transform(
        settings.data.train_transforms, spec.preprocessing.image_size
    )
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        for name, (shape, dtype) in task.batch_spec(transform.output_size).items()
    }
    lowered = program.step.lower(program.state, batch, jax.eval_shape(jax.random.key, 0))
    try:
        return lowered.compile(dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunFailed(out_of_memory(str(error), batch_size // mesh.size)) from None


def _resolve(settings: Settings) -> tuple[ModelSpec, Task]:
    """Resolves a config without its data; raises UserError if it leaves the head to the data."""
    spec, task = config_lib.resolve(settings, None)
    if task.head is None:
        raise UserError(task.open_head)
    config_lib.check_statistics(spec.mode)
    return spec, task


def _memory(analysis: Any) -> int:
    """Returns the most bytes of HBM in use: arguments, results (donated ones once), temporaries."""
    sizes = (
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        -analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.generated_code_size_in_bytes,
    )
    return int(math.fsum(sizes))


def out_of_memory(message: str, per_device: int) -> str:
    """Returns a message for the user from a compiler's error about a device's memory."""
    # The error names the size that is needed before the size of the memory.
    sizes = re.findall(r"\b\d[\d.]*[KMGT]\b", message)
    if len(sizes) >= 2:
        fault = (
            f"{per_device} images per device need {sizes[0]} of HBM, and a device has {sizes[1]}"
        )
    else:
        fault = f"{per_device} images per device: {message.splitlines()[0]}"
    return (
        f"the training step does not fit: {fault}. Give a smaller batch_size, more devices, or "
        "--config.model.remat=true"
    )
