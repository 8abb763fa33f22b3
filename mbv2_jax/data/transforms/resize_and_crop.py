"""mmpretrain's resizes, crops and flip, and mmsegmentation's choice of crops.

For the same crop box the pixels are equal, bit for bit, to those of
mmpretrain/datasets/transforms/processing.py and mmcv/transforms/processing.py with
`backend='pillow'`.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from mbv2_jax.data.sample import IGNORED, Sample
from mbv2_jax.data.transforms import geometry
from mbv2_jax.data.transforms.geometry import Box, Size
from mbv2_jax.data.transforms.operation import (
    ResizedCrop,
    check_count,
    check_interpolation,
    check_range,
    check_share,
    check_side,
    check_size,
    height_width,
)
from mbv2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(ResizedCrop):
    """Takes a crop of random area and aspect ratio, and resizes it.

    As in mmpretrain and torchvision, area and ratio are drawn up to `max_attempts` times until the
    box fits; then the central crop is taken, with the ratio clamped to the range.

    Attributes:
      size: of the output in pixels: the side of a square, or (height, width).
      crop_ratio_range: of the crop's area, as shares of the image's.
      aspect_ratio_range: of the crop, width / height; its logarithm is uniform.
      max_attempts: number of attempts to find a box.
      interpolation: "bilinear" or "bicubic".
    """

    size: int | Size
    crop_ratio_range: tuple[float, float] = (0.08, 1.0)
    aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3)
    max_attempts: int = 10
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_size("size", self.size)
        check_range("crop_ratio_range", self.crop_ratio_range)
        check_range("aspect_ratio_range", self.aspect_ratio_range)
        check_count("max_attempts", self.max_attempts)
        check_interpolation(self.interpolation)

    def box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        low, high = self.aspect_ratio_range
        for _ in range(self.max_attempts):
            area = rng.uniform(*self.crop_ratio_range) * (width * height)
            ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
            crop_width = round(math.sqrt(area * ratio))
            crop_height = round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(rng.integers(0, height - crop_height + 1))
                left = int(rng.integers(0, width - crop_width + 1))
                return left, top, crop_width, crop_height
        crop_width, crop_height = width, height
        if width / height < low:
            crop_height = round(width / low)
        elif width / height > high:
            crop_width = round(height * high)
        return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Flips the image horizontally with probability `prob`."""

    random: ClassVar[bool] = True
    prob: float = 0.5

    def __post_init__(self) -> None:
        check_share("prob", self.prob)

    def output_size(self, size: Size | None) -> Size | None:
        return size

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return geometry.flip(sample) if rng.random() < self.prob else sample


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Takes a crop at a random place, after padding the image with black pixels.

    Attributes:
      crop_size: in pixels: the side of a square, or (height, width).
      padding: number of black pixels on each side of the image.
      cat_max_ratio: for samples with a mask: a crop is drawn again, up to ten times, if it shows
        one class only, or if a class has this share of its counted pixels or more (mmseg's
        RandomCrop); 1.0 takes the first.
    """

    random: ClassVar[bool] = True
    crop_size: int | Size
    padding: int = 0
    cat_max_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_size("crop_size", self.crop_size)
        check_count("padding", self.padding)
        check_share("cat_max_ratio", self.cat_max_ratio)

    def output_size(self, size: Size | None) -> Size | None:
        del size
        return height_width(self.crop_size)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        crop_height, crop_width = height_width(self.crop_size)
        width, height = (side + 2 * self.padding for side in sample.image.size)
        if width < crop_width or height < crop_height:
            raise UserError(
                f"random_crop({self.crop_size}, padding={self.padding}) needs a larger image than "
                f"{sample.image.width} x {sample.image.height}; put resize_edge(...) or pad(...) "
                "before it, or give more padding"
            )

        def draw() -> Box:
            top = int(rng.integers(0, height - crop_height + 1)) - self.padding
            left = int(rng.integers(0, width - crop_width + 1)) - self.padding
            return left, top, crop_width, crop_height

        box = draw()
        if self.cat_max_ratio < 1:
            for _ in range(10):
                if not self._is_dominated(sample, box):
                    break
                box = draw()
        return geometry.crop(sample, box)

    def _is_dominated(self, sample: Sample, box: Box) -> bool:
        """Returns whether too much of a crop of any mask is of one class."""
        for mask in geometry.crop_targets(geometry.masks(sample.targets), box).values():
            counted = np.array(mask.histogram())[:IGNORED]
            if np.count_nonzero(counted) < 2 or counted.max() / counted.sum() >= self.cat_max_ratio:
                return True
        return False


@dataclasses.dataclass(frozen=True)
class ResizeEdge:
    """Resizes the short side to `scale` and the long side in proportion, truncated to an integer.

    Attributes:
      scale: the short side in pixels.
      interpolation: "bilinear" or "bicubic".
    """

    random: ClassVar[bool] = False
    scale: int
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_side("scale", self.scale)
        check_interpolation(self.interpolation)

    def output_size(self, size: Size | None) -> Size | None:
        return None if size is None else self._resized(*size)

    def _resized(self, height: int, width: int) -> Size:
        if width < height:
            return int(self.scale * height / width), self.scale
        return self.scale, int(self.scale * width / height)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        del rng
        size = self._resized(sample.image.height, sample.image.width)
        return geometry.resize(sample, size, self.interpolation)


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Takes the central crop; its offset is rounded as Python rounds, halves to the even number.

    Attributes:
      crop_size: in pixels: the side of a square, or (height, width).
    """

    random: ClassVar[bool] = False
    crop_size: int | Size

    def __post_init__(self) -> None:
        check_size("crop_size", self.crop_size)

    def output_size(self, size: Size | None) -> Size | None:
        del size
        return height_width(self.crop_size)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        del rng
        crop_height, crop_width = height_width(self.crop_size)
        width, height = sample.image.size
        # mmcv would return a smaller crop, which does not fit into a batch.
        if width < crop_width or height < crop_height:
            raise UserError(
                f"center_crop({self.crop_size}) needs a larger image than {width} x {height}; put "
                "resize_edge(...) before it"
            )
        left, top = round((width - crop_width) / 2), round((height - crop_height) / 2)
        return geometry.crop(sample, (left, top, crop_width, crop_height))


@dataclasses.dataclass(frozen=True)
class Resize:
    """Resizes both sides, without keeping the aspect ratio.

    Attributes:
      scale: of the output in pixels: the side of a square, or (height, width).
      interpolation: "bilinear" or "bicubic".
    """

    random: ClassVar[bool] = False
    scale: int | Size
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_size("scale", self.scale)
        check_interpolation(self.interpolation)

    def output_size(self, size: Size | None) -> Size | None:
        del size
        return height_width(self.scale)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        del rng
        return geometry.resize(sample, height_width(self.scale), self.interpolation)
