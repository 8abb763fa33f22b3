"""Pascal VOC's average precision at an IoU of 0.5, as from 2010 on: the area under the curve."""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask

from mbv2_jax.data.sample import Boxes
from mbv2_jax.tasks.detection import objects
from mbv2_jax.tasks.detection.objects import Found

_RIGHT, _NEITHER, _WRONG = 1, 0, -1


def average_precision(
    truths: Sequence[Boxes], found: Sequence[Found], classes: int, threshold: float = 0.5
) -> np.ndarray:
    """Returns the average precision of each class, (classes,) float64, from 0 to 1.

    A detection is right if the object of its class that it overlaps most has an IoU of `threshold`
    or more with it, and no better detection had that object. Those of difficult objects count
    neither as right nor as wrong.

    Boxes end at their corners. VOC's own program and mmdetection's VOCMetric count the last row and
    column of pixels besides, and so find slightly larger IoUs.

    Args:
      truths: the objects of each picture.
      found: the detections in each picture.
      classes: their number.
      threshold: the IoU.

    Returns:
      NaN for a class without objects that are not difficult.
    """
    scores: list[list[np.ndarray]] = [[] for _ in range(classes)]
    hits: list[list[np.ndarray]] = [[] for _ in range(classes)]
    for truth, detected in zip(truths, found, strict=True):
        for label in np.unique(detected.labels):
            chosen, there = detected.of(label), truth.labels == label
            scores[label].append(chosen.scores)
            if there.any():
                hits[label].append(_hits(truth.take(there), chosen, threshold))
            else:
                hits[label].append(np.full(len(chosen.scores), _WRONG))
    counts = np.zeros(classes, np.int64)
    for truth in truths:
        np.add.at(counts, truth.labels[~truth.difficult], 1)
    return np.array(
        [_area(*parts) for parts in zip(scores, hits, counts.tolist(), strict=True)], np.float64
    )


def _hits(truth: Boxes, detected: Found, threshold: float) -> np.ndarray:
    """Returns for each detection of a class in a picture whether it is right, (D,) int64.

    Args:
      truth: the objects of the class, at least one.
      detected: the detections of the class.
      threshold: the IoU.
    """
    hits = np.full(len(detected.scores), _WRONG)
    corners = (detected.corners, truth.corners)
    overlaps = mask.iou(*map(objects.as_coco, corners), [0] * len(truth))  # (D, objects)
    taken = np.zeros(len(truth), bool)
    for each in np.argsort(-detected.scores, kind="stable"):
        best = overlaps[each].argmax()
        if overlaps[each, best] < threshold:
            continue
        if truth.difficult[best]:
            hits[each] = _NEITHER
        elif not taken[best]:
            hits[each] = _RIGHT
            taken[best] = True
    return hits


def _area(scores: Sequence[np.ndarray], hits: Sequence[np.ndarray], count: int) -> float:
    """Returns the area under the curve of precision over recall, which is made to fall."""
    if not count:
        return np.nan
    if not scores:
        return 0.0
    sorted_hits = np.concatenate(hits)[np.argsort(-np.concatenate(scores), kind="stable")]
    right = np.cumsum(sorted_hits == _RIGHT)
    wrong = np.cumsum(sorted_hits == _WRONG)
    precision = right / np.maximum(1, right + wrong)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(falling[sorted_hits == _RIGHT].sum() / count)
