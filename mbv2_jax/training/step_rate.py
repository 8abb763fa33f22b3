"""How many images per second the training step of a config takes: no waiting for input."""

import time

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mbv2_jax.data import sources
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import loop
from mbv2_jax.training import plan as plan_lib

WARM_UP = 5  # steps; the first compiles
AT_ONCE = 20  # steps between two looks at the clock: a run does not wait for each step either


def measure(config: ConfigDict, source: sources.Source, mesh: Mesh, seconds: float = 5.0) -> float:
    """Times the training step on one batch of noise, which is on the devices already.

    Args:
      config: a recipe's.
      source: its training split, of which only the number of examples and classes matters.
      mesh: the devices.
      seconds: how long, at least; compiling is not counted.

    Returns:
      Images per second.

    Raises:
      UserError: the config does not fit the data or the devices.
    """
    mesh_lib.check_batch(mesh, config.batch_size)
    config = config_lib.resolve(config, source.class_names)
    plan = plan_lib.assemble(config, source, source, mesh)
    state, step = loop.prepare(plan)
    rng = np.random.default_rng(0)
    shape = (config.batch_size, *plan.train_transform.output_size, 3)
    noise = {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, len(source.class_names), config.batch_size, np.int32),
    }
    (batch,) = mesh_lib.prefetch([noise], mesh)
    for _ in range(WARM_UP):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    start, steps = time.monotonic(), 0
    while steps == 0 or time.monotonic() - start < seconds:
        for _ in range(AT_ONCE):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        steps += AT_ONCE
    return steps * config.batch_size / (time.monotonic() - start)
