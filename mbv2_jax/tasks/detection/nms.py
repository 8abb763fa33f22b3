"""From scores and boxes of all anchors to detections: non-maximum suppression on the device.

All shapes are fixed: there is room for so many detections, and those that are missing have the
label NO_DETECTION and the score 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mbv2_jax.tasks.detection import matching

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
    boxes, labels = candidates.boxes, candidates.labels

    def goes_on(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        count, scores, _ = state
        return (count < most) & (scores.max() > 0)

    def take(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        count, scores, taken = state
        best = scores.argmax()
        overlap = matching.iou(boxes, boxes[best][None])[:, 0]  # (C,)
        gone = (overlap > threshold) & (labels == labels[best])
        gone = gone.at[best].set(True)
        return count + 1, jnp.where(gone, 0, scores), taken.at[count].set(best)

    empty = jnp.full(most, len(labels), jnp.int32)
    count, _, taken = lax.while_loop(goes_on, take, (jnp.int32(0), candidates.scores, empty))
    there = jnp.arange(most) < count
    return Detections(
        jnp.where(there[:, None], boxes[taken], 0),
        jnp.where(there, candidates.scores[taken], 0),
        jnp.where(there, labels[taken], NO_DETECTION),
    )
