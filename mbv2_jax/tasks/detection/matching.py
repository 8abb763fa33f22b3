"""Which anchors stand for which objects, and which of the others are worth learning from.

Everything here has fixed shapes and runs on the device, inside the training step.
"""

import jax
import jax.numpy as jnp

# An anchor that overlaps an object by this much stands for it.
THRESHOLD = 0.5
NO_OBJECT = -1


def iou(boxes: jax.Array, others: jax.Array) -> jax.Array:
    """Returns the intersection over union of each box with each other.

    Args:
      boxes: (A, 4), x0, y0, x1, y1.
      others: (M, 4).

    Returns:
      (A, M); 0 where both have no area.
    """
    low = jnp.maximum(boxes[:, None, :2], others[:, :2])  # (A, M, 2)
    high = jnp.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = jnp.prod((high - low).clip(0), -1)  # (A, M)
    union = area(boxes)[:, None] + area(others) - shared
    return shared / jnp.maximum(union, 1e-6)  # mmdet's eps


def area(boxes: jax.Array) -> jax.Array:
    """Returns the areas of boxes: (..., 4) -> (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def match(anchors: jax.Array, boxes: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the object of each anchor.

    An anchor stands for the object that it overlaps most, if by THRESHOLD or more; and each object
    gets the anchor that overlaps it most, however little. If that is the same for several objects,
    the last one gets it.

    mmdet's `MaxIoUAssigner(0.5, 0.5, min_pos_iou=0, gt_max_assign_all=False)`. TensorFlow's
    `ArgMaxMatcher` differs in that the first of several objects gets the anchor.

    Args:
      anchors: (A, 4), x0, y0, x1, y1.
      boxes: (M, 4), of the objects.
      valid: (M,) bool, False for padding.

    Returns:
      (A,) int32: the object's index, or NO_OBJECT.
    """
    overlaps = jnp.where(valid, iou(anchors, boxes), -1)  # (A, M)
    best = jnp.where(overlaps.max(1) >= THRESHOLD, overlaps.argmax(1), NO_OBJECT)
    own = overlaps.argmax(0)  # (M,), the anchor of each object
    is_own = (own == jnp.arange(len(anchors))[:, None]) & valid  # (A, M)
    # A comparison of all pairs instead of a scatter, which TPUs are slow at.
    forced = jnp.where(is_own, jnp.arange(len(boxes)), NO_OBJECT).max(1)
    return jnp.where(forced != NO_OBJECT, forced, best).astype(jnp.int32)


def hardest(losses: jax.Array, candidates: jax.Array, count: jax.Array) -> jax.Array:
    """Returns the candidates with the largest losses (hard negative mining).

    Of equal losses the first are taken.

    Args:
      losses: (A,), 0 or more.
      candidates: (A,) bool.
      count: (), how many to take; all if there are fewer.

    Returns:
      (A,) bool.
    """
    values = jnp.where(candidates, losses, -1)
    # The loss of the last one that is taken. Sorted values and no indices, which would take longer.
    last = jnp.sort(values, descending=True)[(count - 1).clip(0, len(values) - 1)]
    above, level = values > last, values == last
    room = count - above.sum()
    return candidates & (count > 0) & (above | (level & (jnp.cumsum(level) <= room)))
