"""Scenes of handwritten digits with masks and boxes, drawn as they are read: no download.

Each scene shows two to four of scikit-learn's digits (data/digits.py), bright on a dark textured
background, of different sizes, some partly covered by others. A scene depends on its split and
number only, and is the same on every machine. The test scenes show the digits that `digits` holds
out, and the training scenes the others, so that no handwriting is in both.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Self

import numpy as np
from PIL import Image, ImageFilter

from mbv2_jax.data import digits
from mbv2_jax.data.sample import Boxes, Sample
from mbv2_jax.data.sources import parts
from mbv2_jax.errors import UserError

SIZES = {"train": 12_000, "test": 200}  # scenes
SIDE = 128  # of a scene, in pixels
CLASS_NAMES = ("background", *digits.CLASS_NAMES)
SMALLEST, LARGEST = 56, 84  # heights of digits, in pixels

_MOST = 4  # digits in a scene; the fewest are two
# Of a digit's own pixels; the others may be covered. Two large digits may find no such places, and
# share what room there is.
_LEAST_SHOWN = 0.8
_BORDER = 2  # pixels, of half the brightness, so that digits stand out from one another
_TRIES = 30  # places that are tried for a digit

_GROUND, _INK_LEVELS = (10, 115), (140, 245)  # levels of each colour

# A digit is 8 x 8 levels of ink. Its outline is where the enlarged ink is above this.
_INK = 60
_ENLARGED = 16  # times, before the outline is taken


class DigitScenes:
    """A split of scenes; samples have a "mask" of the classes and "boxes".

    A box is the extent of a whole digit, also of its covered part, and its area the number of the
    digit's visible pixels. Labels of boxes count as those of the mask: 1 is the digit 0.

    Args:
      split: "train", "test", or an expression as `parts.read` takes it.

    Attributes:
      class_names, parts: as `sources.Source` describes them.

    Raises:
      UserError: the split is unknown or empty, or scikit-learn is not installed.
    """

    class_names = CLASS_NAMES

    def __init__(self, split: str):
        chosen = parts.read(split, {name: [size] for name, size in SIZES.items()}, "digit_scenes")
        loaded = digits.load()
        self.parts = [parts.Part(f"digit_scenes/{p.split}", p.start, p.stop) for p in chosen]
        self._scenes = [(p.split, number) for p in chosen for number in range(p.start, p.stop)]
        self._digits = {p.split: loaded[p.split] for p in chosen}

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Sample:
        split, number = self._scenes[index]
        # A stream that NumPy never changes, as a Generator's may.
        rng = np.random.RandomState([list(SIZES).index(split), number])
        image, mask, boxes = _draw(*self._digits[split], rng)
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return Sample(file.getvalue(), self.describe(index), {"mask": mask, "boxes": boxes})

    def describe(self, index: int) -> str:
        split, number = self._scenes[index]
        return f"scene {number} of digit_scenes[{split}]"


class BoxedDigitScenes(DigitScenes):
    """A split of scenes for object detection, a `sources.BoxSource`; samples have "boxes" alone.

    The classes are the ten digits: label 0 is the digit 0.
    """

    class_names = digits.CLASS_NAMES
    category_ids = tuple(range(1, len(digits.CLASS_NAMES) + 1))
    benchmark = "coco"

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        boxes = sample.targets["boxes"]
        boxes = dataclasses.replace(boxes, labels=boxes.labels - 1)
        return dataclasses.replace(sample, targets={"boxes": boxes})

    def boxes(self, index: int) -> Boxes:
        """Returns the objects of a scene; corners and areas are float64, in pixels."""
        boxes: Boxes = self[index].targets["boxes"]
        return dataclasses.replace(
            boxes, corners=boxes.corners.astype(np.float64), area=boxes.area.astype(np.float64)
        )

    def image_id(self, index: int) -> str:
        """Returns the name of a scene in files of results."""
        split, number = self._scenes[index]
        return f"{split}_{number}"

    def fullest(self) -> tuple[int, int]:
        """Returns a scene and the most objects that any scene has: none is drawn to count them."""
        return 0, _MOST

    def without_empty(self, smallest: int) -> Self:
        """Returns the scenes themselves, each of which has objects.

        Raises:
          UserError: they are smaller than `smallest` pixels.
        """
        if smallest > SIDE:
            raise UserError(f"the scenes have {SIDE} x {SIDE} pixels, and not {smallest} or more")
        return self


def _draw(
    images: np.ndarray, labels: np.ndarray, rng: np.random.RandomState
) -> tuple[Image.Image, Image.Image, Boxes]:
    """Returns a scene, its mask, and its boxes.

    Args:
      images: (N, 8, 8) uint8, the digits to choose from.
      labels: (N,), of the digits.
      rng: the source of all randomness.
    """
    scene = _texture(SIDE, SIDE, *_GROUND, rng)
    shapes: list[tuple[int, int, np.ndarray]] = []
    owner = np.full((SIDE, SIDE), -1)  # the digit that is visible at a pixel
    found: list[int] = []  # the digits' labels
    for digit in rng.randint(len(labels), size=rng.randint(2, _MOST + 1)):
        shape = _outline(images[digit], rng)
        (top, left), shown = _place(owner, shapes, shape, rng)
        if shown < _LEAST_SHOWN and len(shapes) >= 2:
            continue  # no room for another
        number, (height, width) = len(shapes), shape.shape
        owner[top : top + height, left : left + width][shape] = number
        colours = _texture(width, height, *_INK_LEVELS, rng)
        border = Image.blend(colours, Image.new("RGB", colours.size), 0.5)
        border.paste(colours, (0, 0), _inside(shape))
        scene.paste(border, (left, top), Image.fromarray(shape))
        shapes.append((top, left, shape))
        found.append(labels[digit] + 1)
    noise = rng.randint(-8, 9, size=(SIDE, SIDE, 3), dtype=np.int16)
    pixels = (np.asarray(scene) + noise).clip(0, 255).astype(np.uint8)
    mask = np.array([*found, 0], np.uint8)[owner]  # -1, the ground, is the last
    boxes = _boxes(shapes, np.array(found, np.int32), owner)
    return Image.fromarray(pixels), Image.fromarray(mask), boxes


def _texture(
    width: int, height: int, low: int, high: int, rng: np.random.RandomState
) -> Image.Image:
    """Returns colours of levels from `low` to `high` that change smoothly, with finer spots."""
    coarse, fine = rng.randint(1, 4), rng.randint(6, 25)
    levels = rng.randint(low, high + 1, size=(coarse, coarse, 3)).astype(np.uint8)
    spots = rng.randint(low, high + 1, size=(fine, fine, 3)).astype(np.uint8)
    smooth, detail = (
        Image.fromarray(each).resize((width, height), Image.Resampling.BILINEAR)
        for each in (levels, spots)
    )
    return Image.blend(smooth, detail, 0.25)


def _outline(image: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Returns the filled outline of a digit of random size: (height, width) bool, cut to it."""
    height = rng.randint(SMALLEST, LARGEST + 1)
    stretch = rng.randint(85, 121)  # percent, of the width
    side = 10 * _ENLARGED
    padded = Image.fromarray(np.pad(image, 1))
    ink = padded.resize((side, side), Image.Resampling.BICUBIC)
    left, top, right, bottom = _extent(np.asarray(ink) > _INK)
    width = max(8, (right - left) * height * stretch // ((bottom - top) * 100))
    # Enlarged from pixels whose edges are those of the outline, so that it has this height.
    ink = ink.resize((width, height), Image.Resampling.BILINEAR, (left, top, right, bottom))
    return np.asarray(ink) > _INK


def _inside(shape: np.ndarray) -> Image.Image:
    """Returns a shape without its border, as an image of 0 and 255."""
    height, width = shape.shape
    padded = Image.fromarray(np.pad(shape, _BORDER).astype(np.uint8) * 255)
    smaller = padded.filter(ImageFilter.MinFilter(2 * _BORDER + 1))
    return smaller.crop((_BORDER, _BORDER, _BORDER + width, _BORDER + height))


def _place(
    owner: np.ndarray,
    shapes: Sequence[tuple[int, int, np.ndarray]],
    shape: np.ndarray,
    rng: np.random.RandomState,
) -> tuple[tuple[int, int], float]:
    """Finds a place that covers little of the digits that are there.

    Returns:
      Top and left of the first such place, or of the best that was tried; and the smallest share
      that is left to see of any other digit.
    """
    count = len(shapes)
    sizes = np.array([np.count_nonzero(other) for _, _, other in shapes], np.int64)
    visible = np.bincount(owner.ravel() + 1, minlength=count + 1)[1:]
    best, where = -1.0, (0, 0)
    for _ in range(_TRIES):
        top = rng.randint(SIDE - shape.shape[0] + 1)
        left = rng.randint(SIDE - shape.shape[1] + 1)
        below = owner[top : top + shape.shape[0], left : left + shape.shape[1]][shape]
        covered = np.bincount(below + 1, minlength=count + 1)[1:]
        least = ((visible - covered) / sizes).min(initial=1.0)
        if least > best:
            best, where = least, (top, left)
        if least >= _LEAST_SHOWN:
            break
    return where, best


def _boxes(
    shapes: Sequence[tuple[int, int, np.ndarray]], labels: np.ndarray, owner: np.ndarray
) -> Boxes:
    corners = []
    for top, left, shape in shapes:
        x0, y0, x1, y1 = _extent(shape)
        corners.append((left + x0, top + y0, left + x1, top + y1))
    count = len(shapes)
    return Boxes(
        np.array(corners, np.float32),
        labels,
        np.zeros(count, bool),
        np.zeros(count, bool),
        np.array([np.count_nonzero(owner == number) for number in range(count)], np.float32),
    )


def _extent(shape: np.ndarray) -> tuple[int, int, int, int]:
    """Returns the box around the pixels of a bool array that are True."""
    rows, columns = (np.flatnonzero(shape.any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
