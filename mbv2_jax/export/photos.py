"""The photos with which files are calibrated and checked, as a program takes them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mbv2_jax import command_line, inference
from mbv2_jax.data.decoding import ImageLike
from mbv2_jax.errors import UserError
from mbv2_jax.export.program import NORMALISED, Program

_CONFIG = "config:"
_OF_CONFIG = 100  # photos of a config's data
_SYNTHETIC = 4  # pictures, where no photos are given


def load(program: Program, paths: Sequence[str], flag: str) -> np.ndarray:
    """Returns photos as images for a program, (M, H, W, 3) of its dtype.

    Args:
      program: decides the size and the normalisation.
      paths: image files, and folders of them; "config:NAME" stands for a hundred photos of the
        training split of a config, at equal distances.
      flag: the flag that named them, for messages.

    Raises:
      UserError: there are none, or one cannot be read.
    """
    images = [image for path in paths for image in _images(path)]
    if not images:
        raise UserError(f"{flag}={' '.join(paths)}: there are no images")
    return _as_input(program, [program.prepare(image) for image in images])


def _images(path: str) -> Sequence[ImageLike]:
    """Returns the images that a path stands for."""
    if not path.startswith(_CONFIG):
        return inference.list_images(path)
    from mbv2_jax.training import config, splits  # here, since few exports need them

    given = config.without_groups(command_line.load_config(path.removeprefix(_CONFIG)))
    source = splits.open_training(config.read(given))
    places = np.linspace(0, len(source) - 1, min(_OF_CONFIG, len(source))).astype(int)
    return [source[place].image for place in places.tolist()]


def synthetic(program: Program) -> np.ndarray:
    """Returns smooth random pictures for a program, where a user gives no photos."""
    generator = np.random.default_rng(0)
    height, width = program.size
    coarse = generator.integers(0, 256, (_SYNTHETIC, 7, 7, 3), dtype=np.uint8)
    pictures = [
        np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
        for pixels in coarse
    ]
    return _as_input(program, pictures)


def _as_input(program: Program, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Returns (H, W, 3) uint8 pictures as a batch of a program's images."""
    pixels = np.stack(pictures)
    if program.input == NORMALISED:
        return np.asarray(program.saved.spec.preprocessing.normalize(pixels))
    return pixels.astype(program.dtype)
