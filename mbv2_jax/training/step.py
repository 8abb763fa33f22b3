"""One step of training and one of evaluation: pure functions, jitted by their callers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mbv2_jax.spec import Preprocessing
from mbv2_jax.tasks.task import Batch, Task
from mbv2_jax.training import state as state_lib
from mbv2_jax.training.settings import Ema
from mbv2_jax.training.state import TrainState

# Folded into a step's key for the task's augmentation, so that dropout draws the same numbers with
# and without it.
AUGMENTATION = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The static arguments of a training step.

    Attributes:
      task: the task, with its loss and its augmentation.
      network: the linen module, in its training mode.
      preprocessing: the mean and std of pixels.
      optimizer: from training/optimizer.py.
      learning_rate: the schedule that the optimizer follows, for the log; None leaves it out.
      ema: the exponential moving average, if there is one.
    """

    task: Task
    network: nn.Module
    preprocessing: Preprocessing
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule | None = None
    ema: Ema = dataclasses.field(default_factory=Ema)


def train_step(
    state: TrainState, batch: Batch, key: jax.Array, recipe: Recipe
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Trains on one batch: augments, normalises, and updates the parameters by their gradients.

    Args:
      state: the state before; under jit it is donated.
      batch: {"image": (N, H, W, 3) uint8, and the task's targets}; N is the global batch size.
      key: the run's jax.random key; the step's own randomness is fold_in(key, state.step).
      recipe: static.

    Returns:
      The state after the step, and scalars of this batch: "loss", the task's metrics,
      "grad_norm" and "learning_rate". models/layers.py explains the batch statistics.
    """
    task, network = recipe.task, recipe.network
    dropout = jax.random.fold_in(key, state.step)
    batch = task.augment(jax.random.fold_in(dropout, AUGMENTATION), batch)
    images = recipe.preprocessing.normalize(batch["image"], network.dtype)

    def loss_of(params: Any) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs, updated = network.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout}
        )
        loss, metrics = task.loss(outputs, batch)
        return loss, (metrics, updated["batch_stats"])

    (loss, (metrics, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.ema
    if recipe.ema.decay is not None:
        new = {"params": params, "batch_stats": batch_stats}
        average = state_lib.average(average, new, state.step + 1, recipe.ema)
    metrics = metrics | {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    if recipe.learning_rate is not None:
        metrics["learning_rate"] = recipe.learning_rate(state.step)
    return TrainState(state.step + 1, params, batch_stats, opt_state, average), metrics


def eval_step(
    variables: Mapping[str, Mapping],
    batch: Batch,
    *,
    task: Task,
    network: nn.Module,
    preprocessing: Preprocessing,
    tta: bool = False,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Scores one batch.

    Args:
      variables: {"params", "batch_stats"}.
      batch: {"image": (N, H, W, 3) uint8, the task's targets, "mask": (N,) bool}; rows whose mask
        is False are padding.
      task, network, preprocessing: static.
      tta: whether the outputs of several views of each image are merged (`Task.views`).

    Returns:
      The task's sums over the batch, and "examples", their number; and its rows. See
      `Task.evaluate`.
    """
    images = preprocessing.normalize(batch["image"], network.dtype)
    if tta:
        outputs = task.merge([network.apply(variables, view) for view in task.views(images)])
    else:
        outputs = network.apply(variables, images)
    sums, rows = task.evaluate(outputs, batch)
    return sums | {"examples": batch["mask"].sum(dtype=jnp.int32)}, rows
