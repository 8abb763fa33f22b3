"""The codes of boxes: their places and sizes relative to anchors (Ren et al. 2015, section 3.1.2).

The codes of a box with centre (x, y), width w and height h, relative to an anchor (X, Y, W, H):
((x - X) / W, (y - Y) / H, log(w / W), log(h / H)), each over its share in SCALES, so that a network
learns numbers about as large as 1. mmdet calls the shares `target_stds`, TensorFlow their inverses
`y_scale`, `x_scale`, ...
"""

import math

import jax
import jax.numpy as jnp

SCALES = (0.1, 0.1, 0.2, 0.2)
# A box is at most this many times as long as its anchor, and at least the inverse: mmdet's
# `wh_ratio_clip`, so that no code becomes infinite.
LONGEST = 1000 / 16


def encode(boxes: jax.Array, anchors: jax.Array) -> jax.Array:
    """Returns the codes of boxes.

    Args:
      boxes, anchors: (..., 4), x0, y0, x1, y1, with x1 > x0 and y1 > y0.

    Returns:
      (..., 4).
    """
    centre, size = _centre_and_size(boxes)
    anchor_centre, anchor_size = _centre_and_size(anchors)
    offset = (centre - anchor_centre) / anchor_size
    codes = jnp.concatenate([offset, jnp.log(size / anchor_size)], -1)
    return codes / jnp.asarray(SCALES, codes.dtype)


def decode(codes: jax.Array, anchors: jax.Array) -> jax.Array:
    """Returns the boxes of codes: the inverse of `encode`.

    Args:
      codes, anchors: (..., 4).

    Returns:
      (..., 4), x0, y0, x1, y1.
    """
    offset, stretch = jnp.split(codes * jnp.asarray(SCALES, codes.dtype), 2, -1)
    anchor_centre, anchor_size = _centre_and_size(anchors)
    limit = math.log(LONGEST)
    half = anchor_size * jnp.exp(stretch.clip(-limit, limit)) / 2
    centre = anchor_centre + offset * anchor_size
    return jnp.concatenate([centre - half, centre + half], -1)


def _centre_and_size(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the centres (..., 2) and the widths and heights (..., 2) of boxes."""
    low, high = jnp.split(boxes, 2, -1)
    return (low + high) / 2, high - low
