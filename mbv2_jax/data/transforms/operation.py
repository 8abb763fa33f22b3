"""What an operation on an image is; resized crops; checks of operations' arguments."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from mbv2_jax.errors import UserError, nearest

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


Box = tuple[int, int, int, int]  # left, top, width, height, in pixels


class Operation(Protocol):
    """One step of a pipeline."""

    random: ClassVar[bool]

    def output_size(self, size: int | None) -> int | None:
        """Returns the side of the square that comes out where `size` goes in; None = it varies."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image: ...


class ResizedCrop:
    """What operations have in common that resize a random box of the image to a square.

    At the beginning of a pipeline they let the decoder leave out what lies outside the box.
    """

    random: ClassVar[bool] = True
    size: int
    interpolation: str

    def output_size(self, size: int | None) -> int | None:
        del size
        return self.size

    def box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        """Returns the box to take from a `width` x `height` image."""
        raise NotImplementedError

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        box = self.box(image.width, image.height, rng)
        return crop_and_resize(image, box, self.size, self.interpolation)


def crop_and_resize(image: Image.Image, box: Box, size: int, interpolation: str) -> Image.Image:
    """Returns the box of the image, resized to a square of `size` pixels, antialiased."""
    left, top, width, height = box
    # Cropped before, not through `resize(box=...)`: that one's filter would also see the pixels
    # around the box.
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size, size), INTERPOLATIONS[interpolation])


def is_number(value: Any) -> bool:
    """Whether the value is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_side(name: str, value: Any) -> None:
    """Raises UserError unless the value is a number of pixels."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}={value!r} must be a whole number of pixels, 1 or more")


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
    """Raises UserError unless the value is one of INTERPOLATIONS."""
    if value not in list(INTERPOLATIONS):  # what cannot be hashed is unknown too
        raise UserError(f"unknown interpolation {value!r}; {nearest(value, INTERPOLATIONS)}")
