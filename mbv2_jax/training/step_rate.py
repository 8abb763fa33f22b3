"""The rate of the training step alone, without input."""

import time

import jax
import numpy as np
from jax.sharding import Mesh

from mbv2_jax.data.sources import Source
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import program as program_lib
from mbv2_jax.training.config import Settings

WARM_UP = 5  # steps; the first compiles
AT_ONCE = 20  # steps between two readings of the clock: a run does not wait for each step either


def measure(settings: Settings, source: Source, mesh: Mesh, seconds: float = 5.0) -> float:
    """Measures the rate of the training step on one batch that is already on the devices.

    Args:
      settings: the config.
      source: its training split, of which only the number of examples and the classes matter.
      mesh: the devices.
      seconds: the shortest time to measure, not counting compilation.

    Returns:
      Images per second.

    Raises:
      UserError: the config does not fit the data or the devices.
    """
    batch_size = settings.run.batch_size
    mesh_lib.check_batch(mesh, batch_size)
    spec, task = config_lib.resolve(settings, source)
    config_lib.check_statistics(spec.mode)
    program = program_lib.build(settings, spec, task, mesh, len(source), len(source))
    size = spec.preprocessing.image_size
    transform = pipeline.make_transform(settings.data.train_transforms, size)
    arrays = {
        name: np.zeros((batch_size, *shape), dtype)
        for name, (shape, dtype) in task.batch_spec(transform.output_size).items()
    }
    # Noise: zeros would cost a device less power, and so less time.
    arrays["image"] = np.random.default_rng(0).integers(0, 256, arrays["image"].shape, np.uint8)
    (batch,) = mesh_lib.prefetch([arrays], mesh)
    key = jax.random.key(settings.run.seed)
    state = program.create(key)
    for _ in range(WARM_UP):
        state, metrics = program.step(state, batch, key)
    jax.block_until_ready(metrics)
    start, steps = time.monotonic(), 0
    while steps == 0 or time.monotonic() - start < seconds:
        for _ in range(AT_ONCE):
            state, metrics = program.step(state, batch, key)
        jax.block_until_ready(metrics)
        steps += AT_ONCE
    return steps * batch_size / (time.monotonic() - start)
