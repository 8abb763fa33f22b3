"""The parts of a training step besides the network: mixing, the average, and their randomness.

The network is a stand-in that compiles in a second; tests/parity/ has the real one.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.spec import Preprocessing
from mbv2_jax.tasks.classification.settings import Head, Settings
from mbv2_jax.tasks.classification.task import Classification
from mbv2_jax.training import state as state_lib
from mbv2_jax.training import step as step_lib
from mbv2_jax.training.settings import Ema

BATCH, SIZE, CLASSES = 8, 6, 3
MIXING = (0.2, 1.0)  # the alphas of mixup and cutmix


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


def test_average_is_torchs_called_every_third_step():
    states, _ = run([batch(seed) for seed in range(7)], ema=Ema(decay=0.75, every_steps=3))
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(0.75)

    def variables(state: Any) -> list[torch.Tensor]:
        leaves = jax.tree.leaves({"params": state.params, "batch_stats": state.batch_stats})
        return [torch.from_numpy(np.array(leaf)) for leaf in leaves]

    average = variables(states[0])
    for done, state in enumerate(states):
        if done in (3, 6):
            update(average, variables(state), done)
        for ours, theirs in zip(jax.tree.leaves(state.ema), average, strict=True):
            # float32: a lerp there, a sum of two products here, of values of order one.
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
        if done not in (0, 3, 6):  # unchanged to the bit
            jax.tree.map(np.testing.assert_array_equal, state.ema, states[done - 1].ema)


def test_mixing_on_four_devices_is_as_on_one():
    batches = [batch(seed) for seed in range(4)]
    one, losses = run(batches, devices=1, mixing=MIXING)
    four, losses_of_four = run(batches, devices=4, mixing=MIXING)
    _, without = run(batches)
    # float32 sums over the batch in another order, through four steps.
    np.testing.assert_allclose(losses_of_four, losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        four[-1].params,
        one[-1].params,
    )
    assert all(abs(mixed - plain) > 1e-3 for mixed, plain in zip(losses, without, strict=True))


def test_a_run_that_goes_on_mixes_as_the_one_that_was_not_stopped():
    batches = [batch(seed) for seed in range(4)]
    states, losses = run(batches, mixing=MIXING)
    _, rest = run(batches[2:], start=states[2], mixing=MIXING)
    assert rest == losses[2:]
    # At another step the same images are mixed differently.
    _, shifted = run(batches[2:], start=states[1], mixing=MIXING)
    assert all(abs(a - b) > 1e-3 for a, b in zip(shifted, rest, strict=True))


def test_dropout_draws_the_same_with_and_without_mixing():
    batches = [batch(seed) | {"label": np.full(BATCH, 1, np.int32)} for seed in range(3)]
    # With images of one class and a network that does not see them, only dropout's mask matters.
    _, mixed = run(batches, blind=True, mixing=MIXING)
    _, plain = run(batches, blind=True)
    # share * loss + (1 - share) * loss, in float32
    np.testing.assert_allclose(mixed, plain, rtol=1e-6)
