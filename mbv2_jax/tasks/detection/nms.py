"""Non-maximum suppression on the device: detections from the scores and boxes of all anchors.

All shapes are fixed: there is room for so many detections, and those that are missing have the
label NO_DETECTION and the score 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NO_DETECTION = -1


class Detections(NamedTuple):
    """The D best detections of an image, the best first.

    Attributes:
      boxes: (D, 4), x0, y0, x1, y1 in pixels.
      scores: (D,).
      labels: (D,) int32.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array


class Candidates(NamedTuple):
    """Pairs of an anchor and a class that may become detections.

    Attributes:
      boxes: (C, 4).
      scores: (C,), 0 or less where there is none.
      labels: (C,) int32.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array


def choose(
    scores: Sequence[jax.Array], boxes: Sequence[jax.Array], threshold: float, most: int
) -> Candidates:
    """Returns the best pairs of an anchor and a class of each map.

    Args:
      scores: of an image, (A, K) for each map.
      boxes: (A, 4) for each map.
      threshold: scores must be above it.
      most: pairs of a map.
    """
    kept = []
    for of_map, corners in zip(scores, boxes, strict=True):
        counted = jnp.where(of_map > threshold, of_map, 0)
        best, pairs = lax.top_k(counted.reshape(-1), min(most, counted.size))  # (C,)
        anchor, label = jnp.divmod(pairs, of_map.shape[1])
        kept.append((corners[anchor], best, label.astype(jnp.int32)))
    return Candidates(*(jnp.concatenate(parts) for parts in zip(*kept, strict=True)))


def has_area(boxes: jax.Array) -> jax.Array:
    """Returns whether boxes, (A, 4), have an area above 0: (A,) bool."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def suppress(candidates: Candidates, threshold: float, most: int) -> Detections:
    """Takes the best candidate, drops those of its class that overlap it, and so on.

    Of equal scores the first is taken.

    Args:
      candidates: of one image.
      threshold: an IoU above which a candidate is dropped.
      most: detections.
    """
    count = len(candidates.labels)
    scores, order = lax.top_k(candidates.scores, count)  # the best first
    labels, boxes = candidates.labels[order], candidates.boxes[order]
    # A contiguous array of each side, and the smallest index that is left instead of an argmax:
    # CPUs take 8 candidates at a time that way.
    x0, y0, x1, y1 = boxes.T  # (C,)
    areas, indices = (x1 - x0) * (y1 - y0), jnp.arange(count)

    def goes_on(state: tuple[jax.Array, ...]) -> jax.Array:
        _, best, found, _ = state
        return (found < most) & (best < count)

    def take(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, best, found, taken = state
        across = jnp.minimum(x1, x1[best]) - jnp.maximum(x0, x0[best])
        down = jnp.minimum(y1, y1[best]) - jnp.maximum(y0, y0[best])
        shared = across.clip(0) * down.clip(0)
        overlaps = shared / (areas + areas[best] - shared) > threshold
        left &= ~(overlaps & (labels == labels[best])) & (indices > best)
        return left, _first(left), found + 1, taken.at[found].set(best)

    left = scores > 0
    state: tuple[jax.Array, ...] = (
        left,
        _first(left),
        jnp.int32(0),
        jnp.zeros(most, jnp.int32),
    )
    *_, found, taken = lax.while_loop(goes_on, take, state)
    there = jnp.arange(most) < found
    return Detections(
        jnp.where(there[:, None], boxes[taken], 0),
        jnp.where(there, scores[taken], 0),
        jnp.where(there, labels[taken], NO_DETECTION),
    )


def _first(left: jax.Array) -> jax.Array:
    """Returns the first index at which an array, (C,) bool, is True; C if there is none."""
    return jnp.where(left, jnp.arange(len(left)), len(left)).min()
