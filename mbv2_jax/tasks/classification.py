"""Image classification: loss, training metrics and evaluation sums."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

Sums = dict[str, jax.Array]
Predictions = dict[str, jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross entropy of each example, with torch's `label_smoothing`.

    Args:
      logits: (N, classes), any float dtype; computed in float32 or wider.
      labels: (N,) integers.
      label_smoothing: share of the target spread evenly over all classes, the right one included.

    Returns:
      (N,) losses in nats.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def evaluation_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Sums over the examples of a batch that are not padding.

    Args:
      logits: (N, classes).
      labels: (N,) integers.
      mask: (N,) bool, False for padding.

    Returns:
      {"loss", "top1", "top5", "examples"}: scalars; counts are int32, so that sums are exact.
      Among equal logits the first class wins, as in torch.argmax (torch.topk leaves it open); with
      fewer than five classes top5 takes all of them. NaN ranks first: whether the loss is finite
      says whether the counts mean anything.
    """
    losses = jnp.where(mask, cross_entropy(logits, labels), 0)
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]  # (N, 5)
    right = (best == labels[:, None]) & mask[:, None]
    return {
        "loss": losses.sum(),
        "top1": right[:, 0].sum(dtype=jnp.int32),
        "top5": right.sum(dtype=jnp.int32),
        "examples": mask.sum(dtype=jnp.int32),
    }


def predictions(logits: jax.Array, labels: jax.Array) -> Predictions:
    """What `evaluation_sums` counts, for each example of a batch.

    Args:
      logits: (N, classes).
      labels: (N,) integers.

    Returns:
      {"loss": (N,), "best": (N, 5) int32, the classes by falling logit, "scores": (N, 5), their
      probabilities}; fewer than 5 where there are fewer classes.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    scores = jnp.take_along_axis(jax.nn.softmax(logits), best, axis=-1)
    return {"loss": cross_entropy(logits, labels), "best": best, "scores": scores}


def average(first: jax.Array, second: jax.Array) -> jax.Array:
    """Averages two predictions of the same examples as mmpretrain's AverageClsScoreTTA does.

    Args:
      first, second: logits (N, classes).

    Returns:
      (N, classes) logits whose probabilities are the mean of the two's: logarithms of it.
    """
    wide = jnp.promote_types(first.dtype, jnp.float32)
    first, second = (jax.nn.log_softmax(logits.astype(wide)) for logits in (first, second))
    return jnp.logaddexp(first, second) - jnp.log(2.0).astype(wide)


def summarize(sums: Mapping[str, float]) -> dict[str, float | int]:
    """Turns sums over a split into {"top1", "top5", "loss", "examples"}; percentages are 0-100."""
    examples = int(sums["examples"])
    return {
        "top1": 100.0 * float(sums["top1"]) / examples,
        "top5": 100.0 * float(sums["top5"]) / examples,
        "loss": float(sums["loss"]) / examples,
        "examples": examples,
    }
