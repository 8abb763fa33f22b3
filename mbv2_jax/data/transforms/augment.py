"""Random augmentation for training: torchvision's policies, colour jitter and random erasing.

AutoAugment, RandAugment and TrivialAugmentWide are torchvision's (torchvision/transforms/
autoaugment.py); uncovered pixels are black. Given the same draws the pixels are equal bit for bit.
A magnitude is the number of a bin, one of `num_magnitude_bins` that are evenly spaced between no
effect and the largest in the policy's table. `interpolation` applies to operations that move pixels
and is "nearest" by default, as in torchvision, whose own recipes set "bilinear".

In a pipeline they come after the operations that fix the size, as in

    random_resized_crop(size)|random_flip(0.5)|trivial_augment_wide()|random_erasing(0.1)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mbv2_jax.data.transforms import image_ops as ops
from mbv2_jax.data.transforms.geometry import INTERPOLATIONS
from mbv2_jax.data.transforms.operation import (
    ImageOperation,
    WarpOperation,
    check_count,
    check_range,
    check_share,
    is_number,
)
from mbv2_jax.data.transforms.policy_tables import POLICIES
from mbv2_jax.errors import UserError, nearest
from mbv2_jax.spec import Preprocessing

# ImageNet's, of R, G and B in values of 0 to 255: the distribution of erased pixels.
MEAN = np.array(Preprocessing().mean, np.float32)
STD = np.array(Preprocessing().std, np.float32)

# The names of a policy's operations, and the value of the highest bin; None without a magnitude.
Table = Mapping[str, float | None]


def usual_table(width: int, height: int) -> Table:
    """Returns RandAugment's table for an image's size; AutoAugment's also has `Invert`."""
    return {
        "Identity": None,
        "ShearX": 0.3,  # slope
        "ShearY": 0.3,
        "TranslateX": 150 / 331 * width,  # pixels; the policy was found on images of 331
        "TranslateY": 150 / 331 * height,
        "Rotate": 30.0,  # degrees
        "Brightness": 0.9,  # away from the factor 1, as the next three
        "Color": 0.9,
        "Contrast": 0.9,
        "Sharpness": 0.9,
        "Posterize": 4.0,  # subtracted from 8 bits
        "Solarize": 255.0,  # subtracted from 255
        "AutoContrast": None,
        "Equalize": None,
    }


WIDE_TABLE: Table = {  # of TrivialAugmentWide, in the same units
    "Identity": None,
    "ShearX": 0.99,
    "ShearY": 0.99,
    "TranslateX": 32.0,
    "TranslateY": 32.0,
    "Rotate": 135.0,
    "Brightness": 0.99,
    "Color": 0.99,
    "Contrast": 0.99,
    "Sharpness": 0.99,
    "Posterize": 6.0,
    "Solarize": 255.0,
    "AutoContrast": None,
    "Equalize": None,
}

# The operations whose magnitude is negated half of the time.
SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}
SIGNED |= {"Brightness", "Color", "Contrast", "Sharpness"}


def magnitude_of(name: str, highest: float, index: int, bins: int) -> float:
    """Returns the magnitude of a bin, as torchvision's `_augmentation_space` gives it.

    Args:
      name: of the operation.
      highest: the operation's entry in the table.
      index: of the bin, from 0.
      bins: the number of bins, 2 or more.
    """
    if name == "Posterize":
        return 8 - round(float(np.float32(index) / np.float32((bins - 1) / highest)))
    if name == "Solarize":
        return _linspace(highest, 0.0, bins, index)
    return _linspace(0.0, highest, bins, index)


def _linspace(first: float, last: float, bins: int, index: int) -> float:
    """Returns one value of torch.linspace, equal to the last bit.

    torch computes it in float32, from the nearer end, with a fused multiply-add. A value just below
    16.0 instead of 16.0 would make a translation one pixel shorter.
    """
    start, stop = np.float32(first), np.float32(last)
    step = float((stop - start) / np.float32(bins - 1))
    if index < bins // 2:
        return float(np.float32(float(start) + step * index))
    return float(np.float32(float(stop) - step * (bins - 1 - index)))


