"""What the augmentation policies do to pixels, with Pillow: each operation once.

Every function takes an "RGB" image of any size and returns a new one of the same mode and size (or
the image itself, unchanged). torchvision and timm call the same functions of Pillow on such images,
so that equal arguments give equal pixels; their tables of arguments are in data/augment.py and
data/timm_augment.py.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Colour = tuple[int, int, int]  # R, G, B, 0 to 255

BLACK = (0, 0, 0)
NEAREST = Image.Resampling.NEAREST


def _affine(
    image: Image.Image,
    matrix: tuple[float, float, float, float, float, float],
    resample: Image.Resampling,
    fill: Colour,
) -> Image.Image:
    """Output pixel (x, y) shows the input at (ax + by + c, dx + ey + f); outside it is `fill`."""
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
    """0: black, 1: unchanged, more: brighter."""
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """0: the grey of the image's mean, 1: unchanged, more: more contrast."""
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """0: grey, 1: unchanged, more: more colourful. The policies' "Color"."""
    return ImageEnhance.Color(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """0: smoothed, 1: unchanged, more: sharper."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def hue(image: Image.Image, turn: float) -> Image.Image:
    """Turns the hue; -0.5 and 0.5 are half a turn, the complementary colours."""
    channel, saturations, values = image.convert("HSV").split()
    shift = int(turn * 255)  # truncated, as torchvision's
    channel = channel.point([(value + shift) % 256 for value in range(256)])
    return Image.merge("HSV", (channel, saturations, values)).convert("RGB")


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the `bits` highest bits of each value, 0 to 8."""
    if bits == 0:
        # Pillow 13 refuses this. To the Pillow that timm's policy was written with it is black.
        return Image.new("RGB", image.size)
    return ImageOps.posterize(image, bits)


def solarize(image: Image.Image, threshold: float) -> Image.Image:
    """Inverts the values from `threshold` up."""
    return ImageOps.solarize(image, threshold)  # type: ignore[arg-type]  # any number does


def solarize_add(image: Image.Image, add: int) -> Image.Image:
    """Adds `add` to the values below 128, up to 255."""
    values = np.arange(256)
    return image.point(np.where(values < 128, np.minimum(values + add, 255), values).tolist() * 3)


def autocontrast(image: Image.Image) -> Image.Image:
    """Stretches each channel so that its lowest value becomes 0 and its highest 255."""
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image) -> Image.Image:
    """Gives each channel as even a histogram as a table of values can."""
    return ImageOps.equalize(image)


def invert(image: Image.Image) -> Image.Image:
    """Every value becomes 255 minus it."""
    return ImageOps.invert(image)
