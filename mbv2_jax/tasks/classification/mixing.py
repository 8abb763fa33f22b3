"""Mixup and cutmix: training images that show two classes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Targets(NamedTuple):
    """The classes that the images of a training batch show.

    Attributes:
      labels: (N,) integers.
      others: (N,) integers, the classes of the images that are mixed in; None without mixing.
      share: () float from 0 to 1, the share of each target that is `labels`; the rest is `others`.
    """

    labels: jax.Array
    others: jax.Array | None = None
    share: Any = 1.0

    def main(self) -> jax.Array:
        """Returns the labels with the larger share, (N,), against which top-1 is counted."""
        if self.others is None:
            return self.labels
        return jnp.where(jnp.asarray(self.share) >= 0.5, self.labels, self.others)


def mix(
    key: jax.Array, images: jax.Array, labels: jax.Array, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, Targets]:
    """Mixes each image with the one before it in the batch, as torchvision.transforms.v2 does.

    The whole batch has the same share, drawn from Beta(alpha, alpha), and for cutmix the same box.
    Where both alphas are above 0, a step does one of the two, with equal probability.

    Mixing before or after the normalisation gives the same result, except for rounding. Before it,
    the images that travel between devices (the last of each device's share of the batch, to the
    next device) are still uint8.

    Args:
      key: a jax.random key.
      images: (N, H, W, 3) uint8.
      labels: (N,) integers.
      mixup_alpha: 0 for no mixup (https://arxiv.org/abs/1710.09412).
      cutmix_alpha: 0 for no cutmix (https://arxiv.org/abs/1905.04899).

    Returns:
      (N, H, W, 3) pixels of 0-255, float32 (uint8, unchanged, where both alphas are 0), and their
      targets.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, Targets(labels)
    choice_key, share_key, centre_key = jax.random.split(key, 3)
    cutmix_probability = 0.5 if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)
    cutmix = jax.random.bernoulli(choice_key, cutmix_probability)
    alpha = jnp.where(cutmix, cutmix_alpha, mixup_alpha)
    share = jax.random.beta(share_key, alpha, alpha)
    height, width = images.shape[1:3]
    centre = jax.random.randint(centre_key, (2,), 0, jnp.asarray((height, width)))
    outside = outside_box(share, centre, height, width)
    kept = jnp.where(cutmix, outside, share)[:, :, None]  # (H, W, 1), the share of each pixel
    mixed = kept * images + (1 - kept) * jnp.roll(images, 1, axis=0)
    share = jnp.where(cutmix, outside.mean(), share)
    return mixed, Targets(labels, jnp.roll(labels, 1), share)


def outside_box(share: jax.Array, centre: jax.Array, height: int, width: int) -> jax.Array:
    """Returns cutmix's mask: 0.0 in a box, clipped to the image, and 1.0 outside.

    Args:
      share: () float; before it is clipped, the box covers 1 - share of the image's area.
      centre: (2,) integers, the box's central row and column.
      height, width: of the image, in pixels.

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
