"""RandAugment as timm has it (timm/data/auto_augment.py), which its recipes name `rand-m9-mstd0.5`.

It differs from torchvision's in every respect: each operation is applied with a probability, its
magnitude is drawn around the recipe's, ten is the highest; geometric operations interpolate, and
fill with ImageNet's mean. Some operations do less as the magnitude grows (Posterize, Solarize) or
change nothing in the middle (Color and its like, at 5): those of the "increasing" set do not.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image

from mbv2_jax.data.transforms import image_ops as ops
from mbv2_jax.data.transforms.operation import check_count, check_share, is_number
from mbv2_jax.errors import UserError

HIGHEST = 10.0  # of the magnitudes
FILL = (124, 116, 104)  # ImageNet's mean, rounded
RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # either, by chance


class _Step(NamedTuple):
    apply: Callable[..., Image.Image]
    # Of the share of the highest magnitude, 0 to 1; None: the operation has no argument.
    argument: Callable[[float], float] | None = None
    signed: bool = False  # negated in half of the cases
    geometric: bool = False  # also takes how to interpolate, and what to fill with


def _geometric(apply: Callable[..., Image.Image], highest: float) -> _Step:
    return _Step(apply, lambda share: share * highest, signed=True, geometric=True)


def _enhanced(apply: Callable[[Image.Image, float], Image.Image]) -> _Step:
    return _Step(apply, lambda share: share * 1.8 + 0.1)


def _away_from_one(apply: Callable[[Image.Image, float], Image.Image]) -> _Step:
    def enhance(image: Image.Image, change: float) -> Image.Image:
        return apply(image, 1.0 + change)

    return _Step(enhance, lambda share: share * 0.9, signed=True)


def _translate_x(image: Image.Image, share: float, *how: object) -> Image.Image:
    return ops.translate_x(image, -share * image.width, *how)  # type: ignore[arg-type]


def _translate_y(image: Image.Image, share: float, *how: object) -> Image.Image:
    return ops.translate_y(image, -share * image.height, *how)  # type: ignore[arg-type]


STEPS: dict[str, _Step] = {
    "AutoContrast": _Step(ops.autocontrast),
    "Equalize": _Step(ops.equalize),
    "Invert": _Step(ops.invert),
    "Rotate": _geometric(ops.rotate, 30.0),  # degrees
    "Posterize": _Step(ops.posterize, lambda share: int(share * 4)),  # bits kept
    "Solarize": _Step(ops.solarize, lambda share: int(share * 256)),  # threshold
    "SolarizeAdd": _Step(ops.solarize_add, lambda share: int(share * 110)),
    "Color": _enhanced(ops.saturation),
    "Contrast": _enhanced(ops.contrast),
    "Brightness": _enhanced(ops.brightness),
    "Sharpness": _enhanced(ops.sharpness),
    "ShearX": _geometric(ops.shear_x, 0.3),
    "ShearY": _geometric(ops.shear_y, 0.3),
    "TranslateXRel": _geometric(_translate_x, 0.45),  # of the width
    "TranslateYRel": _geometric(_translate_y, 0.45),  # of the height
}

# The same operations in the same order, those that did not grow with the magnitude turned round.
INCREASING_STEPS: dict[str, _Step] = STEPS | {
    "Posterize": _Step(ops.posterize, lambda share: 4 - int(share * 4)),
    "Solarize": _Step(ops.solarize, lambda share: 256 - int(share * 256)),
    "Color": _away_from_one(ops.saturation),
    "Contrast": _away_from_one(ops.contrast),
    "Brightness": _away_from_one(ops.brightness),
    "Sharpness": _away_from_one(ops.sharpness),
}


@dataclasses.dataclass(frozen=True)
class TimmRandAugment:
    """`num_ops` operations drawn with replacement, each then applied with probability `prob`.

    `rand-m9-mstd0.5` of timm is `timm_rand_augment(9, magnitude_std=0.5)`; with `-inc1` it has
    `increasing=True` too. Of each operation the magnitude is drawn from the normal distribution
    around `magnitude` with standard deviation `magnitude_std`, and clipped to 0..10.

    No other random augmentation of colours goes with it: timm leaves its ColorJitter out.
    """

    random: ClassVar[bool] = True
    magnitude: float = 9
    num_ops: int = 2
    magnitude_std: float = 0.5
    increasing: bool = False
    prob: float = 0.5

    def __post_init__(self) -> None:
        if not is_number(self.magnitude) or not 0 <= self.magnitude <= HIGHEST:
            raise UserError(f"magnitude={self.magnitude!r} must be a number from 0 to 10")
        check_count("num_ops", self.num_ops)
        if not is_number(self.magnitude_std) or not 0 <= self.magnitude_std < math.inf:
            raise UserError(f"magnitude_std={self.magnitude_std!r} must be a number, 0 or more")
        if not isinstance(self.increasing, bool):
            raise UserError(f"increasing={self.increasing!r} must be True or False")
        check_share("prob", self.prob)

    def output_size(self, size: int | None) -> int | None:
        return size

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        steps = list((INCREASING_STEPS if self.increasing else STEPS).values())
        for index in rng.integers(len(steps), size=self.num_ops):
            if self.prob < 1 and rng.random() > self.prob:
                continue
            magnitude = float(self.magnitude)
            if self.magnitude_std > 0:
                magnitude = rng.normal(magnitude, self.magnitude_std)
            share = max(0.0, min(magnitude, HIGHEST)) / HIGHEST
            image = _apply(steps[index], image, share, rng)
        return image


def _apply(step: _Step, image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    if step.argument is None:
        return step.apply(image)
    argument = step.argument(share)
    if step.signed and rng.random() > 0.5:
        argument = -argument
    if not step.geometric:
        return step.apply(image, argument)
    return step.apply(image, argument, RESAMPLING[rng.integers(len(RESAMPLING))], FILL)
