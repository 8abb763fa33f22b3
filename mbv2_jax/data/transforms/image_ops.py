"""Operations of the augmentation policies on pixels, with Pillow.

Every function takes an "RGB" image of any size and returns a new one of the same mode and size, or
the image itself, unchanged. torchvision and timm call the same functions of Pillow on such images,
so that equal arguments give equal pixels; their tables of arguments are in augment.py and
timm_augment.py beside this file.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mbv2_jax.data.transforms.geometry import BLACK, Colour

NEAREST = Image.Resampling.NEAREST


def _affine(
    image: Image.Image,
    matrix: tuple[float, float, float, float, float, float],
    resample: Image.Resampling,
    fill: Colour,
) -> Image.Image:
    """Returns an image whose pixel (x, y) is the input's at (ax + by + c, dx + ey + f).

    Pixels from outside the input are `fill`.
    """
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def shear_x(
    image: Image.Image,
    slope: float,
    resample: Image.Resampling = NEAREST,
    fill: Colour = BLACK,
) -> Image.Image:
    """Moves each row to the left by `slope` pixels for each row above it."""
    return _affine(image, (1, slope, 0, 0, 1, 0), resample, fill)


def shear_y(
    image: Image.Image,
    slope: float,
    resample: Image.Resampling = NEAREST,
    fill: Colour = BLACK,
) -> Image.Image:
    """Moves each column up by `slope` pixels for each column to its left."""
    return _affine(image, (1, 0, 0, slope, 1, 0), resample, fill)


def translate_x(
    image: Image.Image,
    pixels: float,
    resample: Image.Resampling = NEAREST,
    fill: Colour = BLACK,
) -> Image.Image:
    """Moves the image to the right."""
    return _affine(image, (1, 0, -pixels, 0, 1, 0), resample, fill)


def translate_y(
    image: Image.Image,
    pixels: float,
    resample: Image.Resampling = NEAREST,
    fill: Colour = BLACK,
) -> Image.Image:
    """Moves the image down."""
    return _affine(image, (1, 0, 0, 0, 1, -pixels), resample, fill)


def rotate(
    image: Image.Image,
    degrees: float,
    resample: Image.Resampling = NEAREST,
    fill: Colour = BLACK,
) -> Image.Image:
    """Turns the image around its centre, anticlockwise."""
    return image.rotate(degrees, resample, fillcolor=fill)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Changes the brightness: 0 gives black, 1 changes nothing, more is brighter."""
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Changes the contrast: 0 gives the grey of the image's mean, 1 changes nothing."""
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Changes the saturation, the policies' "Color": 0 gives grey, 1 changes nothing."""
    return ImageEnhance.Color(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Changes the sharpness: 0 smooths, 1 changes nothing, more is sharper."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def hue(image: Image.Image, turn: float) -> Image.Image:
    """Turns the hue; -0.5 and 0.5 are half a turn, to the complementary colours."""
    channel, saturations, values = image.convert("HSV").split()
    shift = int(turn * 255)  # truncated, as torchvision does
    channel = channel.point([(value + shift) % 256 for value in range(256)])
    return Image.merge("HSV", (channel, saturations, values)).convert("RGB")


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the `bits` highest bits of each value, 0 to 8."""
    if bits == 0:
        # Pillow 13 refuses 0 bits. The Pillow for which timm's policy was written gives black.
        return Image.new("RGB", image.size)
    return ImageOps.posterize(image, bits)


def solarize(image: Image.Image, threshold: float) -> Image.Image:
    """Inverts the values from `threshold` up."""
    return ImageOps.solarize(image, threshold)  # type: ignore[arg-type]  # it takes any number


def solarize_add(image: Image.Image, add: int) -> Image.Image:
    """Adds `add` to the values below 128, up to 255."""
    values = np.arange(256)
    return image.point(np.where(values < 128, np.minimum(values + add, 255), values).tolist() * 3)


def autocontrast(image: Image.Image) -> Image.Image:
    """Stretches each channel so that its lowest value becomes 0 and its highest 255."""
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image) -> Image.Image:
    """Equalizes the histogram of each channel, as far as a lookup table of values can."""
    return ImageOps.equalize(image)


def invert(image: Image.Image) -> Image.Image:
    """Replaces every value by 255 minus itself."""
    return ImageOps.invert(image)
