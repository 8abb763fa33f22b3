"""Inputs from which both the peers and ours compute, drawn from seeds."""

import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image

from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from tests.support import train_steps

FOLDER = pathlib.Path(__file__).parent
CLASSES, WIDTH, KERAS_WIDTH = 7, 0.25, 0.35
STEPS = 6  # of training, at the rate of tests/support/train_steps.py

# Of RandAugment's operations; the second takes the bins of torchvision's default.
OPERATIONS_SIZE, BINS = (64, 48), 31
CROP_SIZES = [(300, 200), (201, 333), (256, 256), (257, 411), (640, 271)]
# Left, top, width and height in an image of 500 x 375.
BOXES = [(0, 0, 500, 375), (17, 3, 41, 60), (250, 100, 224, 224), (1, 374, 499, 1)]


def images(height: int = 40, width: int = 56, count: int = 2) -> np.ndarray:
    """Returns float64 images (N, H, W, 3) that are not square."""
    return np.random.default_rng(0).standard_normal((count, height, width, 3))


def variables(width: float, classes: int | None, seed: int = 0) -> dict[str, Any]:
    """Returns {"params", "batch_stats"} as float64 arrays such as a trained network has."""
    network = MobileNetV2(num_classes=classes, width=width)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(network.init, jax.eval_shape(jax.random.key, 0), image)
    generator = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "kernel":  # variance-preserving, so that logits differ from each other
            return np.sqrt(2 / np.prod(leaf.shape[:-1])) * generator.standard_normal(leaf.shape)
        low, high = (0.5, 1.5) if path[-1].key in ("scale", "var") else (-0.5, 0.5)
        return generator.uniform(low, high, leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def training_variables() -> dict[str, Any]:
    """Returns the variables from which training starts."""
    return variables(train_steps.WIDTH, train_steps.CLASSES, seed=1)


def logits(scale: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Returns float64 logits (32, 10) and labels (32,)."""
    generator = np.random.default_rng(0)
    return scale * generator.standard_normal((32, 10)), generator.integers(0, 10, 32)


def photo(width: int, height: int) -> Image.Image:
    """Returns a smooth picture with some noise."""
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + k)) + np.cos(y / (7 + k)) for k in range(3)]
    noisy = np.stack(waves, -1) / 4 + 0.5 + rng.normal(0, 0.02, (height, width, 3))
    return Image.fromarray((np.clip(noisy, 0, 1) * 255).astype(np.uint8))


def magnitude_bins(signed: bool) -> list[tuple[int, int]]:
    """Returns the (bin, sign) pairs at which an operation is applied."""
    return [(index, sign) for index in (0, 3, 17, 30) for sign in ((1, -1) if signed else (1,))]


def sha256(*pixels: np.ndarray | Image.Image) -> str:
    """Returns the hash of the pixels of images, one after another."""
    digest = hashlib.sha256()
    for image in pixels:
        digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()
