"""The named variants: the paper's grid of widths and resolutions, and timm's two deeper networks.

The grid is that of section 6.1.2 and figure 5; the deeper ones are timm's mobilenetv2_110d and
mobilenetv2_120d (timm/models/efficientnet.py).

Plain data, importable without jax. `MobileNetV2(**asdict(VARIANTS[name].backbone))` is the network.
"""

from dataclasses import dataclass

from mbv2_jax.spec import Backbone, Preprocessing


@dataclass(frozen=True)
class Variant:
    """One network with everything that evaluating it needs; conventions are the PyTorch family's.

    Attributes:
      backbone: the network's fields.
      preprocessing: how an image becomes its input.
    """

    backbone: Backbone
    preprocessing: Preprocessing


def name_of(width: float, image_size: int) -> str:
    """Returns the name of a variant: 'mobilenet_v2_1.0_224' for (1.0, 224)."""
    return f"mobilenet_v2_{width}_{image_size}"


def _variant(width: float, image_size: int) -> Variant:
    # At 224 the crop is seven eighths of the short side, 256. The ports of d-li14 (imagenet.py),
    # tonylins and timm keep this ratio at other resolutions, and truncate; transformers adds 32.
    edge = int(image_size / 0.875)
    transforms = f"resize_edge({edge})|center_crop({image_size})"
    return Variant(
        backbone=Backbone(width=width),
        preprocessing=Preprocessing(image_size=image_size, eval_transforms=transforms),
    )


# The paper's widths and resolutions, and three widths of its ports at full resolution.
_GRID = [(width, size) for width in (0.35, 0.5, 0.75, 1.0) for size in (96, 128, 160, 192, 224)]
_GRID += [(width, 224) for width in (0.25, 1.3, 1.4)]


def _deep(width: float, depth: float) -> Variant:
    return Variant(
        backbone=Backbone(width=width, depth=depth, fixed_ends=True),
        preprocessing=Preprocessing(
            eval_transforms="resize_edge(256, interpolation='bicubic')|center_crop(224)"
        ),
    )


VARIANTS: dict[str, Variant] = {
    **{name_of(*cell): _variant(*cell) for cell in sorted(_GRID)},
    "mobilenet_v2_110d": _deep(width=1.1, depth=1.2),
    "mobilenet_v2_120d": _deep(width=1.2, depth=1.4),
}
