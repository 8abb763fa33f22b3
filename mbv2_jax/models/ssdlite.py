"""SSDLite, section 6.2 of the paper: MobileNetV2 with boxes and classes of the objects in it."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mbv2_jax import spec
from mbv2_jax.models import layers
from mbv2_jax.models.layers import Conv, ConvNorm, Rounding, parameter_dtype
from mbv2_jax.models.mobilenet_v2 import Backbone, stage_endpoints
from mbv2_jax.ops.normalization import materialize

# Of mmdet's SSDLite. Every convolution but the last of a head has a normalisation after it.
EXTRA_INIT = nn.initializers.truncated_normal(0.03)
HEAD_INIT = nn.initializers.normal(0.001)


class Anchors(Protocol):
    """The anchors of a network (tasks/detection/anchors.py); hashable.

    Attributes:
      counts: anchors of a position of each map.
    """

    @property
    def counts(self) -> tuple[int, ...]: ...

    def boxes(self, number: int, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """Returns the anchors of a map.

        Args:
          number: of the map, from 0.
          shape: (height, width) of the map.
          size: (height, width) of the image, in pixels.

        Returns:
          (A, 4) float32: x0, y0, x1, y1 in pixels, in the order of `Outputs`.
        """


class Outputs(NamedTuple):
    """The outputs for N images, for each map an array, with the map's anchors.

    The A anchors of a map are in the order of rows, columns, and anchors of a position.

    Attributes:
      logits: (N, A, classes + 1); the last is the background.
      codes: (N, A, 4), of boxes relative to the anchors, see tasks/detection/coding.py.
      anchors: (N, A, 4), x0, y0, x1, y1 in pixels of the image; the same for each image.
      size: (N, 2), height and width of the image in pixels; a single array.
    """

    logits: tuple[jax.Array, ...]
    codes: tuple[jax.Array, ...]
    anchors: tuple[jax.Array, ...]
    size: jax.Array


class SSDLite(nn.Module):
    """Some of the backbone's maps, smaller ones made from the last, and two heads on each.

    An extra map is made from the map before it by a 1x1 convolution to half of its channels and a
    depthwise separable 3x3 with stride 2. A head is a depthwise 3x3 and a 1x1 convolution, which is
    linear; every other convolution has batch normalisation and ReLU6.

    Variables: the backbone's (see `mobilenet_v2.Backbone`), and beside them extra{0,1,...}_reduce,
    extra{i}_depthwise and extra{i}_pointwise (conv/kernel, norm/{scale,bias,mean,var}); for map i
    class_depthwise{i} and box_depthwise{i} with the same, class_logits{i} and box_codes{i} (kernel,
    bias); where `mode.quantize`, also the ranges class_logits{i}_range and box_codes{i}_range (see
    `layers.Rounding`). The channels of class_logits{i} are by anchor, then by class, the background
    last; those of box_codes{i} by anchor, then x, y, width and height.

    Attributes:
      num_classes: without the background.
      anchors: their number at each position, and their boxes.
      taps: the backbone's maps: endpoints (`mobilenet_v2.feature_info`), or stages, "layer5".
      extra_channels: channels of each extra map.
      architecture: the backbone's fields.
      mode: the fields that change how the network is trained; `bn_group_size` must be a number.
      folded: whether, for inference, normalisations are part of the convolutions. The variables
        are then those that `folding.fold` returns.
      head: the task's fields of the head, for `mbv2_jax.save`; nothing here reads them.
    """

    num_classes: int
    anchors: Anchors
    taps: Sequence[str] = ("layer5", "last")
    extra_channels: Sequence[int] = (512, 256, 256, 128)
    architecture: spec.Backbone = spec.Backbone()
    mode: spec.TrainingMode = spec.TrainingMode()
    folded: bool = False
    head: Any = None

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return jnp.dtype(self.mode.dtype)

    @property
    def _quantize(self) -> bool:
        return layers.quantizes(self.mode, self.folded)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> Outputs:
        """Finds objects.

        Args:
          x: (N, H, W, 3), floating, already normalised.
          train: whether to normalise with the batch's statistics, and update the running ones
            (where the caller makes `batch_stats` mutable).

        Returns:
          Logits, codes and anchors, float32, or float64 where the compute dtype is.

        Raises:
          ValueError: the input or a field is not as described.
        """
        mode = self.mode
        learn = train and not mode.norm_eval  # whether BatchNorm uses the batch's statistics
        outputs = stages(self.architecture)
        endpoints = tuple(outputs.get(tap, tap) for tap in self.taps)
        backbone = Backbone(self.architecture, mode, endpoints, self.folded)
        nn.share_scope(self, backbone)
        found = backbone(x, train)
        layer = partial(
            ConvNorm,
            padding=self.architecture.padding,
            bn_epsilon=self.architecture.bn_epsilon,
            bn_momentum=mode.bn_momentum,
            bn_group_size=int(mode.bn_group_size),
            dtype=self.dtype,
            folded=self.folded,
            quantize=self._quantize,
        )
        maps = [found[name] for name in endpoints]
        for i, channels in enumerate(self.extra_channels):
            maps.append(self._extra(i, channels, maps[-1], layer, learn))
        if len(maps) != len(self.anchors.counts):
            raise ValueError(f"{len(maps)} maps, and anchors for {len(self.anchors.counts)}")
        kept = parameter_dtype(self.dtype)
        images = x.shape[0]  # symbolic in jax.export, and then without len()
        logits, codes, anchors = [], [], []
        for i, (features, count) in enumerate(zip(maps, self.anchors.counts, strict=True)):
            head = partial(self._head, i, features, layer, learn)
            y = head("class_depthwise", "class_logits", count * (self.num_classes + 1))
            logits.append(y.reshape(images, -1, self.num_classes + 1).astype(kept))
            y = head("box_depthwise", "box_codes", count * 4)  # (N, h, w, count * 4)
            codes.append(y.reshape(images, -1, 4).astype(kept))  # (N, h * w * count, 4)
            table = self.anchors.boxes(i, _size(features), _size(x))
            boxes = jnp.asarray(table, kept)  # (h * w * count, 4)
            anchors.append(jnp.broadcast_to(boxes, (images, *boxes.shape)))
        size = jnp.broadcast_to(jnp.asarray(_size(x), kept), (images, 2))
        return Outputs(tuple(logits), tuple(codes), tuple(anchors), size)

    def _extra(self, i: int, channels: int, x: jax.Array, layer: Any, learn: bool) -> jax.Array:
        """Returns an extra map: (N, H, W, C) -> (N, ceil(H / 2), ceil(W / 2), channels)."""
        layer = partial(layer, kernel_init=EXTRA_INIT)
        half = channels // 2
        y = layer(half, name=f"extra{i}_reduce")(x, learn)  # (N, H, W, channels / 2)
        window = {"kernel_size": 3, "stride": 2, "depthwise": True}
        y = layer(half, **window, name=f"extra{i}_depthwise")(y, learn)  # (N, H/2, W/2, ...)
        return materialize(layer(channels, name=f"extra{i}_pointwise")(y, learn))

    def _head(
        self, i: int, x: jax.Array, layer: Any, learn: bool, first: str, last: str, channels: int
    ) -> jax.Array:
        """Returns the outputs of a head: (N, H, W, C) -> (N, H, W, channels)."""
        layer = partial(layer, kernel_init=HEAD_INIT)
        y = layer(x.shape[-1], kernel_size=3, depthwise=True, name=f"{first}{i}")(x, learn)
        conv = Conv(
            channels,
            dtype=self.dtype,
            bias=True,
            kernel_init=HEAD_INIT,
            quantize=self._quantize,
            name=f"{last}{i}",
        )
        return Rounding(name=f"{last}{i}_range")(conv(y)) if self._quantize else conv(y)


def _size(x: jax.Array) -> tuple[int, int]:
    """Returns (H, W) of (N, H, W, C)."""
    return x.shape[1], x.shape[2]


def stages(architecture: spec.Backbone) -> dict[str, str]:
    """Returns the endpoint of each stage's output by the stage's name: {"layer5": "layer5_2"}."""
    return {name.split("_")[0]: name for name in stage_endpoints(architecture)}
