"""The training step of this package, as the benchmarks run it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks.workload import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Batch
from mbv2_jax import command_line
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import program as program_lib


def training_step(
    batch: Batch, variables: Any, dtype: str, devices: Sequence[jax.Device]
) -> Callable[[], tuple[Any, Any]]:
    """Returns a function that takes a step of mmpretrain's recipe and returns state and metrics.

    Args:
      batch: the images, which lie on the devices already.
      variables: {"params", "batch_stats"} to start from.
      dtype: the config's model.dtype.
      devices: the devices over which the batch is split.
    """
    config = command_line.load_config("mobilenet_v2_8xb32_in1k")
    config.batch_size, config.data.image_size = batch.batch, batch.image_size
    config.model.dtype = dtype
    config.model.bn_group_size = 0  # the statistics of the whole batch, as for every other way
    config.schedule.name, config.schedule.base_lr = "constant", LEARNING_RATE
    config.optimizer.momentum, config.optimizer.weight_decay = MOMENTUM, WEIGHT_DECAY
    settings = config_lib.read(config)
    spec, task = config_lib.resolve(settings, None)
    mesh = mesh_lib.create(devices)
    program = program_lib.build(settings, spec, task, mesh, 1000, 100_000)
    state, key = program.restart(variables), jax.random.key(0)
    arrays = {"image": batch.pixels(), "label": batch.labels()}
    arrays = jax.device_put(arrays, mesh_lib.split(mesh))

    def step() -> tuple[Any, Any]:
        nonlocal state
        state, metrics = program.step(state, arrays, key)
        return state, metrics

    return step
