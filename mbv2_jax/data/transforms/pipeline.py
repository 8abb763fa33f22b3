"""A pipeline of operations: a decoded sample in, uint8 RGB pixels of a fixed size out, on the host.

A pipeline is written as a string, such as

    random_resized_crop(size)|random_flip(0.5)
    resize_edge(256)|center_crop(size)

in which `size` stands for the config's `image_size`, and every other argument is a literal.
"""

import ast
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mbv2_jax.data import decoding
from mbv2_jax.data.decoding import ImageLike
from mbv2_jax.data.sample import Frame, Sample
from mbv2_jax.data.transforms import augment, geometry, resize_and_crop
from mbv2_jax.data.transforms.boxes import Expand, MinIouCrop
from mbv2_jax.data.transforms.geometry import Size
from mbv2_jax.data.transforms.inception_crop import InceptionCrop
from mbv2_jax.data.transforms.operation import Operation, ResizedCrop, check_side, height_width
from mbv2_jax.data.transforms.photometric_distortion import PhotometricDistortion
from mbv2_jax.data.transforms.scale_and_pad import Fit, Pad, RandomScale
from mbv2_jax.data.transforms.ssd_distortion import SsdDistortion
from mbv2_jax.data.transforms.timm_augment import TimmRandAugment
from mbv2_jax.errors import UserError, nearest

OPERATIONS: dict[str, Callable[..., Operation]] = {
    "random_resized_crop": resize_and_crop.RandomResizedCrop,
    "random_flip": resize_and_crop.RandomFlip,
    "random_crop": resize_and_crop.RandomCrop,
    "resize_edge": resize_and_crop.ResizeEdge,
    "center_crop": resize_and_crop.CenterCrop,
    "resize": resize_and_crop.Resize,
    "auto_augment": augment.AutoAugment,
    "rand_augment": augment.RandAugment,
    "trivial_augment_wide": augment.TrivialAugmentWide,
    "timm_rand_augment": TimmRandAugment,
    "color_jitter": augment.ColorJitter,
    "random_erasing": augment.RandomErasing,
    "inception_crop": InceptionCrop,
    "random_scale": RandomScale,
    "fit": Fit,
    "pad": Pad,
    "photometric_distortion": PhotometricDistortion,
    "expand": Expand,
    "min_iou_crop": MinIouCrop,
    "ssd_distortion": SsdDistortion,
}


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pipeline of operations; picklable, so that it can be sent to worker processes.

    Attributes:
      operations: in the order in which they are applied.
      output_size: (height, width) of the output in pixels.
    """

    operations: tuple[Operation, ...]
    output_size: Size

    @property
    def random(self) -> bool:
        """Returns whether any operation draws random numbers."""
        return any(operation.random for operation in self.operations)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Applies the operations to a decoded sample.

        Args:
          sample: its image is a Pillow image, "RGB", of any size.
          rng: the source of all randomness.

        Returns:
          The sample with a uint8 (height, width, 3) array of RGB pixels for its image, with its
          boxes and masks moved with the pixels, and with its `frame` set.

        Raises:
          UserError: a mask is not as large as the image, the image is too small for a crop or too
            large for padding, or an operation does not move the sample's boxes or masks.
        """
        geometry.check_masks(sample.targets, sample.image.size)
        sample = dataclasses.replace(sample, frame=Frame.whole(*sample.image.size))
        return self._apply(self.operations, sample, rng)

    def from_image(self, image: ImageLike) -> Sample:
        """Applies the operations of an evaluation, none of which is random, to any kind of image.

        Args:
          image: as `decoding.open_image` takes it.

        Returns:
          As `__call__`; the sample has no id and no targets.

        Raises:
          UserError: as `decoding.open_image` and `__call__`.
        """
        picture = decoding.open_image(image)
        return self(Sample(picture, id=""), np.random.default_rng(0))

    def from_encoded(
        self, sample: Sample, rng: np.random.Generator, decode_as: str = "exact"
    ) -> Sample:
        """Applies the operations to an encoded sample, and decodes no more of it than they need.

        Args:
          sample: its image is the bytes of an image file.
          rng: the source of all randomness.
          decode_as: "exact" gives the pixels of decoding the whole image first; "fast" applies to a
            random crop at the beginning of the pipeline, see data/fast_decoding.py.

        Returns:
          The sample as `__call__` returns it.

        Raises:
          UnreadableImage: the image cannot be decoded.
          UserError: see `__call__`.
        """
        first, *rest = self.operations
        if not isinstance(first, ResizedCrop):
            return self(sample.with_image(decoding.decode(sample.image)), rng)
        size = height_width(first.size)
        crop = decoding.resized_crop(
            sample.image,
            lambda width, height: first.box(width, height, rng),
            size,
            first.interpolation,
            decode_as,
        )
        geometry.check_masks(sample.targets, crop.image_size)
        targets = geometry.crop_and_resize_targets(sample.targets, crop.box, size)
        left, top, width, height = crop.box
        frame = Frame(crop.image_size, (left, top, left + width, top + height))
        return self._apply(rest, Sample(crop.image, sample.id, targets, frame), rng)

    def _apply(
        self, operations: Sequence[Operation], sample: Sample, rng: np.random.Generator
    ) -> Sample:
        for operation in operations:
            sample = operation(sample, rng)
        height, width = self.output_size
        if sample.image.size != (width, height):  # after `pad`, which makes nothing smaller
            first, last = (sample.frame and sample.frame.size), sample.image.size
            raise UserError(
                f"the picture of {_by(first)} pixels becomes {_by(last)}, and not "
                f"{_by((width, height))}: pad(...) makes nothing smaller; put fit(...) before it, "
                "or random_crop(...) after it"
            )
        return dataclasses.replace(sample, image=np.asarray(sample.image))


