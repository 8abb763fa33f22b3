"""mmsegmentation's random change of colours, with OpenCV's colour model, in NumPy.

Given the same draws, the pixels are those of mmseg's PhotoMetricDistortion (mmseg/datasets/
transforms/transforms.py). Saturation and hue go through OpenCV's 8-bit HSV (hues from 0 to 179) and
back, rounded on the way there and truncated on the way back as OpenCV 5 does where it uses vector
instructions; at the end of a row it rounds, which makes a level's difference.
"""

import dataclasses

import numpy as np
from PIL import Image

from mbv2_jax.data.transforms.operation import ImageOperation, check_count, check_range, is_number
from mbv2_jax.errors import UserError

_HUES = 180  # OpenCV's hue is in units of 2 degrees, so that it fits into 8 bits
_SHIFT = 12  # bits of the fixed-point reciprocals by which OpenCV divides


@dataclasses.dataclass(frozen=True)
class PhotometricDistortion(ImageOperation):
    """Changes brightness, contrast, saturation and hue, each with a probability of a half.

    They change in this order, or with contrast last, which is as likely.

    Attributes:
      brightness_delta: the largest number of levels, of 255, that is added or subtracted.
      contrast_range: the smallest and the largest factor of all levels.
      saturation_range: of the saturation.
      hue_delta: the hue changes by -hue_delta to hue_delta - 1 steps of 2 degrees.
    """

    brightness_delta: float = 32
    contrast_range: tuple[float, float] = (0.5, 1.5)
    saturation_range: tuple[float, float] = (0.5, 1.5)
    hue_delta: int = 18

    def __post_init__(self) -> None:
        if not is_number(self.brightness_delta) or not 0 <= self.brightness_delta <= 255:
            raise UserError(
                f"brightness_delta={self.brightness_delta!r} must be a number from 0 to 255"
            )
        check_range("contrast_range", self.contrast_range)
        check_range("saturation_range", self.saturation_range)
        check_count("hue_delta", self.hue_delta, lowest=1)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if rng.integers(2):
            delta = rng.uniform(-self.brightness_delta, self.brightness_delta)
            image = image.point(_levels(1.0, delta).tolist() * 3)
        contrast_first = bool(rng.integers(2))
        if contrast_first:
            image = self._contrast(image, rng)
        image = self._saturation(image, rng)
        image = self._hue(image, rng)
        return image if contrast_first else self._contrast(image, rng)

    def _contrast(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if not rng.integers(2):
            return image
        return image.point(_levels(rng.uniform(*self.contrast_range), 0.0).tolist() * 3)

    def _saturation(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if not rng.integers(2):
            return image
        hue, saturation, value = to_hsv(image)
        saturation = _levels(rng.uniform(*self.saturation_range), 0.0)[saturation]
        return to_rgb(hue, saturation, value)

    def _hue(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if not rng.integers(2):
            return image
        hue, saturation, value = to_hsv(image)
        turn = int(rng.integers(-self.hue_delta, self.hue_delta))
        return to_rgb((hue + turn) % _HUES, saturation, value)


def _levels(factor: float, offset: float) -> np.ndarray:
    """Returns each level of 0 to 255 times a factor plus an offset, truncated: uint8 (256,)."""
    changed = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return changed.clip(0, 255).astype(np.uint8)


def to_hsv(image: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns hue (0 to 179), saturation and value (0 to 255) of an "RGB" image.

    Returns:
      Three arrays (H, W): int32, uint8, uint8.
    """
    red, green, blue = (np.asarray(channel).astype(np.int32) for channel in image.split())
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    half = 1 << (_SHIFT - 1)
    saturation = (spread * _BY_VALUE.take(value) + half) >> _SHIFT
    sixth = np.where(
        value == red,
        green - blue,
        np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sixth * _BY_SPREAD.take(spread) + half) >> _SHIFT
    hue += _HUES * (hue < 0)
    return hue, saturation.astype(np.uint8), value.astype(np.uint8)


def to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> Image.Image:
    """Returns the "RGB" image of hue, saturation and value: see `to_hsv`."""
    value = _LEVEL.take(value)
    both = hue * 256 + saturation
    channels = [(value * share.take(both) * np.float32(255)).astype(np.uint8) for share in _SHARES]
    return Image.merge("RGB", [Image.fromarray(channel) for channel in channels])


def _reciprocals(numerator: float) -> np.ndarray:
    """Returns `numerator` over 0 to 255 in fixed point, int32 (256,); 0 for 0."""
    numbers = np.arange(1, 256)
    return np.concatenate([[0], np.rint((1 << _SHIFT) * numerator / numbers)]).astype(np.int32)


def _shares(channel: int) -> np.ndarray:
    """Returns the share of the value that red, green or blue (0, 1, 2) has.

    Returns:
      float32 (180 * 256,), of each hue and saturation.
    """
    sixths = np.arange(_HUES, dtype=np.float32) * np.float32(6 / _HUES)
    sector = np.floor(sixths)
    fraction = sixths - sector  # of the way through a sixth of the circle
    none = np.zeros_like(fraction)
    # How far red is from full in each sixth, from 0 to 1; the others are turned by a third.
    red = (none, fraction, none + 1, none + 1, 1 - fraction, none)
    turned = [red[(number - 2 * channel) % 6] for number in range(6)]
    lack = np.choose(sector.astype(np.int64), turned)
    # Rounded once, as by a fused multiply-add.
    return (1 - np.outer(lack.astype(np.float64), _LEVEL)).astype(np.float32).ravel()


_BY_VALUE, _BY_SPREAD = _reciprocals(255), _reciprocals(_HUES / 6)
_LEVEL = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
_SHARES = [_shares(channel) for channel in range(3)]
