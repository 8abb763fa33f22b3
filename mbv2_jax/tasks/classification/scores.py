"""The loss and the scores of classified images."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbv2_jax.tasks.classification.mixing import Targets

BEST = 5  # classes that are ranked


def cross_entropy(
    logits: jax.Array, labels: jax.Array | np.ndarray, label_smoothing: float = 0.0
) -> jax.Array:
    """Returns the cross entropy of each example, with PyTorch's `label_smoothing`.

    Args:
      logits: (N, classes), any float dtype; computed in float32 or wider.
      labels: (N,) integers.
      label_smoothing: share of the target spread evenly over all classes, the right one included.

    Returns:
      (N,) losses in nats.
    """
    import optax  # here, because it takes a fifth of a second, and prediction has no loss

    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def mixed_cross_entropy(logits: jax.Array, targets: Targets, label_smoothing: float) -> jax.Array:
    """Returns the cross entropy with targets of two classes, as PyTorch's with probabilities.

    Args:
      logits: (N, classes).
      targets: from `mixing.mix`.
      label_smoothing: see `cross_entropy`; the loss is linear in the target.

    Returns:
      (N,) losses in nats.
    """
    losses = cross_entropy(logits, targets.labels, label_smoothing)
    if targets.others is None:
        return losses
    others = cross_entropy(logits, targets.others, label_smoothing)
    return targets.share * losses + (1 - targets.share) * others


def sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Returns sums over the examples of a batch that are not padding.

    Args:
      logits: (N, classes).
      labels: (N,) integers.
      mask: (N,) bool, False for padding.

    Returns:
      {"loss", "top1", "top5"}: scalars, and "labels": (classes,), the examples of each class;
      counts are int32, so that sums are exact. Among equal logits the first class wins, as in
      torch.argmax (torch.topk leaves it open); with fewer than five classes, top5 counts all of
      them. NaN ranks first, so that the counts are meaningless where the loss is not finite.
    """
    losses = jnp.where(mask, cross_entropy(logits, labels), 0)
    best = jax.lax.top_k(logits, min(BEST, logits.shape[-1]))[1]  # (N, 5)
    right = (best == labels[:, None]) & mask[:, None]
    return {
        "loss": losses.sum(),
        "top1": right[:, 0].sum(dtype=jnp.int32),
        "top5": right.sum(dtype=jnp.int32),
        "labels": jnp.zeros(logits.shape[-1], jnp.int32).at[labels].add(mask.astype(jnp.int32)),
    }


def ranking(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Returns the five best classes of each example of a batch, and its loss.

    Args:
      logits: (N, classes).
      labels: (N,) integers.

    Returns:
      {"loss": (N,), "best": (N, 5) int32, the classes by falling logit, "scores": (N, 5), their
      probabilities}; fewer than 5 where there are fewer classes.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    best = jax.lax.top_k(logits, min(BEST, logits.shape[-1]))[1]
    scores = jnp.take_along_axis(jax.nn.softmax(logits), best, axis=-1)
    return {"loss": cross_entropy(logits, labels), "best": best, "scores": scores}


def average(first: jax.Array, second: jax.Array) -> jax.Array:
    """Averages two predictions of the same examples as mmpretrain's AverageClsScoreTTA does.

    Args:
      first, second: logits (N, classes).

    Returns:
      (N, classes) logits: the logarithms of the mean probabilities.
    """
    wide = jnp.promote_types(first.dtype, jnp.float32)
    first, second = (jax.nn.log_softmax(logits.astype(wide)) for logits in (first, second))
    return jnp.logaddexp(first, second) - jnp.log(2.0).astype(wide)


def summarize(totals: Mapping[str, Any]) -> dict[str, float | int]:
    """Turns sums over a split into {"top1", "top5", "loss", "examples"}; percentages are 0-100."""
    examples = int(totals["examples"])
    return {
        "top1": 100.0 * float(totals["top1"]) / examples,
        "top5": 100.0 * float(totals["top5"]) / examples,
        "loss": float(totals["loss"]) / examples,
        "examples": examples,
    }


def chance(labels: np.ndarray) -> tuple[float, float]:
    """Returns the top-1 of always naming the largest class, and its standard error, in percent.

    Args:
      labels: (classes,), the examples of each class.
    """
    value = 100.0 * float(labels.max() / labels.sum())
    return value, standard_error(value, float(labels.sum()))


def standard_error(percentage: float, examples: float) -> float:
    """Returns the binomial standard error of a percentage, in percentage points."""
    return math.sqrt(percentage * (100.0 - percentage) / examples)