def _angle(slope: float) -> float:
    # Converted to degrees and back, as in torchvision: the last bit can change the nearest pixel.
    return math.radians(math.degrees(math.atan(slope)))


def _shear_y(image: Image.Image, slope: float, how: Image.Resampling) -> Image.Image:
    angle = _angle(slope)
    return ops.shear_y(image, math.sin(angle) / math.cos(angle), how)


RESAMPLING = {"nearest": ops.NEAREST, **INTERPOLATIONS}

# torchvision's `_apply_op`. Operations that move pixels take a distance and a filter.
GEOMETRIC: dict[str, Callable[[Image.Image, float, Image.Resampling], Image.Image]] = {
    "ShearX": lambda image, slope, how: ops.shear_x(image, math.tan(_angle(slope)), how),
    "ShearY": _shear_y,
    "TranslateX": lambda image, pixels, how: ops.translate_x(image, int(pixels), how),
    "TranslateY": lambda image, pixels, how: ops.translate_y(image, int(pixels), how),
    "Rotate": ops.rotate,
}
# Operations that change colours take an amount, if they have a magnitude.
PHOTOMETRIC: dict[str, Callable[..., Image.Image]] = {
    "Identity": lambda image: image,
    "Brightness": lambda image, change: ops.brightness(image, 1.0 + change),
    "Color": lambda image, change: ops.saturation(image, 1.0 + change),
    "Contrast": lambda image, change: ops.contrast(image, 1.0 + change),
    "Sharpness": lambda image, change: ops.sharpness(image, 1.0 + change),
    "Posterize": lambda image, bits: ops.posterize(image, int(bits)),
    "Solarize": ops.solarize,
    "AutoContrast": ops.autocontrast,
    "Equalize": ops.equalize,
    "Invert": ops.invert,
}


def apply(
    name: str, image: Image.Image, magnitude: float | None, interpolation: str = "nearest"
) -> Image.Image:
    """Applies one operation of the policies.

    Args:
      name: a key of GEOMETRIC or PHOTOMETRIC.
      image: mode "RGB".
      magnitude: in the table's units, with its sign; None where the table has none.
      interpolation: a key of RESAMPLING.
    """
    if magnitude is None:
        return PHOTOMETRIC[name](image)
    if name in GEOMETRIC:
        return GEOMETRIC[name](image, magnitude, RESAMPLING[interpolation])
    return PHOTOMETRIC[name](image, magnitude)


def _check_resampling(interpolation: Any) -> None:
    if interpolation not in list(RESAMPLING):  # a list, since the value may not be hashable
        raise UserError(
            f"unknown interpolation {interpolation!r}; {nearest(interpolation, RESAMPLING)}"
        )


@dataclasses.dataclass(frozen=True)
class AutoAugment(WarpOperation):
    """Applies one of 25 pairs of operations, each operation with its own probability.

    Cubuk et al. 2019, arXiv 1805.09501; `policy` is the dataset on which it was found.
    """

    name = "auto_augment"
    policy: str = "imagenet"
    interpolation: str = "nearest"

    def __post_init__(self) -> None:
        _check_resampling(self.interpolation)
        if self.policy not in list(POLICIES):  # a list, since the value may not be hashable
            raise UserError(f"unknown policy {self.policy!r}; {nearest(self.policy, POLICIES)}")

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        pairs = POLICIES[self.policy]
        pair = pairs[rng.integers(len(pairs))]
        draws = rng.random(2)
        signs = rng.integers(2, size=2)
        table = usual_table(image.width, image.height)
        for (name, prob, index), draw, sign in zip(pair, draws, signs, strict=True):
            if draw > prob:
                continue
            magnitude = None
            if index is not None:
                magnitude = magnitude_of(name, table[name], index, bins=10)  # type: ignore[arg-type]
                magnitude *= -1 if name in SIGNED and not sign else 1
            image = apply(name, image, magnitude, self.interpolation)
        return image


