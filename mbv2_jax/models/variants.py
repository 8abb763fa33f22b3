"""The named variants: the paper's grid of widths and resolutions (section 6.1.2, figure 5).

Plain data, importable without jax. `MobileNetV2(**VARIANTS[name].architecture)` is the network.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """What someone else reported for a variant on ImageNet's 50,000 validation images.

    Attributes:
      top1, top5: percent.
      source: who, and of which weights.
    """

    top1: float
    top5: float
    source: str


@dataclass(frozen=True)
class Variant:
    """One network with everything that evaluating it needs; conventions are the PyTorch family's.

    Attributes:
      width: width multiplier.
      image_size: side of the square input, pixels.
      eval_transform: spec of `mbv2_jax.data.transforms.pipeline.make_transform`.
      mean, std: per RGB channel, of pixels in 0..255; the network sees (pixel - mean) / std.
      padding: 'torch' or 'same'.
      bn_epsilon: BatchNorm's.
      published: figures known for it; empty where none is.
    """

    width: float
    image_size: int
    eval_transform: str
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    padding: str = "torch"
    bn_epsilon: float = 1e-5
    published: tuple[Published, ...] = ()

    @property
    def architecture(self) -> dict[str, Any]:
        """The fields of `MobileNetV2` that the variant decides."""
        return {"width": self.width, "padding": self.padding, "bn_epsilon": self.bn_epsilon}


PUBLISHED = {
    "mobilenet_v2_1.0_224": (
        Published(71.86, 90.42, "mmpretrain, mobilenet-v2_8xb32_in1k, weights of 2020-07-08"),
    ),
}


def name_of(width: float, image_size: int) -> str:
    """'mobilenet_v2_1.0_224' of (1.0, 224)."""
    return f"mobilenet_v2_{width}_{image_size}"


def _variant(width: float, image_size: int) -> Variant:
    # 224 is cropped from a short side of 256: seven eighths. d-li14's (imagenet.py), tonylins's and
    # timm's ports keep that share at other resolutions, and truncate; only transformers adds 32.
    edge = int(image_size / 0.875)
    return Variant(
        width=width,
        image_size=image_size,
        eval_transform=f"resize_edge({edge})|center_crop({image_size})",
        published=PUBLISHED.get(name_of(width, image_size), ()),
    )


# The paper's widths and resolutions, and three widths of its ports at full resolution.
_GRID = [(width, size) for width in (0.35, 0.5, 0.75, 1.0) for size in (96, 128, 160, 192, 224)]
_GRID += [(width, 224) for width in (0.25, 1.3, 1.4)]

VARIANTS: dict[str, Variant] = {name_of(*cell): _variant(*cell) for cell in sorted(_GRID)}
