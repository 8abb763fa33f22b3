"""The interface of an operation on samples, its base classes, and checks of arguments."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from mbv2_jax.data.sample import Sample
from mbv2_jax.data.transforms import geometry
from mbv2_jax.data.transforms.geometry import INTERPOLATIONS, Box, Size
from mbv2_jax.errors import UserError, nearest


class Operation(Protocol):
    """One step of a pipeline: a frozen dataclass of its arguments.

    Attributes:
      random: whether the result depends on the generator.
    """

    random: ClassVar[bool]

    def output_size(self, size: Size | None) -> Size | None:
        """Returns (height, width) of the output for an input of `size`; None where it varies."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Returns the changed sample; the given one, whose image is decoded, stays as it was."""


class ImageOperation:
    """Base class of operations that change an image's pixels, and neither its size nor targets."""

    random: ClassVar[bool] = True

    def output_size(self, size: Size | None) -> Size | None:
        """Returns `size`, which these operations keep."""
        return size

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Returns the changed "RGB" image; the given one stays as it was."""
        raise NotImplementedError

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Returns the sample with the changed image."""
        return sample.with_image(self.change(sample.image, rng))


class WarpOperation(ImageOperation):
    """Base class of operations that may shear, rotate or translate the image alone.

    They refuse samples with boxes or masks, which would no longer fit the image.

    Attributes:
      name: of the operation in a transform string.
    """

    name: ClassVar[str]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Returns the sample with the changed image.

        Raises:
          UserError: the sample has boxes or a mask.
        """
        spatial = geometry.spatial_targets(sample.targets)
        if spatial:
            raise UserError(
                f"{self.name} shears, rotates and translates the image only, and its "
                f"{' and '.join(spatial)} would no longer fit; color_jitter changes colours only"
            )
        return super().__call__(sample, rng)


class ResizedCrop:
    """Base class of operations that resize a random box of the image to a fixed size.

    If one begins a pipeline, the decoder skips pixels outside the box.

    Attributes:
      size: of the output in pixels: the side of a square, or (height, width).
      interpolation: a key of INTERPOLATIONS.
    """

    random: ClassVar[bool] = True
    size: int | Size
    interpolation: str

    def output_size(self, size: Size | None) -> Size | None:
        """Returns this operation's size, whatever the input's is."""
        del size
        return height_width(self.size)

    def box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        """Returns the box to take from a `width` x `height` image."""
        raise NotImplementedError

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Returns a random box of the sample, resized."""
        box = self.box(sample.image.width, sample.image.height, rng)
        cropped = geometry.crop(sample, box)
        return geometry.resize(cropped, height_width(self.size), self.interpolation)


def height_width(size: int | Sequence[int]) -> Size:
    """Returns (height, width) of a size, which is the side of a square or such a pair."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def is_number(value: Any) -> bool:
    """Returns whether the value is an int or a float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_side(name: str, value: Any) -> None:
    """Raises UserError unless the value is a number of pixels."""
    if not _is_side(value):
        raise UserError(f"{name}={value!r} must be a whole number of pixels, 1 or more")


def check_size(name: str, value: Any) -> None:
    """Raises UserError unless the value is the side of a square in pixels, or (height, width)."""
    is_pair = isinstance(value, Sequence) and len(value) == 2 and all(map(_is_side, value))
    if not is_pair and not _is_side(value):
        raise UserError(
            f"{name}={value!r} must be a whole number of pixels, 1 or more, or two of them: "
            "(height, width)"
        )


def check_count(name: str, value: Any, lowest: int = 0) -> None:
    """Raises UserError unless the value is a whole number, `lowest` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise UserError(f"{name}={value!r} must be a whole number, {lowest} or more")


def check_share(name: str, value: Any) -> None:
    """Raises UserError unless the value is a probability or another number from 0 to 1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise UserError(f"{name}={value!r} must be a number from 0 to 1")


def check_range(name: str, value: Any, highest: float = math.inf) -> None:
    """Raises UserError unless the value is (low, high), both positive, finite, up to `highest`."""
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(map(is_number, value))
        or not 0 < value[0] <= value[1] <= highest
        or math.isinf(value[1])
    ):
        bound = "" if math.isinf(highest) else f" <= {highest:g}"
        raise UserError(f"{name}={value!r} must be (low, high) with 0 < low <= high{bound}")


def check_interpolation(value: Any) -> None:
    """Raises UserError unless the value is a key of INTERPOLATIONS."""
    if value not in list(INTERPOLATIONS):  # a list, since the value may not be hashable
        raise UserError(f"unknown interpolation {value!r}; {nearest(value, INTERPOLATIONS)}")


def check_colour(name: str, value: Any) -> None:
    """Raises UserError unless the value is R, G and B, whole numbers from 0 to 255."""
    is_triple = isinstance(value, Sequence) and len(value) == 3
    if not is_triple or any(level not in range(256) for level in value):
        raise UserError(f"{name}={value!r} must be (R, G, B), whole numbers from 0 to 255")
