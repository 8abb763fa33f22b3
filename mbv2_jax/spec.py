"""The fields that several parts of the package share, each declared once.

A field is declared with its default, the values it may have, its unit and its meaning. Everything
else derives from that: the sections of a config and their checks, `model.json`, the conventions of
weight files, the named variants, and what `--help` prints. Plain data: nothing here imports jax.

A task declares the fields of its head in the same way, beside its other settings
(`mbv2_jax/tasks/`), and training declares its own in `mbv2_jax/training/settings.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mbv2_jax.errors import nearest

if TYPE_CHECKING:
    import numpy as np

    from mbv2_jax.data.decoding import ImageLike
    from mbv2_jax.data.transforms.pipeline import Transform

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Values:
    """The values that a field may have.

    Attributes:
      type: of the field in a config; `object` where several types are possible.
      wanted: a description of the values that completes "it must be ...".
      accepts: whether a value is one of them.
      options: the values themselves, where there are few.
    """

    type: Any
    wanted: str
    accepts: Callable[[Any], bool]
    options: tuple[Any, ...] = ()

    def fault(self, value: Any) -> str:
        """Returns the fault of `value` and its remedy; "" if the value is possible."""
        if self.accepts(value):
            return ""
        if self.options:
            return f"is {value!r}: {nearest(value, self.options)}"
        return f"is {value!r}: it must be {self.wanted}"


def is_number(value: Any) -> bool:
    """Returns whether `value` is a finite number that a float can hold, and not a bool."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the floats, which JSON may hold
        return False


