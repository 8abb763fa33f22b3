"""Geometry: a decoded image in, uint8 RGB pixels of a fixed size out, on the host.

The geometry is mmpretrain's (mmpretrain/datasets/transforms/processing.py and
mmcv/transforms/processing.py with `backend='pillow'`): for the same crop box the pixels are equal
bit for bit. A pipeline is written as a string, such as

    random_resized_crop(size)|random_flip(0.5)
    resize_edge(256)|center_crop(size)

in which `size` stands for the config's `image_size`, and every other argument is a literal.
"""

import ast
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mbv2_jax.data import decoding
from mbv2_jax.data.transforms import augment
from mbv2_jax.data.transforms.operation import (
    INTERPOLATIONS,
    Box,
    Operation,
    ResizedCrop,
    check_count,
    check_interpolation,
    check_range,
    check_share,
    check_side,
)
from mbv2_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(ResizedCrop):
    """A crop of random area and aspect ratio, resized to a square.

    mmpretrain's and torchvision's: area and ratio are drawn up to `max_attempts` times until the
    box fits, else the central crop with the ratio clamped to the range.
    """

    size: int
    crop_ratio_range: tuple[float, float] = (0.08, 1.0)
    aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3)
    max_attempts: int = 10
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_side("size", self.size)
        check_range("crop_ratio_range", self.crop_ratio_range)
        check_range("aspect_ratio_range", self.aspect_ratio_range)
        check_count("max_attempts", self.max_attempts)
        check_interpolation(self.interpolation)

    def box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        low, high = self.aspect_ratio_range
        for _ in range(self.max_attempts):
            area = rng.uniform(*self.crop_ratio_range) * (width * height)
            ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
            crop_width = round(math.sqrt(area * ratio))
            crop_height = round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(rng.integers(0, height - crop_height + 1))
                left = int(rng.integers(0, width - crop_width + 1))
                return left, top, crop_width, crop_height
        crop_width, crop_height = width, height
        if width / height < low:
            crop_height = round(width / low)
        elif width / height > high:
            crop_width = round(height * high)
        return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Left and right change places with probability `prob`."""

    random: ClassVar[bool] = True
    prob: float = 0.5

    def __post_init__(self) -> None:
        check_share("prob", self.prob)

    def output_size(self, size: int | None) -> int | None:
        return size

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if rng.random() < self.prob:
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A square crop at a random place, of the image with `padding` black pixels on each side."""

    random: ClassVar[bool] = True
    crop_size: int
    padding: int = 0

    def __post_init__(self) -> None:
        check_side("crop_size", self.crop_size)
        check_count("padding", self.padding)

    def output_size(self, size: int | None) -> int | None:
        return self.crop_size

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        width, height = image.width + 2 * self.padding, image.height + 2 * self.padding
        if min(width, height) < self.crop_size:
            raise UserError(
                f"random_crop({self.crop_size}, padding={self.padding}) needs a larger"
                f" image than {image.width} x {image.height}; resize_edge before it,"
                " or more padding"
            )
        top = int(rng.integers(0, height - self.crop_size + 1)) - self.padding
        left = int(rng.integers(0, width - self.crop_size + 1)) - self.padding
        # Pillow fills what lies outside the image with zeros.
        return image.crop((left, top, left + self.crop_size, top + self.crop_size))


@dataclasses.dataclass(frozen=True)
class ResizeEdge:
    """The short side becomes `scale`; the long side follows, and is truncated to an integer."""

    random: ClassVar[bool] = False
    scale: int
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_side("scale", self.scale)
        check_interpolation(self.interpolation)

    def output_size(self, size: int | None) -> int | None:
        return None if size is None else self.scale  # a square stays one

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        width, height = image.size
        if width < height:
            resized = self.scale, int(self.scale * height / width)
        else:
            resized = int(self.scale * width / height), self.scale
        return image.resize(resized, INTERPOLATIONS[self.interpolation])


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """The central square; the offset rounds as Python does, halves to the even number."""

    random: ClassVar[bool] = False
    crop_size: int

    def __post_init__(self) -> None:
        check_side("crop_size", self.crop_size)

    def output_size(self, size: int | None) -> int | None:
        return self.crop_size

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        width, height = image.size
        # mmcv would return a smaller crop, with which no batch can be made.
        if min(width, height) < self.crop_size:
            raise UserError(
                f"center_crop({self.crop_size}) needs a larger image than"
                f" {width} x {height}; put resize_edge(...) before it"
            )
        left = round((width - self.crop_size) / 2)
        top = round((height - self.crop_size) / 2)
        return image.crop((left, top, left + self.crop_size, top + self.crop_size))


@dataclasses.dataclass(frozen=True)
class Resize:
    """Both sides become `scale`, whatever the aspect ratio was."""

    random: ClassVar[bool] = False
    scale: int
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_side("scale", self.scale)
        check_interpolation(self.interpolation)

    def output_size(self, size: int | None) -> int | None:
        return self.scale

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return image.resize((self.scale, self.scale), INTERPOLATIONS[self.interpolation])


