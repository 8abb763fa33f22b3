"""The objects of samples on the host: as arrays of fixed shape, and back in the picture."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

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


def found(rows: Mapping[str, np.ndarray], index: int) -> Found:
    """Returns the detections of an example in its picture.

    Args:
      rows: of `Detection.evaluate`.
      index: of the example.
    """
    there = rows["labels"][index] >= 0
    corners = rows["boxes"][index][there]
    return Found(
        in_picture(corners, rows["size"][index], rows["extent"][index]),
        rows["scores"][index][there],
        rows["labels"][index][there],
    )


def as_coco(corners: np.ndarray) -> np.ndarray:
    """Returns boxes as COCO's files have them, (N, 4) float64: x0, y0, width, height."""
    wide = corners.astype(np.float64)
    return np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], 1)


@dataclasses.dataclass(frozen=True)
class Relabelled:
    """A source whose boxes have a model's classes, a `sources.BoxSource`.

    Attributes:
      source: the split.
      matches: the model's class of each of the source's.
      class_names: the model's.
    """

    source: BoxSource
    matches: tuple[int, ...]
    class_names: tuple[str, ...]

    @property
    def parts(self) -> Any:
        return self.source.parts

    @property
    def benchmark(self) -> str:
        return self.source.benchmark

    @property
    def category_ids(self) -> tuple[int | None, ...]:
        """The source's number of each of the model's classes; None for one that it lacks."""
        ids = dict(zip(self.matches, self.source.category_ids, strict=True))
        return tuple(ids.get(label) for label in range(len(self.class_names)))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        targets = sample.targets | {BOXES: self._matched(sample.targets[BOXES])}
        return dataclasses.replace(sample, targets=targets)

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def boxes(self, index: int) -> Boxes:
        return self._matched(self.source.boxes(index))

    def image_id(self, index: int) -> int | str:
        return self.source.image_id(index)

    def without_empty(self, smallest: int) -> "Relabelled":
        return dataclasses.replace(self, source=self.source.without_empty(smallest))

    def _matched(self, boxes: Boxes) -> Boxes:
        table = np.array(self.matches, np.int32)
        return dataclasses.replace(boxes, labels=table[boxes.labels])
