"""Masks of classes as files: a number for each pixel, in grey or palette PNGs."""

import io
import pathlib

import numpy as np
from PIL import Image

from mbv2_jax.data.sample import IGNORED
from mbv2_jax.errors import UnreadableImage, UserError, first_line, listed

_NUMBERS = ("1", "L", "P", "I;16", "I;16B", "I")  # the modes of pixels that are one whole number


def read(path: str) -> Image.Image:
    """Returns the mask in a file, mode "L": each pixel's class.

    Args:
      path: a grey PNG, whose values are the classes, or one with a palette, whose indices are; the
        palette's colours are not looked at.

    Raises:
      UnreadableImage: the file is missing or damaged.
      UserError: it holds colours or numbers above 255. All messages begin with the path.
    """
    try:
        encoded = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(f"cannot read the mask {path}: {error.strerror}") from error
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
    except MemoryError:
        raise
    # Pillow raises OSError for most damaged files, and many other types from its file plugins.
    except Exception as error:
        raise UnreadableImage(f"cannot decode the mask {path}: {first_line(error)}") from error
    if image.mode not in _NUMBERS or image.format == "JPEG":
        kind = "is a JPEG" if image.format == "JPEG" else f"has pixels of mode {image.mode}"
        raise UserError(
            f"the mask {path} {kind}, and not the number of a class for each pixel: save it as a "
            "grey or palette PNG"
        )
    values = np.asarray(image)
    if values.dtype != np.uint8:
        values = _to_bytes(values, path)
    return Image.fromarray(values // _step(image, encoded))


def check_classes(mask: Image.Image, name: str, count: int) -> None:
    """Raises UserError, which begins with the name, unless a mask's classes are below `count`."""
    odd = [value for value, pixels in enumerate(mask.histogram()) if pixels and value >= count]
    odd = [value for value in odd if value != IGNORED]
    if odd:
        raise UserError(
            f"{name} holds {listed(map(str, odd), separator=', ')}, and there are classes "
            f"0 to {count - 1}; {IGNORED} marks pixels that do not count"
        )


def _to_bytes(values: np.ndarray, path: str) -> np.ndarray:
    """Returns the values of a mask of 1 bit, or of 16, as uint8."""
    if values.min() < 0 or values.max() > IGNORED:
        raise UserError(
            f"the mask {path} holds numbers from {values.min()} to {values.max()}: classes are 0 "
            f"to {IGNORED - 1}, and {IGNORED} marks pixels that do not count"
        )
    return values.astype(np.uint8)


def _step(image: Image.Image, encoded: bytes) -> int:
    """Returns the factor by which Pillow stretched the values of a grey PNG of 2 or 4 bits."""
    if image.format != "PNG" or image.mode != "L":
        return 1
    return {2: 255 // 3, 4: 255 // 15}.get(encoded[24], 1)  # the depth, in the header chunk
