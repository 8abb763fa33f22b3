"""Mobile DeepLabv3, section 6.3 of the paper: MobileNetV2 with a class for every pixel."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbv2_jax import spec
from mbv2_jax.errors import UserError
from mbv2_jax.models import folding, layers
from mbv2_jax.models.layers import Conv, ConvNorm, Rounding, parameter_dtype
from mbv2_jax.models.mobilenet_v2 import Backbone, stage_endpoints
from mbv2_jax.ops.normalization import materialize
from mbv2_jax.ops.resize import resize_bilinear

# Of TensorFlow's deeplab (research/deeplab/model.py), and of transformers' port.
CHANNELS = 256
EPSILON = 1e-5  # of the head's batch normalisations, whatever the backbone's is
# The layers of the head that have a normalisation, in the order in which they run. There is an
# "aspp{i}" for each rate.
POOLING, POINTWISE, PROJECTION = "image_pooling", "aspp0", "projection"
LOGITS = "logits"  # the layer after them, which has none
# The output stride for which `aspp_rates` are given.
RATES_AT = 16


def is_of_head(layer: str) -> bool:
    """Returns whether a layer is the head's, by its name."""
    return layer in (POOLING, PROJECTION, LOGITS) or layer.startswith("aspp")


class DeepLabV3(nn.Module):
    """The backbone up to layer7, and the head that classifies each position of its map.

    The head: image pooling (the mean of the map, a 1x1 convolution, spread over the map again)
    beside a 1x1 convolution and, with `aspp_rates`, dilated 3x3 ones; concatenated; projected by a
    1x1 convolution; dropout; a 1x1 convolution to logits. Each but the last has batch normalisation
    and ReLU, and 256 channels.

    Variables: the backbone's (see `mobilenet_v2.Backbone`; there is no `last`), and beside them
    those of image_pooling, aspp{0,1,...} and projection (conv/kernel, norm/{scale,bias,mean,var})
    and logits/{kernel,bias}; where `mode.quantize`, also pooled_range, concatenation_range,
    projection_range and logits_range (see `layers.Rounding`). Training with dropout takes an rng
    named 'dropout'.

    Attributes:
      num_classes: logits of each pixel.
      aspp_rates: dilations of the 3x3 convolutions at output stride 16; at 8 they double, at 32
        they are halved, so that the convolutions see the same part of the image.
      align_corners: how logits are resized to the image, see `ops.resize.resize_bilinear`.
      architecture: the backbone's fields; output_stride 16 and 8 give finer maps.
      mode: the fields that change how the network is trained; `bn_group_size` must be a number.
      folded: whether, for inference, normalisations are part of the convolutions. The variables
        are then those that `Segmentation.fold` returns.
    """

    num_classes: int
    aspp_rates: Sequence[int] = ()
    align_corners: bool = True
    architecture: spec.Backbone = spec.Backbone(output_stride=16, last_convolution=False)
    mode: spec.TrainingMode = spec.TrainingMode()
    folded: bool = False

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return jnp.dtype(self.mode.dtype)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies each pixel.

        Args:
          x: (N, H, W, 3), floating, already normalised.
          train: whether to normalise with the batch's statistics, update the running ones (where
            the caller makes `batch_stats` mutable), and drop out.

        Returns:
          Logits (N, H, W, num_classes): those of `coarse_logits`, resized. They are float32, or
          float64 where the compute dtype is.

        Raises:
          ValueError: the input or a field is not as described.
          UserError: in training, BatchNorm would see a single example.
        """
        logits = self.coarse_logits(x, train=train)
        return resize_bilinear(logits, x.shape[1:3], align_corners=self.align_corners)

    @nn.compact
    def coarse_logits(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies each position of the backbone's last map.

        Args:
          x, train: as `__call__` takes them.

        Returns:
          Logits (N, ceil(H / output_stride), ceil(W / output_stride), num_classes), of the dtype of
          `__call__`.
        """
        mode = self.mode
        learn = train and not mode.norm_eval  # whether BatchNorm uses the batch's statistics
        if learn and not self.is_initializing():
            self._check_groups(len(x))
        last = stage_endpoints(self.architecture)[-1]
        backbone = Backbone(self.architecture, mode, (last,), self.folded)
        nn.share_scope(self, backbone)
        features = backbone(x, train)[last]  # (N, h, w, 320)
        layer = partial(
            ConvNorm,
            CHANNELS,
            relu6=False,
            padding=self.architecture.padding,
            bn_epsilon=EPSILON,
            bn_momentum=mode.bn_momentum,
            bn_group_size=int(mode.bn_group_size),
            dtype=self.dtype,
            folded=self.folded,
            quantize=self._quantize,
            round_result=False,  # but after ReLU, and after concatenation
        )

        def activated(inputs: jax.Array, name: str, **window: Any) -> jax.Array:
            return nn.relu(materialize(layer(name=name, **window)(inputs, learn)))

        kept = parameter_dtype(self.dtype)
        pooled = features.astype(kept).mean((1, 2), keepdims=True)  # (N, 1, 1, 320)
        pooled = activated(self._rounded(pooled, "pooled_range"), POOLING)
        branches = [jnp.broadcast_to(pooled, (*features.shape[:3], CHANNELS))]
        branches += [activated(features, POINTWISE)]
        for i, rate in enumerate(self.rates(), start=1):
            branches += [activated(features, f"aspp{i}", kernel_size=3, dilation=rate)]
        y = jnp.concatenate(branches, -1)  # (N, h, w, 256 * branches)
        y = activated(self._rounded(y, "concatenation_range"), PROJECTION)  # (N, h, w, 256)
        y = self._rounded(y, f"{PROJECTION}_range")
        y = nn.Dropout(mode.dropout, deterministic=not train)(y)
        y = Conv(
            self.num_classes,
            dtype=kept,  # few: bfloat16 would save no time, and only lose precision
            bias=True,
            kernel_init=nn.initializers.truncated_normal(0.01),
            quantize=self._quantize,
            name=LOGITS,
        )(y)
        return self._rounded(y, f"{LOGITS}_range")

    @property
    def _quantize(self) -> bool:
        return layers.quantizes(self.mode, self.folded)

    def _rounded(self, x: jax.Array, name: str) -> jax.Array:
        return Rounding(name=name)(x) if self._quantize else x

    def _check_groups(self, batch: int) -> None:
        """Refuses groups of one example, of which image pooling leaves one value per channel."""
        if layers.count_groups(batch, int(self.mode.bn_group_size)) == batch:
            raise UserError(
                "batch normalisation would see one example at a time, and image pooling leaves one "
                "value of it per channel: raise batch_size or model.bn_group_size, or set "
                "model.norm_eval to True"
            )

    def rates(self) -> tuple[int, ...]:
        """Returns the dilations of the 3x3 convolutions at this network's output stride."""
        stride = self.architecture.output_stride
        return tuple(max(1, rate * RATES_AT // stride) for rate in self.aspp_rates)


def fold(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
    """Returns the parameters of the folded network, see `folding.fold`.

    Args:
      params, batch_stats: of a `DeepLabV3` that is not folded.
      epsilon: of the backbone's normalisations; the head's have their own.
    """
    folded = folding.fold(params, batch_stats, epsilon)
    head = {name: stats for name, stats in batch_stats.items() if is_of_head(name)}
    return folded | folding.fold({name: params[name] for name in head}, head, EPSILON)