@dataclasses.dataclass(frozen=True)
class RandAugment(WarpOperation):
    """Applies `num_ops` operations, drawn with replacement, all of the same magnitude.

    Cubuk et al. 2020, arXiv 1909.13719.
    """

    name = "rand_augment"
    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31
    interpolation: str = "nearest"

    def __post_init__(self) -> None:
        _check_resampling(self.interpolation)
        check_count("num_ops", self.num_ops)
        check_count("magnitude", self.magnitude)
        check_count("num_magnitude_bins", self.num_magnitude_bins, lowest=2)
        if self.magnitude >= self.num_magnitude_bins:
            raise UserError(
                f"magnitude={self.magnitude} must be below num_magnitude_bins,"
                f" {self.num_magnitude_bins}"
            )

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        table = usual_table(image.width, image.height)
        names = list(table)
        for _ in range(self.num_ops):
            name = names[rng.integers(len(names))]
            magnitude, highest = None, table[name]
            if highest is not None:
                magnitude = magnitude_of(name, highest, self.magnitude, self.num_magnitude_bins)
                magnitude = _with_sign(name, magnitude, rng)
            image = apply(name, image, magnitude, self.interpolation)
        return image


@dataclasses.dataclass(frozen=True)
class TrivialAugmentWide(WarpOperation):
    """Applies one random operation with one random magnitude.

    Müller and Hutter 2021, arXiv 2103.10158, with the wide table of magnitudes.
    """

    name = "trivial_augment_wide"
    num_magnitude_bins: int = 31
    interpolation: str = "nearest"

    def __post_init__(self) -> None:
        _check_resampling(self.interpolation)
        check_count("num_magnitude_bins", self.num_magnitude_bins, lowest=2)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        names = list(WIDE_TABLE)
        name = names[rng.integers(len(names))]
        magnitude, highest = None, WIDE_TABLE[name]
        if highest is not None:
            index = int(rng.integers(self.num_magnitude_bins))
            magnitude = magnitude_of(name, highest, index, self.num_magnitude_bins)
            magnitude = _with_sign(name, magnitude, rng)
        return apply(name, image, magnitude, self.interpolation)


def _with_sign(name: str, magnitude: float, rng: np.random.Generator) -> float:
    return -magnitude if name in SIGNED and rng.integers(2) else magnitude


Strength = float | tuple[float, float]

# For each field of ColorJitter, the factor that changes nothing, and the range of factors.
_CENTERS = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
_BOUNDS = {"hue": (-0.5, 0.5)}
_POSITIVE = (0.0, math.inf)


@dataclasses.dataclass(frozen=True)
class ColorJitter(ImageOperation):
    """Changes brightness, contrast, saturation and hue in random order, as torchvision does.

    A number x stands for the factors from max(0, 1 - x) to 1 + x; for `hue` it stands for the turns
    from -x to x, where 0.5 is half the circle of hues. A pair (low, high) stands for itself. 0
    changes nothing.
    """

    brightness: Strength = 0.0
    contrast: Strength = 0.0
    saturation: Strength = 0.0
    hue: Strength = 0.0

    def __post_init__(self) -> None:
        for name in _CENTERS:
            _check_strength(name, getattr(self, name))

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        order = rng.permutation(len(_CENTERS))
        names = list(_CENTERS)
        factors = {}
        for name, center in _CENTERS.items():
            low, high = _limits(name, getattr(self, name))
            if not low == high == center:
                factors[name] = rng.uniform(low, high)
        for index in order:
            name = names[index]
            if name in factors:
                image = getattr(ops, name)(image, factors[name])
        return image


def _limits(name: str, strength: Strength) -> tuple[float, float]:
    """Returns the lowest and the highest factor that a field of ColorJitter stands for."""
    if isinstance(strength, Sequence):
        return strength
    low = _CENTERS[name] - strength
    return low if name == "hue" else max(0.0, low), _CENTERS[name] + strength


