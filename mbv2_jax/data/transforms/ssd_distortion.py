"""SSD's random change of colours, as mmdetection makes it, in NumPy.

Given the same draws, the pixels are those of mmdet's PhotoMetricDistortion (mmdet/datasets/
transforms/transforms.py), rounded to bytes. Unlike mmseg's of that name (photometric_distortion.py)
it computes in floating point, with OpenCV's colour model for it, and may exchange the channels.
"""

import dataclasses

import numpy as np
from PIL import Image

from mbv2_jax.data.transforms.operation import ImageOperation, check_range, is_number
from mbv2_jax.errors import UserError

_EPSILON = np.float32(1.1920929e-7)  # by which OpenCV keeps from dividing by 0


@dataclasses.dataclass(frozen=True)
class SsdDistortion(ImageOperation):
    """Changes brightness, contrast, saturation, hue and the order of the channels.

    Each changes with a probability of a half, in this order or with contrast last but one, which is
    as likely.

    Attributes:
      brightness_delta: the largest number of levels, of 255, that is added or subtracted.
      contrast_range: the smallest and the largest factor of all levels.
      saturation_range: of the saturation.
      hue_delta: the largest turn of the hue, in degrees.
    """

    brightness_delta: float = 32
    contrast_range: tuple[float, float] = (0.5, 1.5)
    saturation_range: tuple[float, float] = (0.5, 1.5)
    hue_delta: float = 18

    def __post_init__(self) -> None:
        for name, highest in (("brightness_delta", 255), ("hue_delta", 180)):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= highest:
                raise UserError(f"{name}={value!r} must be a number from 0 to {highest}")
        check_range("contrast_range", self.contrast_range)
        check_range("saturation_range", self.saturation_range)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        # All is drawn, whether it is used or not.
        contrast_first, brighten, contrast, saturate, turn, swap = (
            bool(rng.integers(2)) for _ in range(6)
        )
        delta = rng.uniform(-self.brightness_delta, self.brightness_delta)
        factor = np.float32(rng.uniform(*self.contrast_range))
        saturation = rng.uniform(*self.saturation_range) if saturate else _drawn(rng, 1.0)
        hue = rng.uniform(-self.hue_delta, self.hue_delta) if turn else _drawn(rng, 0.0)
        order = rng.permutation(3) if swap else None
        # R, G and B apart: (3, H, W).
        channels = np.stack([np.asarray(channel) for channel in image.split()]).astype(np.float32)
        if brighten:
            channels += np.float32(delta)
        if contrast and contrast_first:
            channels *= factor
        # Without a change of hue or saturation the colours come back, but for those below 0.
        if saturate or turn or (brighten and delta < 0):
            channels = _changed(channels, saturation, hue)
        if contrast and not contrast_first:
            channels *= factor
        if order is not None:
            channels = channels[2 - order[::-1]]  # the order is one of B, G, R
        pixels = np.rint(channels, out=channels).clip(0, 255, out=channels).astype(np.uint8)
        return Image.merge("RGB", [Image.fromarray(channel) for channel in pixels])


def _drawn(rng: np.random.Generator, value: float) -> float:
    """Draws a number and returns another instead."""
    rng.random()
    return value


def _changed(channels: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Returns an image with its saturation multiplied and its hue turned.

    Args:
      channels: (3, H, W) float32: R, G, B, also below 0 and above 255.
      saturation: the factor.
      hue: the turn, in degrees.
    """
    red, green, blue = channels
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    share = spread * np.float32(saturation) / (np.abs(value) + _EPSILON)
    if saturation > 1:
        np.minimum(share, 1, out=share)
    chroma = value * share
    # In sixths of the circle, 0 at red.
    sixth = np.where(
        value == red,
        green - blue,
        np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    sixth /= spread + _EPSILON
    sixth += np.float32(hue / 60)
    sixth -= 6 * np.floor(sixth / 6)
    found = []
    for opposite in (3, 5, 1):  # of red, green and blue
        # Of the hue from the channel's own: up to 1 the channel is full, from 2 on it is least.
        distance = np.abs(3 - np.abs(sixth - opposite))
        lack = (distance - 1).clip(0, 1)
        found.append(value - chroma * lack)
    return np.stack(found)