def is_integer(value: Any) -> bool:
    """Returns whether `value` is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def number(low: float, high: float | None = None, *, above: bool = False) -> Values:
    """Accepts real numbers from `low` (excluding it, with `above`) to `high`."""
    return Values(
        float, _range(low, high, above), lambda v: is_number(v) and _within(v, low, high, above)
    )


def integer(low: int, high: int | None = None) -> Values:
    """Accepts whole numbers from `low` to `high`."""
    return Values(
        int,
        f"a whole number, {_range(low, high)}",
        lambda v: is_integer(v) and _within(v, low, high),
    )


def choice(*options: Any) -> Values:
    """Accepts any of `options`."""
    return Values(type(options[0]), "one of them", lambda v: v in list(options), options)


def flag() -> Values:
    """Accepts True and False."""
    return Values(bool, "True or False", lambda v: isinstance(v, bool))


def text(wanted: str) -> Values:
    """Accepts strings; `wanted` describes them."""
    return Values(str, wanted, lambda v: isinstance(v, str))


def numbers(count: int, wanted: str, accepts: Callable[[Any], bool] = is_number) -> Values:
    """Accepts tuples and lists of `count` numbers, each of which passes `accepts`."""

    def accept(value: Any) -> bool:
        return isinstance(value, (tuple, list)) and len(value) == count and all(map(accepts, value))

    return Values(tuple, wanted, accept)


def sequence(wanted: str, accepts: Callable[[Any], bool]) -> Values:
    """Accepts tuples and lists of any length whose items all pass `accepts`."""
    return Values(tuple, wanted, lambda v: isinstance(v, (tuple, list)) and all(map(accepts, v)))


def _range(low: float, high: float | None, above: bool = False) -> str:
    bound = f"above {low}" if above else f"{low} or more"
    return bound if high is None else f"{bound}, at most {high}"


def _within(value: float, low: float, high: float | None, above: bool = False) -> bool:
    # Written so that NaN is refused too.
    return (value > low if above else value >= low) and (high is None or value <= high)


def declare(
    default: Any,
    values: Values,
    help: str,
    *,
    inherited: bool = False,
    convention: bool = False,
    optional: bool = False,
    shapes: bool = False,
) -> Any:
    """Declares a field of a dataclass.

    Args:
      default: its value where nothing else is given.
      values: the values it may have.
      help: its meaning and unit, one line.
      inherited: whether a config may leave it unset (None), which stands for the checkpoint's value
        or, without a checkpoint, for `default`.
      convention: whether weights that were trained under one value fail under another: they give
        wrong answers, or do not fit. Such a field is inherited, too.
      optional: whether None is a value of its own.
      shapes: whether it decides which arrays a model has, or their shapes, so that it can be told
        from them and not be changed afterwards.
    """
    metadata = {
        "values": values,
        "help": help,
        "inherited": inherited or convention,
        "convention": convention,
        "optional": optional,
        "shapes": shapes,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The fields that change what the network computes from given weights."""

    width: float = declare(
        1.0,
        number(0, above=True),
        "width multiplier (the paper's section 4): each layer's channels times this",
        convention=True,
        shapes=True,
    )
    strides: tuple[int, ...] = declare(
        (2, 1, 2, 2, 2, 1, 2, 1),
        numbers(
            8, "8 numbers, each 1 or 2, such as (2, 1, 2, 2, 2, 1, 2, 1)", lambda v: v in (1, 2)
        ),
        "strides of the stem and of layer1 to layer7; smaller ones suit small images",
        inherited=True,
    )
    padding: str = declare(
        "torch",
        choice("torch", "same"),
        "'torch' pads a 3x3 by 1 on every side; 'same' pads as TensorFlow does",
        convention=True,
    )
    bn_epsilon: float = declare(
        1e-5,
        number(0, above=True),
        "added to BatchNorm's variance: 1e-5 in the PyTorch family, 1e-3 in TensorFlow's",
        convention=True,
    )
    output_stride: int = declare(
        32,
        choice(8, 16, 32),
        "input pixels per output pixel of the last map: 8 and 16 replace later strides by "
        "dilation, 32 leaves the strides as they are",
        inherited=True,
    )
    depth: float = declare(
        1.0,
        number(0, above=True),
        "depth multiplier: layer2 to layer6 have their number of blocks in the paper times this, "
        "rounded up; layer1 and layer7 keep their one",
        convention=True,
        shapes=True,
    )
    fixed_ends: bool = declare(
        False,
        flag(),
        "whether the stem and the last convolution have 32 and 1280 channels at any width, as in "
        "timm's mobilenetv2_110d and mobilenetv2_120d",
        convention=True,
        shapes=True,
    )
    divisor: int = declare(
        8,
        integer(1),
        "the number of channels of each layer is a multiple of this; TensorFlow's DeepLab has 1 at "
        "widths other than 1",
        convention=True,
        shapes=True,
    )
    last_convolution: bool = declare(
        True,
        flag(),
        "whether there is a 1x1 convolution to 1280 channels after layer7; DeepLab's backbone has "
        "none",
        convention=True,
        shapes=True,
    )


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Describes how an image of any size becomes the network's input."""

    image_size: int = declare(
        224, integer(1), "side of the square that the network sees, in pixels", inherited=True
    )
    eval_transforms: str = declare(
        "resize_edge(256)|center_crop(size)",
        text("operations joined by '|', such as resize_edge(256)|center_crop(size)"),
        "operations on an image before evaluation and prediction; `size` is image_size",
        inherited=True,
    )
    mean: tuple[float, ...] = declare(
        (123.675, 116.28, 103.53),
        numbers(3, "three numbers, of R, G and B, 0-255"),
        "mean of R, G and B, in pixel values 0-255; the network sees (pixel - mean) / std",
        convention=True,
    )
    std: tuple[float, ...] = declare(
        (58.395, 57.12, 57.375),
        numbers(3, "three numbers above 0, of R, G and B, 0-255", lambda v: is_number(v) and v > 0),
        "standard deviation of R, G and B, in pixel values 0-255",
        convention=True,
    )

    @functools.cached_property
    def transform(self) -> "Transform":
        """The operations of `eval_transforms`: an image of any size -> (H, W, 3) uint8 pixels.

        Raises:
          UserError: there is no such operation, or it has other arguments.
        """
        from mbv2_jax.data.transforms import pipeline  # here: its modules import this one

        return pipeline.make_transform(self.eval_transforms, self.image_size)

    def prepare(self, image: "ImageLike") -> "np.ndarray":
        """Returns an image as the network sees it, before `normalize`: resized and cropped.

        Args:
          image: a path, an encoded file's bytes, a PIL image, or (H, W, 3) uint8 RGB pixels.

        Returns:
          (H, W, 3) uint8 RGB; H and W are `image_size`, unless `eval_transforms` has other numbers.

        Raises:
          UserError: it cannot be read or decoded, or is none of these.
        """
        return self.transform.from_image(image).image

    def normalize(self, pixels: Any, dtype: Any = "float32") -> Any:
        """Returns (pixels - mean) / std: what the network takes.

        Args:
          pixels: (..., 3) RGB 0-255, uint8 or floating; an array of numpy or of jax, on any device,
            also inside jit.
          dtype: of the result. The arithmetic is float32 or wider, since bfloat16 would lose
            pixels.

        Returns:
          An array of the same kind and shape. Under jit, XLA may round the last bit in another way
          than numpy.
        """
        import numpy as np  # here: --help needs none

        wide = np.promote_types(np.dtype(dtype), np.float32)
        mean, std = (np.asarray(value, wide) for value in (self.mean, self.std))
        return ((pixels.astype(wide) - mean) / std).astype(dtype)


PER_DEVICE = "device"
INT8 = "int8"


def _group_size() -> Values:
    return Values(
        object,
        f"0 (the global batch), {PER_DEVICE!r} (each device's share of it) or a number of examples",
        lambda v: v == PER_DEVICE or (is_integer(v) and v >= 0),
    )


