"""A config's training on given devices: its state and its jitted step; no data."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.training import optimizer as optimizer_lib
from mbv2_jax.training import state as state_lib
from mbv2_jax.training import step as step_lib
from mbv2_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs on the devices; nothing of it is compiled or allocated yet.

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
    config: ConfigDict, model: MobileNetV2, mesh: Mesh, steps_per_epoch: int, total_steps: int
) -> Program:
    """Makes the program of a resolved config.

    Args:
      config: from config.resolve.
      model: the network, from config.model.
      mesh: the devices; the batch is split over them, the state is on each.
      steps_per_epoch, total_steps: what the learning rate is a function of.
    """
    everywhere = mesh_lib.replicated(mesh)
    key = jax.random.key(config.seed)
    image = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, 3), np.float32)
    params = jax.eval_shape(model.init, key, image)["params"]
    rate = optimizer_lib.schedule(config, steps_per_epoch, total_steps)
    optimizer = optimizer_lib.create(config, rate, params)
    with_ema = config.ema.decay is not None
    create = functools.partial(
        state_lib.create,
        model=model,
        optimizer=optimizer,
        image_size=config.data.image_size,
        with_ema=with_ema,
    )
    step = functools.partial(
        step_lib.train_step,
        model=model,
        optimizer=optimizer,
        learning_rate=rate,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        label_smoothing=config.label_smoothing,
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        ema_decay=config.ema.decay,
        ema_every_steps=config.ema.every_steps,
    )

    def train_step(state: TrainState, batch: step_lib.Batch, key: jax.Array) -> Any:
        # In context: on CPUs a training unit (ops/conv.py) runs on each device by itself.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, batch, key)

    return Program(
        create=jax.jit(create, out_shardings=everywhere),
        restart=jax.jit(
            functools.partial(state_lib.from_variables, optimizer=optimizer, with_ema=with_ema),
            out_shardings=everywhere,
        ),
        state=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            jax.eval_shape(create, key),
        ),
        step=jax.jit(
            train_step,
            in_shardings=(everywhere, mesh_lib.split(mesh), everywhere),
            out_shardings=(everywhere, everywhere),
            donate_argnums=0,
        ),
    )
