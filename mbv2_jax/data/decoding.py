"""Decoding of image files, and of images in other forms, to upright RGB images or to crops of them.

For a crop of a JPEG file, only the rows down to the crop's lower edge are decoded.
"""

import io
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mbv2_jax.data import fast_decoding, jpeg
from mbv2_jax.data.transforms.geometry import Box, Size, crop_and_resize_image
from mbv2_jax.errors import UnreadableImage, UserError, first_line

ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# An opened image reads its file on first use, which two threads may not do at the same time; and a
# list can hold the same image twice.
_OPENED = threading.Lock()

_UPRIGHT = {  # EXIF orientation -> the operation that turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # the orientations of which the sides change places


def open_image(image: ImageLike) -> Image.Image:
    """Returns an image upright and in RGB, whatever it was given as.

    Args:
      image: a path, an encoded file's bytes, a PIL image, or (H, W, 3) uint8 RGB pixels.

    Raises:
      UserError: it cannot be read or decoded, or is none of these.
    """
    if isinstance(image, str | os.PathLike):
        try:
            return decode(pathlib.Path(image).read_bytes())
        except OSError as error:
            raise UserError(f"{image}: {error.strerror}") from None
        except UserError as error:
            raise UserError(f"{image}: {error}") from None
    if isinstance(image, bytes):
        return decode(image)
    if isinstance(image, Image.Image):
        try:
            with _OPENED:
                return upright_rgb(image)
        except OSError as error:  # the file of an opened image is read only now
            raise UserError(f"cannot decode the image: {error}") from None
    if not hasattr(image, "__array__"):  # which numpy's and jax's arrays have
        raise UserError(
            f"an image is a {type(image).__name__}: give a path, bytes, a PIL image or an array"
        )
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size or pixels.dtype != np.uint8:
        raise UserError(
            f"an image is {pixels.dtype} {pixels.shape}: give uint8 (H, W, 3), or a path; several"
            " as a list"
        )
    return Image.fromarray(pixels)


def decode(encoded: bytes) -> Image.Image:
    """Decodes an image file to RGB as OpenCV's `IMREAD_COLOR` does, which mmpretrain uses.

    EXIF orientation is applied, transparency is dropped (not blended), 16-bit samples keep their
    high byte, and the first of several frames is taken.

    Args:
      encoded: the bytes of an image file that Pillow reads (JPEG, PNG, WebP, BMP, TIFF, ...).

    Returns:
      The upright image, mode "RGB", 8 bits a channel.

    Raises:
      UnreadableImage: the bytes are not an image, are cut short, or hold a kind of pixel (floating
        point, 32-bit integer) that has no definite 8-bit form.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return upright_rgb(image)
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"cannot decode the image ({len(encoded)} bytes): not the bytes of an image file"
        ) from error
    # Pillow raises OSError for most damaged files, and many other types from its file plugins.
    except Exception as error:
        raise UnreadableImage(
            f"cannot decode the image ({len(encoded)} bytes): {first_line(error)}"
        ) from error


class DecodedCrop(NamedTuple):
    """A resized crop of an image file, and its box in the image.

    Attributes:
      image: the resized crop, mode "RGB".
      box: the crop's left, top, width and height in the upright image, in pixels.
      image_size: (width, height) of the upright image, in pixels.
    """

    image: Image.Image
    box: Box
    image_size: tuple[int, int]


def resized_crop(
    encoded: bytes,
    choose: Callable[[int, int], Box],
    size: Size,
    interpolation: str = "bilinear",
    decode_as: str = "exact",
) -> DecodedCrop:
    """Crops an encoded image and resizes the crop, decoding no more than the crop needs.

    Args:
      encoded: the bytes of an image file.
      choose: returns the crop's box for the upright image's width and height in pixels.
      size: (height, width) of the result in pixels.
      interpolation: a key of INTERPOLATIONS.
      decode_as: "exact" gives the pixels of `decode`, Image.crop and Image.resize; "fast" gives
        those of fast_decoding, if the file is a JPEG that it can read.

    Raises:
      UnreadableImage: as `decode` does. Damage below the crop goes unnoticed, unless the file is
        cut short.
    """
    frame = _upright_frame(encoded)
    if frame is None:
        image = decode(encoded)
        box = choose(*image.size)
        crop = crop_and_resize_image(image, box, size, interpolation)
        return DecodedCrop(crop, box, image.size)
    box = choose(frame.width, frame.height)
    rows = jpeg.first_rows(encoded, frame, box[1] + box[3])
    fast = None
    if decode_as == "fast" and frame.components != 4:
        fast = fast_decoding.resized_crop(rows, frame.width, box, size, interpolation)
    crop = fast or crop_and_resize_image(decode(rows), box, size, interpolation)
    return DecodedCrop(crop, box, (frame.width, frame.height))


def _upright_frame(encoded: bytes) -> jpeg.Frame | None:
    """Returns the frame of a JPEG file whose first rows are those of the upright image.

    Any other file has to be decoded whole; for these it returns None.
    """
    frame = jpeg.read_frame(encoded)
    if frame is None or not frame.has_metadata:
        return frame
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return None if _orientation(image) in _UPRIGHT else frame
    except Exception:  # `decode` will report the fault
        return None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Returns an opened image with the pixels that `decode` gives for its file.

    Raises:
      UnreadableImage: it holds a kind of pixel that has no definite 8-bit form.
    """
    image.load()
    orientation = _orientation(image)
    rgb = _to_rgb(image)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns the width and height that `upright_rgb` gives an opened image, without decoding."""
    width, height = image.size
    return (height, width) if _orientation(image) in _TURNED else (width, height)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    # A damaged EXIF block raises any of several types; the pixels are sound.
    except Exception:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow's own conversion clips at 255 instead of scaling from 0..65535.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImage(
            f"cannot decode the image: {image.format} with pixels of mode {image.mode}"
            " has no fixed range; save it with 8 or 16 bits a channel"
        )
    # Otherwise Pillow would warn about a transparency that the conversion drops anyway.
    image.info.pop("transparency", None)
    return image.convert("RGB")
