"""The work that all ways of a benchmark do: the same batch, with the same hyperparameters."""

import dataclasses

import numpy as np

from mbv2_jax.spec import Preprocessing

CLASSES = 1000
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 4e-5


@dataclasses.dataclass(frozen=True)
class Batch:
    """The images of a step and their labels, the same for all ways.

    Attributes:
      batch: the number of images.
      image_size: the side of the square images, in pixels.
    """

    batch: int
    image_size: int

    def pixels(self) -> np.ndarray:
        """Returns the images as they come from a file: (N, S, S, 3) uint8."""
        shape = (self.batch, self.image_size, self.image_size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def images(self) -> np.ndarray:
        """Returns the normalised images: (N, S, S, 3) float32."""
        imagenet = Preprocessing()
        mean, std = np.asarray(imagenet.mean, np.float32), np.asarray(imagenet.std, np.float32)
        return (self.pixels().astype(np.float32) - mean) / std

    def labels(self) -> np.ndarray:
        """Returns the labels: (N,) int32."""
        return np.arange(self.batch, dtype=np.int32) * 7 % CLASSES