@dataclasses.dataclass(frozen=True)
class TrainingMode:
    """The fields that change how the network is trained, and not what it computes afterwards."""

    dropout: float = declare(
        0.0,
        number(0, 1),
        "probability of dropping an input of the head's last layer, and of its hidden layers, in "
        "training",
        inherited=True,
    )
    bn_momentum: float = declare(
        0.9,
        number(0, 1),
        "share of BatchNorm's running statistics that a step keeps (1 - PyTorch's momentum)",
        convention=True,
    )
    bn_group_size: int | str = declare(
        0,
        _group_size(),
        "examples that BatchNorm normalises together in training: 0, the global batch; 'device', "
        "each device's share of it; N, every N consecutive ones. Running statistics are averaged "
        "over the groups. 'device' is the fastest, and its results depend on the number of devices",
    )
    dtype: str = declare(
        "float32",
        choice("float32", "bfloat16", "float64"),
        "dtype of the computation; parameters and statistics stay float32 or wider",
    )
    remat: bool = declare(
        False, flag(), "compute each block again in the backward pass: less memory, more work"
    )
    frozen_stages: int = declare(
        -1, integer(-1, 7), "0 freezes the stem, k also layer1 to layer<k>, -1 nothing"
    )
    norm_eval: bool = declare(
        False,
        flag(),
        "normalise with the running statistics in training, and leave them as they are",
    )
    folded_norm: bool = declare(
        False,
        flag(),
        "whether BatchNorm's statistics are made up, because the file of the weights had them "
        "folded into the convolutions; training then needs norm_eval",
        convention=True,
    )
    quantize: str = declare(
        "none",
        choice("none", INT8),
        "'int8' rounds weights and activations to 8 bits, as the files of `python -m "
        "mbv2_jax.export --precision=int8` do, so that the network learns to do with that; needs "
        "norm_eval. 'none' rounds nothing",
        inherited=True,
        shapes=True,
    )


# The fields of a training mode that a model keeps, for those who train it further.
KEPT = tuple(f.name for f in dataclasses.fields(TrainingMode) if f.metadata["inherited"])


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model without its arrays: its network and its preprocessing.

    Attributes:
      task: the name of the task, see `mbv2_jax.tasks.find`.
      backbone: the fields of the backbone.
      head: a dataclass of the task; None where there is a backbone alone.
      preprocessing: the fields of the preprocessing.
      mode: how it was trained; a saved model keeps only the fields in KEPT.
    """

    task: str
    backbone: Backbone
    head: Any
    preprocessing: Preprocessing
    mode: TrainingMode = TrainingMode()

    def values(self) -> dict[str, Any]:
        """Returns the values that a model keeps, by their names in a config ("model.width")."""
        head = {} if self.head is None else named("model", self.head)
        mode = {f"model.{name}": getattr(self.mode, name) for name in KEPT}
        return named("model", self.backbone) | head | mode | named("data", self.preprocessing)

    def replace(self, values: Mapping[str, Any]) -> "ModelSpec":
        """Returns a copy with other values, given by their names in a config ("model.width")."""
        parts = {"backbone": "model", "head": "model", "preprocessing": "data", "mode": "model"}
        changed = {}
        for part, section in parts.items():
            old = getattr(self, part)
            if old is not None:
                names = {f.name for f in dataclasses.fields(old)}
                new = {
                    name: values[f"{section}.{name}"]
                    for name in names
                    if f"{section}.{name}" in values
                }
                changed[part] = dataclasses.replace(old, **new)
        return dataclasses.replace(self, **changed)


# The section of a config that holds the fields of each dataclass; a head's are in "model".
SECTIONS = {Backbone: "model", TrainingMode: "model", Preprocessing: "data"}


def named(section: str, values: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass by their names in a config, such as "model.width"."""
    return {f"{section}.{f.name}": getattr(values, f.name) for f in dataclasses.fields(values)}


def inherited(head: type | None = None) -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields that a config takes from a checkpoint, by their names in the config.

    Args:
      head: the dataclass of a task's head, whose fields are among them; None for the shared ones.
    """
    sections = SECTIONS if head is None else {**SECTIONS, head: "model"}
    return {
        f"{section}.{f.name}": f
        for cls, section in sections.items()
        for f in dataclasses.fields(cls)
        if f.metadata["inherited"]
    }


def faults(cls: type, values: Mapping[str, Any], section: str = "") -> list[str]:
    """Returns a line for each impossible value of a dataclass's fields.

    Args:
      cls: a dataclass of declared fields.
      values: some of its fields by name.
      section: the prefix of a field's name in the lines, such as "model".
    """
    declared = {f.name: f for f in dataclasses.fields(cls)}
    found = []
    for name, value in values.items():
        metadata = declared[name].metadata
        fault = "" if value is None and metadata["optional"] else metadata["values"].fault(value)
        if fault:
            found.append(f"{section + '.' if section else ''}{name} {fault}")
    return found


def to_json(values: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the fields of a dataclass (or those in `names`) in their JSON form."""
    names = [f.name for f in dataclasses.fields(values)] if names is None else names
    return {name: plain(getattr(values, name)) for name in names}


def from_json(cls: type[T], values: Mapping[str, Any]) -> T:
    """Returns a dataclass with these values; fields that are not among them keep their default."""
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type] # any dataclass
    return cls(**{name: frozen(value) for name, value in values.items() if name in names})


def frozen(value: Any) -> Any:
    """Returns `value` with tuples for lists; JSON has only lists."""
    return tuple(map(frozen, value)) if isinstance(value, (tuple, list)) else value


def plain(value: Any) -> Any:
    """Returns `value` with lists for tuples, as JSON has them."""
    return list(map(plain, value)) if isinstance(value, (tuple, list)) else value
