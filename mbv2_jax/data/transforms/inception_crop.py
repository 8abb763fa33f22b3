"""TensorFlow's random crop, as its recipes for ImageNet use it."""

import dataclasses
import math

import numpy as np

from mbv2_jax.data.transforms.geometry import Box, Size
from mbv2_jax.data.transforms.operation import (
    ResizedCrop,
    check_count,
    check_interpolation,
    check_range,
    check_share,
    check_size,
    is_number,
)
from mbv2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class InceptionCrop(ResizedCrop):
    """Takes a crop of random aspect ratio and height, and resizes it.

    The boxes are those of `tf.image.sample_distorted_bounding_box` with the whole image as the
    object. The defaults are TF Model Garden's (official/vision/ops/preprocess_ops.py,
    random_crop_image, and dataloaders/classification_input.py). TF-slim's
    (inception_preprocessing.py, without its colours) are

        inception_crop(size, (0.05, 1.0), (0.75, 1.33), 100, 0.1, None)

    It differs from `random_resized_crop`: the ratio is uniform instead of its logarithm. Instead of
    the area, the height is uniform between the lowest and the highest that area and image allow,
    which makes small crops rarer. The resize is Pillow's, which is antialiased; the
    `tf.image.resize` of these recipes is not, and aliases when it shrinks large crops.

    Attributes:
      size: of the output in pixels: the side of a square, or (height, width).
      area_range: of the crop, as shares of the image's area.
      aspect_ratio_range: of the crop, width / height.
      max_attempts: number of attempts to find a box; if none fits, the box is the whole image.
      min_object_covered: a box with a smaller share of the image is drawn again. In effect
        TF-slim's crops have 0.1 of the image or more, not 0.05.
      center_crop_fraction: a crop of the whole image is replaced by the central square with this
        share of the short side (Model Garden); None keeps the whole image (TF-slim).
      interpolation: "bilinear" or "bicubic".
    """

    size: int | Size
    area_range: tuple[float, float] = (0.08, 1.0)
    aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3)
    max_attempts: int = 10
    min_object_covered: float = 0.0
    center_crop_fraction: float | None = 0.875
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_size("size", self.size)
        check_range("area_range", self.area_range, highest=1)
        check_range("aspect_ratio_range", self.aspect_ratio_range)
        check_count("max_attempts", self.max_attempts, lowest=1)
        check_share("min_object_covered", self.min_object_covered)
        fraction = self.center_crop_fraction
        if fraction is not None and not (is_number(fraction) and 0 < fraction <= 1):
            raise UserError(
                f"center_crop_fraction={fraction!r} must be a number above 0, up to 1, or None"
            )
        check_interpolation(self.interpolation)

    def box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        for _ in range(self.max_attempts):
            box = self._attempt(width, height, rng)
            if box is not None and box[2] * box[3] >= self.min_object_covered * width * height:
                break
        else:
            box = 0, 0, width, height
        if box[2:] == (width, height) and self.center_crop_fraction is not None:
            side = self.center_crop_fraction * min(width, height)
            cut = max(int(side), 1)
            return int((width - side) / 2), int((height - side) / 2), cut, cut
        return box

    def _attempt(self, width: int, height: int, rng: np.random.Generator) -> Box | None:
        """Returns one random box, or None if it does not fit the image and the range of areas.

        A port of GenerateRandomCrop in TensorFlow's sample_distorted_bounding_box_op.cc.
        """
        ratio = rng.uniform(*self.aspect_ratio_range)
        smallest, largest = (share * width * height for share in self.area_range)
        lowest = round(math.sqrt(smallest / ratio))
        highest = round(math.sqrt(largest / ratio))
        if round(highest * ratio) > width:
            highest = int((width + 0.5 - 1e-7) / ratio)
            if round(highest * ratio) > width:
                highest -= 1
        highest = min(highest, height)
        lowest = min(lowest, highest)
        crop_height = lowest + int(rng.integers(highest - lowest + 1))
        crop_width = round(crop_height * ratio)
        # Rounding may have left the range of areas; one row more or less may be back in it.
        if crop_width * crop_height < smallest:
            crop_height += 1
            crop_width = round(crop_height * ratio)
        if crop_width * crop_height > largest:
            crop_height -= 1
            crop_width = round(crop_height * ratio)
        if not smallest <= crop_width * crop_height <= largest:
            return None
        if not (0 < crop_width <= width and 0 < crop_height <= height):
            return None
        # TensorFlow's upper bound is exclusive: only a box of full height or width reaches the last
        # row or column.
        top = int(rng.integers(height - crop_height)) if crop_height < height else 0
        left = int(rng.integers(width - crop_width)) if crop_width < width else 0
        return left, top, crop_width, crop_height
