"""timm's RandAugment (timm/data/auto_augment.py), which its recipes call `rand-m9-mstd0.5`.

It differs from torchvision's in every respect: each operation is applied with a probability, its
magnitude is drawn around the recipe's, and the highest is 10; geometric operations interpolate, and
fill with ImageNet's mean. Some operations have less effect at higher magnitudes (Posterize,
Solarize), or none in the middle (the colour operations, at 5). In the "increasing" set, the effect
of all operations grows with the magnitude.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from mbv2_jax.data.transforms import image_ops as ops
from mbv2_jax.data.transforms.operation import (
    WarpOperation,
    check_count,
    check_share,
    is_number,
)
from mbv2_jax.errors import UserError
from mbv2_jax.spec import Preprocessing

HIGHEST = 10.0  # magnitude
FILL = tuple(map(round, Preprocessing().mean))  # ImageNet's mean
RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # drawn with equal probability


class _Step(NamedTuple):
    """An operation of the policy.

    Attributes:
      apply: changes an image.
      argument: maps the magnitude as a share of the highest, 0 to 1, to the argument of `apply`;
        None if it takes none.
      signed: whether the argument is negated half of the time.
      geometric: whether `apply` also takes a resampling filter and a fill colour.
    """

    apply: Callable[..., Image.Image]
    argument: Callable[[float], float] | None = None
    signed: bool = False
    geometric: bool = False


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
    "TranslateXRel": _geometric(_translate_x, 0.45),  # share of the width
    "TranslateYRel": _geometric(_translate_y, 0.45),  # share of the height
}

# The same operations in the same order. Here the effect of all of them grows with the magnitude.
INCREASING_STEPS: dict[str, _Step] = STEPS | {
    "Posterize": _Step(ops.posterize, lambda share: 4 - int(share * 4)),
    "Solarize": _Step(ops.solarize, lambda share: 256 - int(share * 256)),
    "Color": _away_from_one(ops.saturation),
    "Contrast": _away_from_one(ops.contrast),
    "Brightness": _away_from_one(ops.brightness),
    "Sharpness": _away_from_one(ops.sharpness),
}


@dataclasses.dataclass(frozen=True)
class TimmRandAugment(WarpOperation):
    """Applies `num_ops` operations, drawn with replacement, each with probability `prob`.

    timm's `rand-m9-mstd0.5` is `timm_rand_augment(9, magnitude_std=0.5)`; `-inc1` adds
    `increasing=True`. The magnitude of each operation is drawn from the normal distribution around
    `magnitude` with standard deviation `magnitude_std`, and clipped to 0..10.

    Use it without other random changes of colour: timm omits its ColorJitter beside it.
    """

    name = "timm_rand_augment"
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

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
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