OPERATIONS: dict[str, Callable[..., Operation]] = {
    "random_resized_crop": RandomResizedCrop,
    "random_flip": RandomFlip,
    "random_crop": RandomCrop,
    "resize_edge": ResizeEdge,
    "center_crop": CenterCrop,
    "resize": Resize,
    **augment.OPERATIONS,
}


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pipeline of operations; picklable, so that it goes to worker processes.

    Attributes:
      operations: applied in this order.
      output_size: side of the square that comes out, in pixels.
    """

    operations: tuple[Operation, ...]
    output_size: int

    @property
    def random(self) -> bool:
        """Whether any operation draws random numbers."""
        return any(operation.random for operation in self.operations)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Applies the operations.

        Args:
          image: mode "RGB", any size.
          rng: where all randomness comes from.

        Returns:
          uint8, (output_size, output_size, 3), RGB.

        Raises:
          UserError: the image is too small for a crop.
        """
        for operation in self.operations:
            image = operation(image, rng)
        return np.asarray(image)

    def from_encoded(
        self, encoded: bytes, rng: np.random.Generator, decode_as: str = "exact"
    ) -> np.ndarray:
        """Applies the operations to an image file, of which it decodes only what they need.

        Args:
          encoded: the bytes of an image file.
          rng: where all randomness comes from.
          decode_as: "exact": the pixels are those of `self(decode(encoded), rng)`; or "fast", for
            a random crop at the beginning: see data/fast_decoding.py.

        Returns:
          uint8, (output_size, output_size, 3), RGB.

        Raises:
          UnreadableImage: it cannot be decoded.
          UserError: the image is too small for a crop.
        """
        first, *rest = self.operations
        if not isinstance(first, ResizedCrop):
            return self(decoding.decode(encoded), rng)
        image = decoding.resized_crop(
            encoded,
            lambda width, height: first.box(width, height, rng),
            first.size,
            first.interpolation,
            decode_as,
        )
        for operation in rest:
            image = operation(image, rng)
        return np.asarray(image)


def make_transform(spec: str, image_size: int) -> Transform:
    """Makes the pipeline that a string such as "resize_edge(256)|center_crop(size)" describes.

    Args:
      spec: operations of `OPERATIONS` with literal arguments, joined by "|". Read, never executed.
      image_size: what `size` stands for, in pixels.

    Returns:
      The pipeline.

    Raises:
      UserError: the string cannot be read, names an unknown operation or argument, gives a value
        that is not possible, or does not end in a square of fixed size.
    """
    check_side("image_size", image_size)
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
    except SyntaxError as error:
        raise UserError(
            f"transform {spec!r} cannot be read: {error.msg}; write it like"
            " 'resize_edge(256)|center_crop(size)'"
        ) from error
    operations = []
    for call in _split(tree):
        try:
            operations.append(_make_operation(call, image_size))
        except UserError as error:
            raise UserError(f"transform {spec!r}: {error}") from error
    output_size: int | None = None
    for operation in operations:
        output_size = operation.output_size(output_size)
    if output_size is None:
        raise UserError(
            f"transform {spec!r} does not end in a fixed size; add center_crop(size),"
            " random_resized_crop(size), random_crop(size) or resize(size)"
        )
    return Transform(tuple(operations), output_size)


def _split(tree: ast.expr) -> list[ast.expr]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        return _split(tree.left) + _split(tree.right)
    return [tree]


def _make_operation(call: ast.expr, image_size: int) -> Operation:
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise UserError(
            f"{ast.unparse(call)!r} is no operation; write NAME(ARGUMENTS), such as"
            " 'center_crop(size)'"
        )
    name = call.func.id
    if name not in OPERATIONS:
        raise UserError(f"unknown operation {name!r}; {nearest(name, OPERATIONS)}")
    operation = OPERATIONS[name]
    known = [field.name for field in dataclasses.fields(operation)]  # type: ignore[arg-type]
    if len(call.args) > len(known):
        raise UserError(
            f"{name} takes at most {len(known)} arguments ({', '.join(known)}), not"
            f" {len(call.args)}"
        )
    values = dict(zip(known, (_value(name, node, image_size) for node in call.args), strict=False))
    for keyword in call.keywords:
        if keyword.arg not in known:
            raise UserError(
                f"{name} has no argument {keyword.arg!r}; {nearest(keyword.arg, known)}"
            )
        if keyword.arg in values:
            raise UserError(f"{name} got {keyword.arg!r} twice")
        values[keyword.arg] = _value(name, keyword.value, image_size)
    missing = [
        field.name
        for field in dataclasses.fields(operation)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise UserError(f"{name} needs {missing[0]!r}, such as {name}(size)")
    try:
        return operation(**values)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _value(name: str, node: ast.expr, image_size: int) -> Any:
    if isinstance(node, ast.Name) and node.id == "size":
        return image_size
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError) as error:
        raise UserError(
            f"{name}: argument {ast.unparse(node)!r} is neither a literal nor 'size'"
        ) from error
