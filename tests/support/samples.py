"""Operations and transforms on images that have no targets."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from mbv2_jax.data.sample import Sample
from mbv2_jax.data.transforms.pipeline import Transform

Change = Callable[[Sample, np.random.Generator], Sample]


def change(operation: Change, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Returns an image changed by an operation."""
    return operation(Sample(image, "test"), rng).image


def pixels(transform: Transform, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Returns the pixels that a transform makes of an image, uint8 (H, W, 3)."""
    return transform(Sample(image, "test"), rng).image


def pixels_from(transform: Transform, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
    """Returns the pixels that a transform makes of an image file, uint8 (H, W, 3)."""
    return transform.from_encoded(Sample(encoded, "test"), rng).image
