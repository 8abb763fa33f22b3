"""Training steps of a network of one layer."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.spec import Preprocessing
from mbv2_jax.tasks.classification.settings import Head, Settings
from mbv2_jax.tasks.classification.task import Classification
from mbv2_jax.training import state as state_lib
from mbv2_jax.training import step as step_lib
from mbv2_jax.training.settings import Ema

BATCH, SIZE, CLASSES = 8, 6, 3


class Pixels(nn.Module):
    """A linear classifier of normalised pixels or, if `blind`, of dropout's mask alone."""

    blind: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        x = images.reshape(len(images), -1)
        x = nn.BatchNorm(use_running_average=not train)(x)
        if self.blind:
            x = jnp.ones_like(x)
        return nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=not train)(x))


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
    }


@functools.cache
def build(devices: int, blind: bool, ema: Ema, mixing: tuple[float, float]) -> tuple[Any, Any]:
    """Returns the jitted step and the state of step 0."""
    network, optimizer = Pixels(blind), optax.sgd(0.1)
    recipe = step_lib.Recipe(
        task=Classification(Head(CLASSES), settings=Settings(0.1, *mixing)),
        network=network,
        preprocessing=Preprocessing(mean=(127.0,) * 3, std=(64.0,) * 3),
        optimizer=optimizer,
        learning_rate=lambda step: jnp.float32(0.1),
        ema=ema,
    )
    mesh = mesh_lib.create(jax.devices()[:devices])
    everywhere, split = mesh_lib.replicated(mesh), mesh_lib.split(mesh)
    step = jax.jit(
        functools.partial(step_lib.train_step, recipe=recipe),
        in_shardings=(everywhere, split, everywhere),
        out_shardings=everywhere,
    )
    create = functools.partial(
        state_lib.create,
        network=network,
        optimizer=optimizer,
        image_size=SIZE,
        with_ema=ema.decay is not None,
    )
    return step, jax.device_get(jax.jit(create)(jax.random.key(1)))


def run(
    batches: list[dict[str, np.ndarray]],
    *,
    devices: int = 1,
    blind: bool = False,
    start: Any = None,
    ema: Ema = Ema(),  # noqa: B008 # it is frozen
    mixing: tuple[float, float] = (0.0, 0.0),
) -> tuple[list[Any], list[float]]:
    """Returns the state before and after each step, and the losses.

    Args:
      batches: the batch of each step.
      devices: the number of devices.
      blind: see `Pixels`.
      start: the state before the first step; by default the fresh one.
      ema: the moving average; by default there is none.
      mixing: the alphas of mixup and cutmix.
    """
    step, first = build(devices, blind, ema, mixing)
    states, losses = [start or first], []
    for each in batches:
        state, metrics = step(states[-1], each, jax.random.key(0))
        states.append(jax.device_get(state))
        losses.append(float(metrics["loss"]))
    return states, losses
