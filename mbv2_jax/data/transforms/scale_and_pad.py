"""Operations that fit a picture into a fixed size without distorting it: scales and padding.

The sides of a scaled picture are rounded as mmcv's: half a pixel up. For training,

    random_scale(0.5, 2.0, step=0.25)|pad(size)|random_crop(size)|random_flip()

is the recipe of TensorFlow's deeplab; `fit(size)|pad(size)` shows pictures of any size whole.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from mbv2_jax.data.sample import Sample
from mbv2_jax.data.transforms import geometry
from mbv2_jax.data.transforms.geometry import Colour, Size
from mbv2_jax.data.transforms.operation import (
    check_colour,
    check_interpolation,
    check_range,
    check_size,
    height_width,
    is_number,
)
from mbv2_jax.errors import UserError

MEAN_PIXEL: Colour = (128, 128, 128)  # 127.5 rounded: 0 for a network of TensorFlow's


@dataclasses.dataclass(frozen=True)
class RandomScale:
    """Resizes both sides by a random factor.

    Attributes:
      low, high: the smallest and the largest factor.
      step: between two factors, all of which are as likely (TensorFlow's deeplab); 0 draws any
        number between `low` and `high` (mmcv's RandomResize).
      interpolation: "bilinear" or "bicubic".
    """

    random: ClassVar[bool] = True
    low: float
    high: float
    step: float = 0.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_range("(low, high)", (self.low, self.high))
        if not is_number(self.step) or not 0 <= self.step < float("inf"):
            raise UserError(f"step={self.step!r} must be a number, 0 or more")
        check_interpolation(self.interpolation)

    def output_size(self, size: Size | None) -> Size | None:
        del size
        return None

    def _factor(self, rng: np.random.Generator) -> float:
        if not self.step:
            return rng.random() * (self.high - self.low) + self.low
        # Not truncated: 0.7 / 0.1 is just below 7.
        count = int((self.high - self.low) / self.step + 1e-6) + 1
        return self.low + self.step * int(rng.integers(count))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return _scaled(sample, self._factor(rng), self.interpolation)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Shrinks a picture that is larger than a size to the largest that fits inside it.

    Both sides shrink by the same factor; a picture that fits stays as it is.

    Attributes:
      size: in pixels: the side of a square, or (height, width).
      interpolation: "bilinear" or "bicubic".
    """

    random: ClassVar[bool] = False
    size: int | Size
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_size("size", self.size)
        check_interpolation(self.interpolation)

    def output_size(self, size: Size | None) -> Size | None:
        return None if size is None else _scaled_size(size, self._factor(size))

    def _factor(self, size: Size) -> float:
        height, width = height_width(self.size)
        return min(1.0, height / size[0], width / size[1])

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        del rng
        factor = self._factor((sample.image.height, sample.image.width))
        return _scaled(sample, factor, self.interpolation)


@dataclasses.dataclass(frozen=True)
class Pad:
    """Pads a picture on its right and below to at least a size; masks get 255 there.

    A side that is longer stays as it is. A pipeline that ends with this operation refuses such a
    picture: `fit` before it shrinks it, and `random_crop` after it takes a part.

    Attributes:
      size: in pixels: the side of a square, or (height, width).
      fill: R, G and B of the padding, from 0 to 255.
    """

    random: ClassVar[bool] = False
    size: int | Size
    fill: Colour = MEAN_PIXEL

    def __post_init__(self) -> None:
        check_size("size", self.size)
        check_colour("fill", self.fill)

    def output_size(self, size: Size | None) -> Size | None:
        """Returns the size for an input that is not larger, since `Transform` refuses others."""
        height, width = height_width(self.size)
        return (height, width) if size is None else (max(height, size[0]), max(width, size[1]))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        del rng
        height, width = height_width(self.size)
        across, down = sample.image.size
        if across >= width and down >= height:
            return sample
        right, below = max(0, width - across), max(0, height - down)
        return geometry.pad(sample, 0, 0, right, below, self.fill)


def _scaled(sample: Sample, factor: float, interpolation: str) -> Sample:
    size = (sample.image.height, sample.image.width)
    scaled = _scaled_size(size, factor)
    return sample if scaled == size else geometry.resize(sample, scaled, interpolation)


def _scaled_size(size: Size, factor: float) -> Size:
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width
