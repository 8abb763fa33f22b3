"""Encoded bytes -> an upright RGB image."""

import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mbv2_jax.errors import UserError

_UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(encoded: bytes) -> Image.Image:
    """Decodes an image file to RGB as OpenCV's `IMREAD_COLOR`, which mmpretrain uses, does.

    EXIF orientation is applied, transparency is dropped (not blended), 16-bit samples keep their
    high byte, and of several frames the first is taken.

    Args:
      encoded: the bytes of an image file that Pillow reads (JPEG, PNG, WebP, BMP, TIFF, ...).

    Returns:
      The upright image, mode "RGB", 8 bits a channel.

    Raises:
      UserError: the bytes are no image, are cut short, or hold a kind of pixel (floating point,
        32-bit integer) that has no one right 8-bit form.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return upright_rgb(image)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"cannot decode the image ({len(encoded)} bytes): not the bytes of an image file"
        ) from error
    # Pillow raises OSError for most damaged files, and many other types from its file plugins.
    except Exception as error:
        raise UserError(f"cannot decode the image ({len(encoded)} bytes): {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Returns an opened image with the pixels that `decode` gives for its file.

    Raises:
      UserError: it holds a kind of pixel that has no one right 8-bit form.
    """
    image.load()
    orientation = _orientation(image)
    rgb = _to_rgb(image)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    # What stands in a damaged EXIF block decides which type is raised; the pixels are sound.
    except Exception:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow's own conversion clips at 255 instead of scaling 0..65535.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UserError(
            f"cannot decode the image: {image.format} with pixels of mode {image.mode}"
            " has no fixed range; save it with 8 or 16 bits a channel"
        )
    # Without this Pillow would warn about a transparency that the conversion drops anyway.
    image.info.pop("transparency", None)
    return image.convert("RGB")