def _check_strength(name: str, strength: Any) -> None:
    lowest, highest = _BOUNDS.get(name, _POSITIVE)
    numbers = strength if isinstance(strength, Sequence) else (strength,)
    if all(map(is_number, numbers)) and all(map(math.isfinite, numbers)):
        if len(numbers) == 2 and lowest <= numbers[0] <= numbers[1] <= highest:
            return
        if not isinstance(strength, Sequence) and 0 <= strength <= highest:
            return
    expected = (
        "a number from 0 to 0.5, or (low, high) with -0.5 <= low <= high <= 0.5"
        if name == "hue"
        else "a number, 0 or more, or (low, high) with 0 <= low <= high"
    )
    raise UserError(f"{name}={strength!r} must be {expected}")


@dataclasses.dataclass(frozen=True)
class RandomErasing(ImageOperation):
    """Paints over a rectangle with probability `prob` (Zhong et al. 2017, arXiv 1708.04896).

    Boxes and masks stay: they still describe the objects behind the rectangle. torchvision and timm
    erase after normalisation; here the pixels are still 0 to 255:

    - mode "mean" is torchvision's default and timm's "const", which write 0. Here the colour is
      ImageNet's mean rounded to an integer, which is at most 0.0082 away from 0 once it is
      normalised with ImageNet's mean and standard deviation. With other ones the colour stays the
      same, and is not 0.
    - mode "noise" is torchvision's "random" and timm's "pixel", a normal number for each value.
      Here the number is scaled by ImageNet's mean and standard deviation, rounded (by 0.0088 at
      most) and clipped to 0..255. Clipping changes 2.9, 2.9 and 4.0 % of the red, green and blue
      values, those below -2.12, -2.04, -1.80 or above 2.25, 2.43, 2.64.

    The rectangle is drawn up to ten times until it is smaller than the image on both sides;
    otherwise nothing is erased. timm's defaults are (0.02, 0.333333) and (0.3, 3.333333).

    Attributes:
      prob: the probability of erasing.
      area_range: of the rectangle, as shares of the image's area.
      aspect_ratio_range: of the rectangle, height / width; its logarithm is uniform.
      mode: "mean" or "noise".
    """

    prob: float = 0.5
    area_range: tuple[float, float] = (0.02, 0.33)
    aspect_ratio_range: tuple[float, float] = (0.3, 3.3)
    mode: str = "mean"

    def __post_init__(self) -> None:
        check_share("prob", self.prob)
        check_range("area_range", self.area_range, highest=1)
        check_range("aspect_ratio_range", self.aspect_ratio_range)
        if self.mode not in ("mean", "noise"):
            raise UserError(f"unknown mode {self.mode!r}; {nearest(self.mode, ('mean', 'noise'))}")

    def box(
        self, width: int, height: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int] | None:
        """Returns the rectangle as (left, top, width, height); None if none was found."""
        low, high = map(math.log, self.aspect_ratio_range)
        for _ in range(10):
            area = rng.uniform(*self.area_range) * (width * height)
            ratio = math.exp(rng.uniform(low, high))
            box_height = round(math.sqrt(area * ratio))
            box_width = round(math.sqrt(area / ratio))
            if box_height < height and box_width < width:
                top = int(rng.integers(0, height - box_height + 1))
                left = int(rng.integers(0, width - box_width + 1))
                return left, top, box_width, box_height
        return None

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if rng.random() >= self.prob:
            return image
        box = self.box(image.width, image.height, rng)
        if box is None:
            return image
        left, top, width, height = box
        image = image.copy()
        if self.mode == "mean":
            mean = tuple(map(round, MEAN.tolist()))
            image.paste(mean, (left, top, left + width, top + height))
        elif width and height:  # the sides of a long, tiny image may have been rounded to 0
            noise = rng.standard_normal((height, width, 3), dtype=np.float32)
            pixels = np.rint(noise * STD + MEAN).clip(0, 255)
            image.paste(Image.fromarray(pixels.astype(np.uint8)), (left, top))
        return image
