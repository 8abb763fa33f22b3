"""SSD's random changes of size and place for pictures with boxes (Liu et al. 2016, section 2.2).

Given the same draws, boxes and pixels are those of mmdetection's Expand and MinIoURandomCrop
(mmdet/datasets/transforms/transforms.py). Its recipe for SSDLite is

    expand()|min_iou_crop()|resize(size)|random_flip()|ssd_distortion()

Masks move with the pixels.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mbv2_jax.data.sample import Boxes, Sample
from mbv2_jax.data.transforms import geometry
from mbv2_jax.data.transforms.geometry import Box, Colour, Size
from mbv2_jax.data.transforms.operation import (
    check_colour,
    check_count,
    check_range,
    check_share,
    is_number,
)
from mbv2_jax.errors import UserError

# ImageNet's mean (123.675, 116.28, 103.53), cut to whole numbers as mmdetection does.
IMAGENET_MEAN: Colour = (123, 116, 103)

_LARGEST_ASPECT = 2.0  # of a crop: the longer side over the shorter one
_EPSILON = np.float32(1e-6)  # the least area that an overlap is divided by


@dataclasses.dataclass(frozen=True)
class Expand:
    """Places the picture at random on a larger canvas, so that its objects become smaller.

    Attributes:
      low, high: the smallest and the largest factor of both sides.
      probability: of doing so.
      fill: R, G and B of the canvas, from 0 to 255.
    """

    random: ClassVar[bool] = True
    low: float = 1.0
    high: float = 4.0
    probability: float = 0.5
    fill: Colour = IMAGENET_MEAN

    def __post_init__(self) -> None:
        check_range("(low, high)", (self.low, self.high))
        if self.low < 1:
            raise UserError(f"low={self.low!r} must be 1 or more: the canvas holds the picture")
        check_share("probability", self.probability)
        check_colour("fill", self.fill)

    def output_size(self, size: Size | None) -> Size | None:
        del size
        return None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() > self.probability:
            return sample
        ratio = rng.uniform(self.low, self.high)
        width, height = sample.image.size
        left = int(rng.uniform(0, width * ratio - width))
        top = int(rng.uniform(0, height * ratio - height))
        canvas = (-left, -top, int(width * ratio), int(height * ratio))
        return geometry.crop(sample, canvas, self.fill)


@dataclasses.dataclass(frozen=True)
class MinIouCrop:
    """Takes a random crop that all objects overlap by a random amount.

    The least IoU of the crop with every box is drawn for each picture: one of `min_ious`, or 0, or
    no crop at all, all as likely. Crops are drawn up to `attempts` times until one fulfils it and
    holds the centre of a box; then all is drawn again. The boxes whose centres are inside stay, and
    are clipped. A picture without boxes takes the first crop.

    Attributes:
      min_ious: the values to choose from.
      smallest: the shortest sides of a crop, as a share of the picture's.
      attempts: number of crops to draw.
    """

    random: ClassVar[bool] = True
    min_ious: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    smallest: float = 0.3
    attempts: int = 50

    def __post_init__(self) -> None:
        values = self.min_ious
        if not isinstance(values, Sequence) or not all(is_number(v) and 0 <= v < 1 for v in values):
            raise UserError(f"min_ious={values!r} must be numbers from 0 to below 1")
        check_share("smallest", self.smallest)
        check_count("attempts", self.attempts, lowest=1)

    def output_size(self, size: Size | None) -> Size | None:
        del size
        return None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        found = [value for value in sample.targets.values() if isinstance(value, Boxes)]
        corners = np.concatenate([np.zeros((0, 4), np.float32), *(b.corners for b in found)])
        choices = (None, *self.min_ious, 0.0)
        width, height = sample.image.size
        while True:
            least = choices[int(rng.integers(len(choices)))]
            if least is None:
                return sample
            for _ in range(self.attempts):
                box = self._draw(width, height, rng)
                if box is not None and _is_enough(corners, box, least):
                    return geometry.crop(_with_centre_in(sample, box), box)

    def _draw(self, width: int, height: int, rng: np.random.Generator) -> Box | None:
        """Returns a crop; None if it is too long or holds no pixel."""
        across = rng.uniform(self.smallest * width, width)
        down = rng.uniform(self.smallest * height, height)
        if not 1 / _LARGEST_ASPECT <= down / across <= _LARGEST_ASPECT:
            return None
        # From the last place to 1, not to 0: mmdetection leaves `low` to numpy, as `high`.
        left, top = (_between(free, 1.0, rng) for free in (width - across, height - down))
        right, bottom = int(left + across), int(top + down)
        if right == int(left) or bottom == int(top):
            return None
        return int(left), int(top), right - int(left), bottom - int(top)


def _between(start: float, stop: float, rng: np.random.Generator) -> float:
    """Returns a random number between two, of which either may be the larger."""
    return start + (stop - start) * rng.random()


def _is_enough(corners: np.ndarray, box: Box, least: float) -> bool:
    """Returns whether a crop overlaps all boxes by an IoU of `least`, and holds a centre."""
    if not len(corners):
        return True
    return bool(_ious(corners, box).min() >= least and _has_centre(corners, box).any())


def _ious(corners: np.ndarray, box: Box) -> np.ndarray:
    """Returns the IoU of each of the boxes with a crop, (N,) float32."""
    left, top, width, height = box
    start, stop = np.array([left, top], np.float32), np.array([left + width, top + height], "f4")
    low, high = np.maximum(corners[:, :2], start), np.minimum(corners[:, 2:], stop)
    shared = (high - low).clip(0).prod(1)
    areas = (corners[:, 2:] - corners[:, :2]).prod(1)
    return shared / np.maximum(np.float32(width * height) + areas - shared, _EPSILON)


def _has_centre(corners: np.ndarray, box: Box) -> np.ndarray:
    """Returns whether each of the boxes has its centre inside a crop, (N,) bool."""
    left, top, width, height = box
    x, y = ((corners[:, :2] + corners[:, 2:]) / 2).T
    return (x > left) & (y > top) & (x < left + width) & (y < top + height)


def _with_centre_in(sample: Sample, box: Box) -> Sample:
    """Returns the sample with those of its boxes whose centres are inside a crop."""
    targets = {
        name: value.take(_has_centre(value.corners, box)) if isinstance(value, Boxes) else value
        for name, value in sample.targets.items()
    }
    return dataclasses.replace(sample, targets=targets)
