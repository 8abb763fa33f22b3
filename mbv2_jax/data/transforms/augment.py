"""Random changes of colours and shapes, for training: torchvision's policies, and other recipes'.

AutoAugment, RandAugment and TrivialAugmentWide are torchvision's (torchvision/transforms/
autoaugment.py), black where the image moved away. Given the same draws the pixels are equal bit for
bit. A magnitude is the number of a bin, of `num_magnitude_bins` evenly spaced between no effect and
the largest one of the policy's table. `interpolation` is of those operations that move pixels, by
default "nearest" as there; torchvision's own recipes set "bilinear".

They go after the operations that fix the size, as in

    random_resized_crop(size)|random_flip(0.5)|trivial_augment_wide()|random_erasing(0.1)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mbv2_jax.data.transforms import image_ops as ops
from mbv2_jax.data.transforms.inception_crop import InceptionCrop
from mbv2_jax.data.transforms.operation import (
    INTERPOLATIONS,
    Operation,
    check_count,
    check_range,
    check_share,
    is_number,
)
from mbv2_jax.data.transforms.policy_tables import POLICIES
from mbv2_jax.data.transforms.timm_augment import TimmRandAugment
from mbv2_jax.errors import UserError, nearest

# ImageNet's, R, G, B, in values of 0 to 255: what is erased has this mean.
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)

# The names of a policy's operations, and what the highest bin stands for; None: no magnitude.
Table = Mapping[str, float | None]


def usual_table(width: int, height: int) -> Table:
    """RandAugment's, for an image of that size; and AutoAugment's, which has `Invert` besides."""
    return {
        "Identity": None,
        "ShearX": 0.3,  # slope
        "ShearY": 0.3,
        "TranslateX": 150 / 331 * width,  # pixels; found on images of 331
        "TranslateY": 150 / 331 * height,
        "Rotate": 30.0,  # degrees
        "Brightness": 0.9,  # away from the factor 1, as the next three
        "Color": 0.9,
        "Contrast": 0.9,
        "Sharpness": 0.9,
        "Posterize": 4.0,  # bits less than 8
        "Solarize": 255.0,  # less than 255
        "AutoContrast": None,
        "Equalize": None,
    }


WIDE_TABLE: Table = {  # TrivialAugmentWide's, in the same units
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

# Those whose magnitude is negated in half of the cases.
SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}
SIGNED |= {"Brightness", "Color", "Contrast", "Sharpness"}


def magnitude_of(name: str, highest: float, index: int, bins: int) -> float:
    """Returns the magnitude of a bin, as torchvision's `_augmentation_space` has it.

    Args:
      name: of the operation.
      highest: the table's entry.
      index: of the bin, from 0.
      bins: how many there are, 2 or more.
    """
    if name == "Posterize":
        return 8 - round(float(np.float32(index) / np.float32((bins - 1) / highest)))
    if name == "Solarize":
        return _linspace(highest, 0.0, bins, index)
    return _linspace(0.0, highest, bins, index)


def _linspace(first: float, last: float, bins: int, index: int) -> float:
    """One value of torch.linspace, to the last bit.

    That is float32, counted from the nearer end, with a fused multiply-add. Where it falls beside
    16.0 instead of on it, a translation is one pixel less.
    """
    start, stop = np.float32(first), np.float32(last)
    step = float((stop - start) / np.float32(bins - 1))
    if index < bins // 2:
        return float(np.float32(float(start) + step * index))
    return float(np.float32(float(stop) - step * (bins - 1 - index)))


def _angle(slope: float) -> float:
    # By way of degrees, as torchvision: the last bit can decide which pixel is the nearest.
    return math.radians(math.degrees(math.atan(slope)))


def _shear_y(image: Image.Image, slope: float, how: Image.Resampling) -> Image.Image:
    angle = _angle(slope)
    return ops.shear_y(image, math.sin(angle) / math.cos(angle), how)


RESAMPLING = {"nearest": ops.NEAREST, **INTERPOLATIONS}

# What torchvision's `_apply_op` does: operations that move pixels, by how far and how,
GEOMETRIC: dict[str, Callable[[Image.Image, float, Image.Resampling], Image.Image]] = {
    "ShearX": lambda image, slope, how: ops.shear_x(image, math.tan(_angle(slope)), how),
    "ShearY": _shear_y,
    "TranslateX": lambda image, pixels, how: ops.translate_x(image, int(pixels), how),
    "TranslateY": lambda image, pixels, how: ops.translate_y(image, int(pixels), how),
    "Rotate": ops.rotate,
}
# and those that change them, by how much where that is a question.
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
      name: of GEOMETRIC or PHOTOMETRIC.
      image: mode "RGB".
      magnitude: in the table's units, with its sign; None where the table has none.
      interpolation: of RESAMPLING.
    """
    if magnitude is None:
        return PHOTOMETRIC[name](image)
    if name in GEOMETRIC:
        return GEOMETRIC[name](image, magnitude, RESAMPLING[interpolation])
    return PHOTOMETRIC[name](image, magnitude)


