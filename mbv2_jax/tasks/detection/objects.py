"""The objects of samples on the host: as arrays of fixed shape, and back in the picture."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mbv2_jax.data import labels
from mbv2_jax.data.sample import Boxes, Frame, Sample
from mbv2_jax.data.sources import BoxSource, Source
from mbv2_jax.errors import UserError

BOXES = "boxes"  # the name of the target
NO_LABEL = -1  # of padding
CORNERS = ("x0", "y0", "x1", "y1")  # of a box, in this order


class Found(NamedTuple):
    """The detections in a picture, D of them.

    Attributes:
      corners: (D, 4) float32: x0, y0, x1, y1 in pixels of the picture.
      scores: (D,) float32.
      labels: (D,) int32.
    """

    corners: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def of(self, label: int) -> "Found":
        """Returns the detections of a class."""
        return Found(*(part[self.labels == label] for part in self))


def check(source: Source) -> BoxSource:
    """Returns a split that has boxes; raises UserError if it has none."""
    if not hasattr(source, "boxes"):
        raise UserError(
            f"{source.describe(0)} has no boxes: for detection, give coco:PATH, voc:PATH, "
            "yolo:PATH or digit_scenes"
        )
    return source  # type: ignore[return-value] # a protocol is not checked at run time


def check_room(source: BoxSource, room: int) -> None:
    """Raises UserError if an example of a split has more objects than there is room for."""
    index, count = source.fullest()
    if count > room:
        raise UserError(_too_many(source.describe(index), count, room))


def _too_many(name: str, count: int, room: int) -> str:
    return (
        f"{name}: has {count} objects, and there is room for {room}: give "
        f"--config.model.max_boxes={count}"
    )


def trainable(boxes: Boxes) -> Boxes:
    """Returns the boxes to train on: of single objects, not difficult, with an area."""
    has_area = (boxes.corners[:, 2:] > boxes.corners[:, :2]).all(1)
    return boxes.take(~(boxes.crowd | boxes.difficult) & has_area)


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
            raise UserError(_too_many(sample.id, len(found), room))
        if len(found) and found.labels.max() >= classes:
            raise UserError(
                f"{sample.id}: an object is of class {found.labels.max()}, and there are classes 0 "
                f"to {classes - 1}"
            )
        corners[i, : len(found)] = found.corners
        labels[i, : len(found)] = found.labels
    return {"boxes": corners, "labels": labels}


def frame_row(frame: Frame) -> np.ndarray:
    """Returns a frame as an array, (6,) float32: its extent, then its width and height."""
    return np.array([*frame.extent, *frame.size], np.float32)


def in_picture(
    boxes: np.ndarray, size: Sequence[float], frame: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes of the network's image as boxes of the original picture, clipped to it.

    Args:
      boxes: (N, 4), x0, y0, x1, y1 in pixels of the image.
      size: (height, width) of the image, in pixels.
      frame: (6,), from `frame_row`.

    Returns:
      (N, 4) of the same dtype, in pixels of the picture; and (N,) bool, False for boxes that lie
      outside it, in the padding of the image.
    """
    left, top, right, bottom, width, height = map(float, frame)
    scale = [(right - left) / float(size[1]), (bottom - top) / float(size[0])]
    moved = boxes * np.array(scale * 2, boxes.dtype) + np.array([left, top] * 2, boxes.dtype)
    moved = moved.clip(0, np.array([width, height] * 2, boxes.dtype))
    return moved, (moved[:, 2:] > moved[:, :2]).all(1)


def found(rows: Mapping[str, np.ndarray], index: int) -> Found:
    """Returns the detections of an example in its picture.

    Args:
      rows: of `Detection.evaluate`, or of `Detection.postprocess` with "frame".
      index: of the example.
    """
    size, frame = rows["size"][index], rows["frame"][index]
    corners, inside = in_picture(rows["boxes"][index], size, frame)
    found = Found(corners, rows["scores"][index], rows["labels"][index])
    return Found(*(part[inside & (found.labels >= 0)] for part in found))


def shared(ours: Found, theirs: Found, least: float) -> tuple[int, int]:
    """Returns the number of objects that are in both sets of detections, and in either.

    Objects are the same if their class is, and their boxes' intersection over union is above 0.5.
    Each has one counterpart at most, the best that is left.

    Args:
      ours, theirs: detections in the same pixels.
      least: the score of an object that counts.
    """
    ours, theirs = (
        Found(*(part[found.scores >= least] for part in found)) for found in (ours, theirs)
    )
    low = np.maximum(ours.corners[:, None, :2], theirs.corners[None, :, :2])
    high = np.minimum(ours.corners[:, None, 2:], theirs.corners[None, :, 2:])
    inner = (high - low).clip(0).prod(-1)  # (ours, theirs)
    one, other = (
        (found.corners[:, 2:] - found.corners[:, :2]).prod(-1) for found in (ours, theirs)
    )
    overlap = inner / np.maximum(one[:, None] + other - inner, 1e-9)
    overlap[ours.labels[:, None] != theirs.labels] = 0
    both = 0
    for row in range(len(ours.labels)):
        column = int(overlap[row].argmax()) if overlap.shape[1] else 0
        if overlap.shape[1] and overlap[row, column] > 0.5:
            both += 1
            overlap[:, column] = 0
    return both, len(ours.labels) + len(theirs.labels) - both


def as_coco(corners: np.ndarray) -> np.ndarray:
    """Returns boxes as COCO's files have them, (N, 4) float64: x0, y0, width, height."""
    wide = corners.astype(np.float64)
    return np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], 1)


@dataclasses.dataclass(frozen=True)
class Relabelled(labels.Relabelled):
    """A source whose boxes have a model's classes, a `sources.BoxSource`."""

    source: BoxSource

    @property
    def benchmark(self) -> str:
        return self.source.benchmark

    @property
    def category_ids(self) -> tuple[int | None, ...]:
        """The source's number of each of the model's classes; None for one that it lacks."""
        ids = dict(zip(self.matches, self.source.category_ids, strict=True))
        return tuple(ids.get(label) for label in range(len(self.class_names)))

    def targets(self, sample: Sample) -> dict[str, Any]:
        return {BOXES: self._matched(sample.targets[BOXES])}

    def boxes(self, index: int) -> Boxes:
        return self._matched(self.source.boxes(index))

    def image_id(self, index: int) -> int | str:
        return self.source.image_id(index)

    def fullest(self) -> tuple[int, int]:
        return self.source.fullest()

    def without_empty(self, smallest: int) -> "Relabelled":
        return dataclasses.replace(self, source=self.source.without_empty(smallest))

    def _matched(self, boxes: Boxes) -> Boxes:
        table = np.array(self.matches, np.int32)
        return dataclasses.replace(boxes, labels=table[boxes.labels])
