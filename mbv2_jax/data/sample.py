"""Samples: images with their targets, which geometric operations move as a whole.

Coordinates are in pixels, x to the right and y down; (0, 0) is the upper left corner of the upper
left pixel, so that a box around the whole image is (0, 0, width, height).
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

IGNORED = 255  # the class of a mask's pixels that do not count


@dataclasses.dataclass(frozen=True)
class Boxes:
    """The objects in an image, N of them.

    Attributes:
      corners: (N, 4) float32: x0, y0, x1, y1 in pixels; float64 from `BoxSource.boxes`.
      labels: (N,) int32, the objects' classes.
      crowd: (N,) bool, whether a box stands for a crowd (COCO's `iscrowd`).
      difficult: (N,) bool, whether evaluation leaves the object out (VOC's `difficult`).
      area: (N,) of the same dtype, the objects' own areas in pixels, for COCO's size ranges.
    """

    corners: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    area: np.ndarray

    def __len__(self) -> int:
        return len(self.corners)

    def take(self, chosen: np.ndarray | slice) -> "Boxes":
        """Returns the boxes at `chosen`, indices, a bool mask or a slice."""
        return Boxes(*(getattr(self, f.name)[chosen] for f in dataclasses.fields(self)))


class Frame(NamedTuple):
    """The original picture of a transformed image, and the part of it that the image shows.

    A point at the shares (u, v) of the image's width and height, 0 at its left and upper edge and 1
    at the others, is at (left + u * (right - left), top + v * (bottom - top)) in the picture.

    Attributes:
      size: (width, height) of the picture, in pixels.
      extent: left, top, right and bottom of the part, in the picture's pixels. It reaches beyond
        the picture where the image was padded, and left > right where it was flipped.
    """

    size: tuple[int, int]
    extent: tuple[float, float, float, float]

    @classmethod
    def whole(cls, width: int, height: int) -> "Frame":
        """Returns the frame of an image that is the picture itself."""
        return cls((width, height), (0.0, 0.0, float(width), float(height)))

    def part(self, left: float, top: float, right: float, bottom: float) -> "Frame":
        """Returns the frame of a part of the image, given in shares of its width and height."""
        x0, y0, x1, y1 = self.extent
        width, height = x1 - x0, y1 - y0
        extent = (x0 + left * width, y0 + top * height, x0 + right * width, y0 + bottom * height)
        return self._replace(extent=extent)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One example of a dataset.

    Attributes:
      image: the bytes of an image file, as a source gives them; once decoded, an upright Pillow
        image of mode "RGB"; after a transform, a uint8 (H, W, 3) array of RGB pixels.
      id: the name of the example for messages and predictions: its file, or dataset and number.
      targets: a dict from name to whatever a task learns: an int label, `Boxes`, a mask (a Pillow
        image of mode "L", a class for each pixel), or anything else, which operations leave alone.
      frame: the decoded image before any operation, and the part of it that is left; None for an
        encoded image.
    """

    image: Any
    id: str
    targets: dict[str, Any] = dataclasses.field(default_factory=dict)
    frame: Frame | None = None

    def with_image(self, image: Image.Image) -> "Sample":
        """Returns the sample with another image and the same targets, for changes of colour."""
        return dataclasses.replace(self, image=image)


class ArraySpec(NamedTuple):
    """The shape and dtype of an array, of one example or of a batch."""

    shape: tuple[int, ...]
    dtype: Any
