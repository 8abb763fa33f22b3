"""The part of a training run that runs on the devices: its state and its jitted step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.spec import ModelSpec
from mbv2_jax.tasks.task import Batch, Task
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import optimizer as optimizer_lib
from mbv2_jax.training import state as state_lib
from mbv2_jax.training import step as step_lib
from mbv2_jax.training.config import Settings
from mbv2_jax.training.schedule import schedule
from mbv2_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run; nothing is compiled or allocated yet.

    Attributes:
      create: key -> the state of step 0.
      restart: {"params", "batch_stats"} -> the state of step 0 with these.
      state: the shapes, dtypes and shardings of such a state.
      step: (state, batch, key) -> (state, metrics): `step.train_step`, jitted; donates the state.
    """

    create: Callable[[jax.Array], TrainState]
    restart: Callable[[Any], TrainState]
    state: TrainState
    step: Any


def build(
    settings: Settings,
    spec: ModelSpec,
    task: Task,
    mesh: Mesh,
    steps_per_epoch: int,
    total_steps: int,
) -> Program:
    """Builds the program of a run.

    Args:
      settings: the config.
      spec, task: from config.resolve.
      mesh: the devices; the batch is split over them, the state is on each.
      steps_per_epoch, total_steps: the lengths on which the learning rate depends.
    """
    recipe = _recipe(settings, spec, task, mesh, steps_per_epoch, total_steps)
    everywhere = mesh_lib.replicated(mesh)
    with_ema = settings.ema.decay is not None
    create = functools.partial(
        state_lib.create,
        network=recipe.network,
        optimizer=recipe.optimizer,
        image_size=spec.preprocessing.image_size,
        with_ema=with_ema,
    )
    restart = functools.partial(
        state_lib.from_variables, optimizer=recipe.optimizer, with_ema=with_ema
    )

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> Any:
        # With the mesh as context: on CPUs a training unit (ops/conv.py) runs on each device alone.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step_lib.train_step(state, batch, key, recipe)

    return Program(
        create=jax.jit(create, out_shardings=everywhere),
        restart=jax.jit(restart, out_shardings=everywhere),
        state=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            jax.eval_shape(create, jax.random.key(settings.run.seed)),
        ),
        step=jax.jit(
            train_step,
            in_shardings=(everywhere, mesh_lib.split(mesh), everywhere),
            out_shardings=(everywhere, everywhere),
            donate_argnums=0,
        ),
    )


def _recipe(
    settings: Settings,
    spec: ModelSpec,
    task: Task,
    mesh: Mesh,
    steps_per_epoch: int,
    total_steps: int,
) -> step_lib.Recipe:
    mode = config_lib.on_devices(spec.mode, settings.run.batch_size, mesh.size)
    network = task.network(spec.backbone, mode)
    size = spec.preprocessing.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    rate = schedule(settings.schedule, settings.run.batch_size, steps_per_epoch, total_steps)
    optimizer = optimizer_lib.create(settings.optimizer, rate, params, mode.frozen_stages)
    return step_lib.Recipe(task, network, spec.preprocessing, optimizer, rate, settings.ema)
