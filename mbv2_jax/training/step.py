"""One step of training and one of evaluation: pure functions, jitted by the loop."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.tasks import classification
from mbv2_jax.training import state as state_lib
from mbv2_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]

# Folded into a step's key for mixup and cutmix, so that dropout draws the same with and without.
MIXING = 1


def normalize(
    images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: jnp.dtype
) -> jax.Array:
    """Returns (images - mean) / std in `dtype`.

    Args:
      images: (N, H, W, 3) RGB, uint8 or, where images were mixed, float.
      mean: of R, G, B, in the units of the pixels, 0-255.
      std: likewise.
      dtype: of the result; the arithmetic is float32 or wider, since bfloat16 would lose pixels.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    pixels = images.astype(wide)
    return ((pixels - jnp.asarray(mean, wide)) / jnp.asarray(std, wide)).astype(dtype)


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: MobileNetV2,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    label_smoothing: float,
    mixup_alpha: float,
    cutmix_alpha: float,
    ema_decay: float | None,
    ema_every_steps: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Does one step: mix, normalise, forward, backward, update.

    Args:
      state: the state before; under jit it is donated.
      batch: {"image": (N, H, W, 3) uint8, "label": (N,) int32}, N the global batch.
      key: the run's jax.random key; the step's own randomness is fold_in(key, state.step).
      model, optimizer, learning_rate: from the config; static.
      mean, std: of R, G, B, 0-255.
      label_smoothing, mixup_alpha, cutmix_alpha: see tasks/classification.py.
      ema_decay, ema_every_steps: see state.average; a decay of None for no average.

    Returns:
      The state after, and {"loss", "top1" (percent that are Targets.main), "learning_rate",
      "grad_norm"}, scalars of this batch. Batch statistics: see models/layers.py.
    """
    dropout = jax.random.fold_in(key, state.step)
    mixing = jax.random.fold_in(dropout, MIXING)
    pixels, targets = classification.mix(
        mixing, batch["image"], batch["label"], mixup_alpha, cutmix_alpha
    )
    images = normalize(pixels, mean, std, model.dtype)

    def loss_of(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout}
        )
        losses = classification.mixed_cross_entropy(logits, targets, label_smoothing)
        return losses.mean(), (logits, updated["batch_stats"])

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None:
        new = {"params": params, "batch_stats": batch_stats}
        ema = state_lib.average(ema, new, state.step + 1, ema_decay, ema_every_steps)
    metrics = {
        "loss": loss,
        "top1": 100.0 * (logits.argmax(-1) == targets.main()).mean(),
        "learning_rate": learning_rate(state.step),
        "grad_norm": optax.tree.norm(grads),
    }
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema), metrics


def eval_step(
    variables: Mapping[str, Mapping],
    batch: Batch,
    *,
    model: MobileNetV2,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    flip: bool = False,
) -> tuple[classification.Sums, classification.Predictions]:
    """Scores one batch.

    Args:
      variables: {"params", "batch_stats"}.
      batch: {"image": (N, H, W, 3) uint8, "label": (N,) int32, "mask": (N,) bool}; rows whose
        mask is False are padding.
      model: the network; static.
      mean, std: of R, G, B, 0-255.
      flip: whether the probabilities are the mean of those of the image and of its mirror image.

    Returns:
      Sums over the batch, and each row's prediction: see tasks/classification.py.
    """
    images = normalize(batch["image"], mean, std, model.dtype)
    logits: Any = model.apply(variables, images)
    if flip:
        mirrored: Any = model.apply(variables, images[:, :, ::-1])
        logits = classification.average(logits, mirrored)
    sums = classification.evaluation_sums(logits, batch["label"], batch["mask"])
    return sums, classification.predictions(logits, batch["label"])
