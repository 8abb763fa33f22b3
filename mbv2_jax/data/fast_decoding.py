"""JPEG file -> resized crop, in three quarters of Pillow's time and nearly with its pixels.

They are a level or two from Pillow's (bicubic: three). A photo of which the crop is four times as
large as what comes out, or more, is decoded at a half, a quarter or an eighth of its size: then
they are within two levels on average, and single ones at edges up to some 30 away.

simplejpeg (libjpeg-turbo) decodes. cykooz.resizer (Rust's fast_image_resize) resizes with Pillow's
filter and antialiasing, in SIMD instructions with 16-bit coefficients. Both are of the extra
`fast`; nothing else needs them.
"""

import importlib.util
import math
import threading

import numpy as np
from PIL import Image

from mbv2_jax.data.transforms.operation import Box
from mbv2_jax.errors import UserError

# A photo is decoded at a smaller size only where the crop then still is this many times larger than
# what comes out: the resizing filter, not the decoder, is to decide what is seen.
_LEFT_TO_RESIZE = 2

_local = threading.local()  # a resizer holds buffers that two threads must not share


def require() -> None:
    """Raises UserError if the libraries are not installed."""
    for module, package in (("simplejpeg", "simplejpeg"), ("cykooz_resizer", "cykooz.resizer")):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"data.train_decode is 'fast', which needs {package}; run: pip install simplejpeg"
                " cykooz.resizer (the package's extra 'fast' has them)"
            )


def resized_crop(
    encoded: bytes, width: int, box: Box, size: int, interpolation: str
) -> Image.Image | None:
    """Decodes a JPEG file, grey or colour, and resizes a box of it.

    Args:
      encoded: the file.
      width: of the image, in pixels.
      box: what to take of it.
      size: side of the square that comes out, in pixels.
      interpolation: "bilinear" or "bicubic".

    Returns:
      The square, mode "RGB"; None if simplejpeg cannot decode the file: it is damaged, or its
      colours are subsampled in a way that TurboJPEG has no name for.
    """
    import simplejpeg

    shrink = _shrink(box, size)
    try:
        # Not strict: as with Pillow, what libjpeg only warns of is no error.
        pixels = simplejpeg.decode_jpeg(
            encoded, "RGB", min_width=-(-width // shrink), min_factor=shrink, strict=False
        )
    except ValueError:
        return None
    return _resize(pixels, tuple(edge / shrink for edge in box), size, interpolation)


def _shrink(box: Box, size: int) -> int:
    """Returns by how much the decoder may shrink the image: 1, 2, 4 or 8."""
    room = min(box[2:]) / (size * _LEFT_TO_RESIZE)
    return max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor <= room)


def _resize(
    pixels: np.ndarray, box: tuple[float, ...], size: int, interpolation: str
) -> Image.Image:
    """Returns a box of (H, W, 3) pixels, whose edges may lie inside a pixel, as a square."""
    import cykooz_resizer as resizer

    left, top, width, height = box
    x, y = int(left), int(top)
    part = pixels[y : math.ceil(top + height), x : math.ceil(left + width)]
    if not hasattr(_local, "resizer"):
        _local.resizer = resizer.Resizer()
    filters = {
        "bilinear": resizer.FilterType.bilinear,
        "bicubic": resizer.FilterType.catmull_rom,
    }
    options = resizer.ResizeOptions()
    options.resize_alg = resizer.ResizeAlg.convolution(filters[interpolation])
    options.crop_box = resizer.CropBox(left - x, top - y, width, height)
    kind = resizer.PixelType.U8x3
    result = resizer.ImageData(size, size, kind)
    _local.resizer.resize(
        resizer.ImageData(part.shape[1], part.shape[0], kind, part.tobytes()), result, options
    )
    return Image.frombytes("RGB", (size, size), result.get_buffer())
