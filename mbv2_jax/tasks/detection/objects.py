"""The objects of samples on the host: as arrays of fixed shape, and back in the picture."""

from collections.abc import Sequence

import numpy as np

from mbv2_jax.data.sample import Boxes, Frame, Sample
from mbv2_jax.data.sources import BoxSource, Source
from mbv2_jax.errors import UserError

BOXES = "boxes"  # the name of the target
NO_LABEL = -1  # of padding


def check(source: Source) -> BoxSource:
    """Returns a split that has boxes; raises UserError if it has none."""
    if not hasattr(source, "boxes"):
        raise UserError(
            f"{source.describe(0)} has no boxes: for detection, give coco:PATH, voc:PATH, "
            "yolo:PATH or digit_scenes"
        )
    return source  # type: ignore[return-value] # a protocol is not checked at run time


def trainable(boxes: Boxes) -> Boxes:
    """Returns the boxes of single objects that are not difficult, as mmdet trains on them."""
    return boxes.take(~(boxes.crowd | boxes.difficult))


def padded(samples: Sequence[Sample], room: int, classes: int) -> dict[str, np.ndarray]:
    """Returns the objects to train on.

    Args:
      samples: transformed.
      room: objects of a sample.
      classes: their number.

    Returns:
      {"boxes": (N, room, 4) float32, "labels": (N, room) int32, NO_LABEL for padding}.

    Raises:
      UserError: a sample has no boxes, too many, or a label that is no class.
    """
    corners = np.zeros((len(samples), room, 4), np.float32)
    labels = np.full((len(samples), room), NO_LABEL, np.int32)
    for i, sample in enumerate(samples):
        if BOXES not in sample.targets:
            raise UserError(f"{sample.id}: has no boxes")
        found = trainable(sample.targets[BOXES])
        if len(found) > room:
            raise UserError(
                f"{sample.id}: has {len(found)} objects, and there is room for {room}: give "
                f"--config.model.max_boxes={len(found)}"
            )
        if len(found) and found.labels.max() >= classes:
            raise UserError(f"{sample.id}: the class {found.labels.max()} is none of {classes}")
        corners[i, : len(found)] = found.corners
        labels[i, : len(found)] = found.labels
    return {"boxes": corners, "labels": labels}


def places(frames: Sequence[Frame | None]) -> np.ndarray:
    """Returns the extents of frames, (N, 4) float32: left, top, right, bottom in the picture."""
    return np.array([frame.extent for frame in frames if frame is not None], np.float32)


def in_picture(boxes: np.ndarray, size: Sequence[float], extent: Sequence[float]) -> np.ndarray:
    """Returns boxes of the network's image as boxes of the original picture.

    Args:
      boxes: (N, 4), x0, y0, x1, y1 in pixels of the image.
      size: (height, width) of the image, in pixels.
      extent: left, top, right and bottom of the image's frame, in pixels of the picture.

    Returns:
      (N, 4) of the same dtype, in pixels of the picture.
    """
    left, top, right, bottom = map(float, extent)
    scale = [(right - left) / float(size[1]), (bottom - top) / float(size[0])]
    return boxes * np.array(scale * 2, boxes.dtype) + np.array([left, top] * 2, boxes.dtype)
