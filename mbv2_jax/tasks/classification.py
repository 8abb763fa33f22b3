"""Image classification: mixup and cutmix, loss, training metrics and evaluation sums."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbv2_jax.data.sample import ArraySpec, Sample
from mbv2_jax.errors import UserError

Sums = dict[str, jax.Array]
Predictions = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Collator:
    """Images with a label each; stands in for the task, which is going to collate itself."""

    def batch_spec(self, size: tuple[int, int]) -> dict[str, ArraySpec]:
        """Returns the arrays of one example whose image is (height, width)."""
        return {"image": ArraySpec((*size, 3), np.uint8), "label": ArraySpec((), np.int32)}

    def collate(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Returns {"image", "label"} of transformed samples; UserError if one has no label."""
        for sample in samples:
            if sample.targets.get("label", -1) < 0:
                raise UserError(f"{sample.id}: has no label")
        labels = [sample.targets["label"] for sample in samples]
        return {
            "image": np.stack([sample.image for sample in samples]),
            "label": np.array(labels, np.int32),
        }


COLLATOR = _Collator()


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


class Targets(NamedTuple):
    """What the images of a training batch show.

    Attributes:
      labels: (N,) integers.
      others: (N,) integers, of what is mixed in; None where nothing is.
      share: () float from 0 to 1: how much of each target is `labels`; the rest is `others`.
    """

    labels: jax.Array
    others: jax.Array | None = None
    share: jax.Array | float = 1.0

    def main(self) -> jax.Array:
        """Returns the labels that have the larger share, (N,): right for the training's top-1."""
        if self.others is None:
            return self.labels
        return jnp.where(jnp.asarray(self.share) >= 0.5, self.labels, self.others)


def mix(
    key: jax.Array, images: jax.Array, labels: jax.Array, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, Targets]:
    """Mixes each image with the one before it in the batch, as torchvision.transforms.v2 does.

    One share, drawn from Beta(alpha, alpha), and for cutmix one box hold for the whole batch.
    Where both alphas are above 0, a step does one of the two, with equal probability.

    Mixing and the normalisation after it commute, but for rounding. Done in this order, images go
    from device to device as uint8: one of each device's share of the batch, to the next device.

    Args:
      key: a jax.random key.
      images: (N, H, W, 3) uint8.
      labels: (N,) integers.
      mixup_alpha: 0 for no mixup (https://arxiv.org/abs/1710.09412).
      cutmix_alpha: 0 for no cutmix (https://arxiv.org/abs/1905.04899).

    Returns:
      (N, H, W, 3) pixels of 0-255, float32 (where both alphas are 0 uint8, as they came), and
      their targets.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, Targets(labels)
    choice, draw, place = jax.random.split(key, 3)
    cutmix_probability = 0.5 if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)
    cutmix = jax.random.bernoulli(choice, cutmix_probability)
    alpha = jnp.where(cutmix, cutmix_alpha, mixup_alpha)
    share = jax.random.beta(draw, alpha, alpha)
    height, width = images.shape[1:3]
    centre = jax.random.randint(place, (2,), 0, jnp.asarray((height, width)))
    outside = outside_box(share, centre, height, width)
    kept = jnp.where(cutmix, outside, share)[:, :, None]  # (H, W, 1), of each pixel
    mixed = kept * images + (1 - kept) * jnp.roll(images, 1, axis=0)
    share = jnp.where(cutmix, outside.mean(), share)
    return mixed, Targets(labels, jnp.roll(labels, 1), share)


def outside_box(share: jax.Array, centre: jax.Array, height: int, width: int) -> jax.Array:
    """Returns cutmix's mask: 0.0 in a box, which the image's edges clip, and 1.0 outside.

    Args:
      share: () float; the box, before it is clipped, has 1 - share of the image's area.
      centre: (2,) integers, its row and column.
      height, width: of the image.

    Returns:
      (height, width) of the share's dtype.
    """
    half = 0.5 * jnp.sqrt(1 - share)

    def within(length: int, middle: jax.Array) -> jax.Array:
        reach = (half * length).astype(middle.dtype)  # truncated
        offset = jnp.arange(length) - middle
        return (-reach <= offset) & (offset < reach)

    box = within(height, centre[0])[:, None] & within(width, centre[1])
    return 1 - box.astype(share.dtype)


def mixed_cross_entropy(logits: jax.Array, targets: Targets, label_smoothing: float) -> jax.Array:
    """Cross entropy with targets that are two classes: torch's, given such probabilities.

    Args:
      logits: (N, classes).
      targets: from `mix`.
      label_smoothing: see `cross_entropy`, in which the loss of a target is linear.

    Returns:
      (N,) losses in nats.
    """
    losses = cross_entropy(logits, targets.labels, label_smoothing)
    if targets.others is None:
        return losses
    others = cross_entropy(logits, targets.others, label_smoothing)
    return targets.share * losses + (1 - targets.share) * others


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