def _by(size: tuple[int, int] | None) -> str:
    return " x ".join(map(str, size or ()))


def make_transform(spec: str, image_size: int) -> Transform:
    """Returns the pipeline of a string such as "resize_edge(256)|center_crop(size)".

    Args:
      spec: operations of `OPERATIONS` with literal arguments, joined by "|"; parsed, never
        executed. A literal size is the side of a square, or (height, width).
      image_size: the value of `size`, the side of a square in pixels.

    Returns:
      The pipeline.

    Raises:
      UserError: the string cannot be parsed, names an unknown operation or argument, has an
        impossible value, or does not end in a fixed size.
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
    output_size: Size | None = None
    for operation in operations:
        output_size = operation.output_size(output_size)
    if output_size is None:
        raise UserError(
            f"transform {spec!r} does not end in a fixed size; add center_crop(size),"
            " random_resized_crop(size), random_crop(size), resize(size) or fit(size)|pad(size)"
        )
    return Transform(tuple(operations), output_size)


def _split(tree: ast.expr) -> list[ast.expr]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        return _split(tree.left) + _split(tree.right)
    return [tree]


def _make_operation(call: ast.expr, image_size: int) -> Operation:
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise UserError(
            f"{ast.unparse(call)!r} is not an operation; write NAME(ARGUMENTS), such as"
            " 'center_crop(size)'"
        )
    name = call.func.id
    if name not in OPERATIONS:
        raise UserError(f"unknown operation {name!r}; {nearest(name, OPERATIONS)}")
    try:
        return OPERATIONS[name](**_arguments(call, name, image_size))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _arguments(call: ast.Call, name: str, image_size: int) -> dict[str, Any]:
    """Returns the arguments of an operation's call by the names of its fields."""
    fields = dataclasses.fields(OPERATIONS[name])  # type: ignore[arg-type]
    known = [field.name for field in fields]
    if len(call.args) > len(known):
        raise UserError(
            f"it takes at most {len(known)} arguments ({', '.join(known)}), not {len(call.args)}"
        )
    values = dict(zip(known, (_value(node, image_size) for node in call.args), strict=False))
    for keyword in call.keywords:
        if keyword.arg not in known:
            raise UserError(f"it has no argument {keyword.arg!r}; {nearest(keyword.arg, known)}")
        if keyword.arg in values:
            raise UserError(f"it got {keyword.arg!r} twice")
        values[keyword.arg] = _value(keyword.value, image_size)
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in values:
            hint = f"; write for example {name}(size)" if "low" not in known else ""
            raise UserError(f"it needs {field.name!r}{hint}")
    return values


def _value(node: ast.expr, image_size: int) -> Any:
    if isinstance(node, ast.Name) and node.id == "size":
        return image_size
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError) as error:
        raise UserError(
            f"argument {ast.unparse(node)!r} is neither a literal nor 'size'"
        ) from error