def _check_resampling(interpolation: Any) -> None:
    if interpolation not in list(RESAMPLING):  # what cannot be hashed is unknown too
        raise UserError(
            f"unknown interpolation {interpolation!r}; {nearest(interpolation, RESAMPLING)}"
        )


@dataclasses.dataclass(frozen=True)
class AutoAugment:
    """One of 25 pairs of operations, each operation applied with the pair's probability.

    Cubuk et al. 2019, arXiv 1805.09501; `policy` is the dataset on which it was found.
    """

    random: ClassVar[bool] = True
    policy: str = "imagenet"
    interpolation: str = "nearest"

    def __post_init__(self) -> None:
        _check_resampling(self.interpolation)
        if self.policy not in list(POLICIES):  # what cannot be hashed is unknown too
            raise UserError(f"unknown policy {self.policy!r}; {nearest(self.policy, POLICIES)}")

    def output_size(self, size: int | None) -> int | None:
        return size

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
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
class RandAugment:
    """`num_ops` operations drawn with replacement, all of the same magnitude.

    Cubuk et al. 2020, arXiv 1909.13719.
    """

    random: ClassVar[bool] = True
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

    def output_size(self, size: int | None) -> int | None:
        return size

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
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
class TrivialAugmentWide:
    """One operation, any of its magnitudes.

    Müller and Hutter 2021, arXiv 2103.10158, with the wide table of magnitudes.
    """

    random: ClassVar[bool] = True
    num_magnitude_bins: int = 31
    interpolation: str = "nearest"

    def __post_init__(self) -> None:
        _check_resampling(self.interpolation)
        check_count("num_magnitude_bins", self.num_magnitude_bins, lowest=2)

    def output_size(self, size: int | None) -> int | None:
        return size

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
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

# Of ColorJitter's fields: the factor that changes nothing, and what a factor may be.
_CENTERS = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
_BOUNDS = {"hue": (-0.5, 0.5)}
_POSITIVE = (0.0, math.inf)


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast, saturation and hue, in random order; torchvision's.

    A number x stands for the factors from max(0, 1 - x) to 1 + x, for `hue` for the turns from -x
    to x (0.5: half the circle of hues); a pair (low, high) for itself. 0: that one stays as it is.
    """

    random: ClassVar[bool] = True
    brightness: Strength = 0.0
    contrast: Strength = 0.0
    saturation: Strength = 0.0
    hue: Strength = 0.0

    def __post_init__(self) -> None:
        for name in _CENTERS:
            _check_strength(name, getattr(self, name))

    def output_size(self, size: int | None) -> int | None:
        return size

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
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
    what = (
        "a number from 0 to 0.5, or (low, high) with -0.5 <= low <= high <= 0.5"
        if name == "hue"
        else "a number, 0 or more, or (low, high) with 0 <= low <= high"
    )
    raise UserError(f"{name}={strength!r} must be {what}")


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """With probability `prob` a rectangle is painted over (Zhong et al. 2017, arXiv 1708.04896).

    torchvision and timm erase after normalisation; here the pixels are still 0 to 255:

    - mode "mean": torchvision's default, and timm's "const", which write 0. Here it is ImageNet's
      mean rounded to an integer, at most 0.0082 away from 0 once it is normalised with ImageNet's
      mean and standard deviation. With other ones it is the same colour, and not 0.
    - mode "noise": torchvision's "random", timm's "pixel": a normal number for each value. Here it
      is scaled by ImageNet's mean and standard deviation, rounded (by 0.0088 at most) and clipped
      to what a pixel can be: that changes 2.9, 2.9 and 4.0 % of the red, green and blue values,
      those below -2.12, -2.04, -1.80 or above 2.25, 2.43, 2.64.

    The rectangle is drawn up to ten times until it is smaller than the image on both sides;
    otherwise nothing is erased. timm's defaults are (0.02, 0.333333) and (0.3, 3.333333).

    Attributes:
      prob: of erasing at all.
      area_range: of the rectangle, as shares of the image's area.
      aspect_ratio_range: of the rectangle, height / width; its logarithm is uniform.
      mode: "mean" or "noise".
    """

    random: ClassVar[bool] = True
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

    def output_size(self, size: int | None) -> int | None:
        return size

    def box(
        self, width: int, height: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int] | None:
        """Returns (left, top, width, height) of what to erase, None if no box was found."""
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

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
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
        elif width and height:  # a long, tiny image may have rounded them to 0
            noise = rng.standard_normal((height, width, 3), dtype=np.float32)
            pixels = np.rint(noise * STD + MEAN).clip(0, 255)
            image.paste(Image.fromarray(pixels.astype(np.uint8)), (left, top))
        return image


OPERATIONS: dict[str, Callable[..., Operation]] = {
    "auto_augment": AutoAugment,
    "rand_augment": RandAugment,
    "trivial_augment_wide": TrivialAugmentWide,
    "timm_rand_augment": TimmRandAugment,
    "color_jitter": ColorJitter,
    "random_erasing": RandomErasing,
    "inception_crop": InceptionCrop,
}
