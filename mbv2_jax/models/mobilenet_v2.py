"""MobileNetV2: Inverted Residuals and Linear Bottlenecks (arXiv:1801.04381), in flax.linen."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbv2_jax.models.layers import ConvNorm, make_divisible, parameter_dtype
from mbv2_jax.ops.normalization import Activation, materialize


class Stage(NamedTuple):
    """A row of Table 2: `blocks` inverted residuals, the first of which has the stride."""

    expansion: int  # t
    channels: int  # c, at width 1
    blocks: int  # n
    stride: int  # s


# Table 2 of the paper. Its first row, the stem, is a 3x3 convolution to 32 channels with stride 2;
# its last three are a 1x1 convolution to 1280, the average pool, and the classifier.
STEM_CHANNELS, STEM_STRIDE = 32, 2
STAGES = (
    #     t  c   n  s                at 224 x 224
    Stage(1, 16, 1, 1),  # layer1  112 x 112 x  32 -> 112 x 112 x  16
    Stage(6, 24, 2, 2),  # layer2  112 x 112 x  16 ->  56 x  56 x  24
    Stage(6, 32, 3, 2),  # layer3   56 x  56 x  24 ->  28 x  28 x  32
    Stage(6, 64, 4, 2),  # layer4   28 x  28 x  32 ->  14 x  14 x  64
    Stage(6, 96, 3, 1),  # layer5   14 x  14 x  64 ->  14 x  14 x  96
    Stage(6, 160, 3, 2),  # layer6   14 x  14 x  96 ->   7 x   7 x 160
    Stage(6, 320, 1, 1),  # layer7    7 x   7 x 160 ->   7 x   7 x 320
)
LAST_CHANNELS = 1280


class InvertedResidual(nn.Module):
    """Table 1 of the paper: expand, filter depthwise, project to a linear bottleneck.

    Attributes:
      channels: of the output.
      expansion: t, the width of the middle over that of the input; 1 = no expansion layer.
      stride: of the depthwise convolution.
      layer: makes a `ConvNorm` with the network's conventions.
    """

    channels: int
    expansion: int
    stride: int
    layer: Any

    @nn.compact
    def __call__(self, x: Activation, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), channels)."""
        inputs = x.shape[-1]
        inner = self.expansion * inputs
        y = x
        if self.expansion != 1:
            y = self.layer(inner, name="expand")(y, train)  # (N, H, W, tC)
        y = self.layer(inner, kernel_size=3, stride=self.stride, depthwise=True, name="depthwise")(
            y, train
        )  # (N, H/s, W/s, tC)
        y = self.layer(self.channels, relu6=False, name="project")(y, train)  # (N, H/s, W/s, C')
        if self.stride != 1 or inputs != self.channels:
            return y
        return x + y


class MobileNetV2(nn.Module):
    """The network of Table 2, with the conventions of its ports as fields.

    Variables: `params` (stem, layer{1..7}_{j}/{expand,depthwise,project}, last: each conv/kernel
    and norm/{scale,bias}; classifier/{kernel,bias}) and `batch_stats` (norm/{mean,var}). They are
    float32, or float64 where `dtype` is. Training with dropout takes an rng named 'dropout'.

    Attributes:
      num_classes: of the classifier; None = no pool and no classifier, feature maps come out.
      width: the width multiplier, section 4 ("Trade-off hyper parameters"): every layer's channels
        times this, but the last convolution's only where it is above 1.
      dropout: the fraction of pooled features dropped before the classifier (torchvision 0.2,
        mmpretrain 0).
      padding: 'torch' (1 on every side of a 3x3) or 'same' (TensorFlow's, asymmetric at stride 2).
      bn_epsilon: 1e-5 in the PyTorch family, 1e-3 in TensorFlow's.
      bn_momentum: what is kept of the running statistics each step (Flax's sense, 1 - torch's).
      bn_group_size: 0 = BatchNorm statistics over the global batch; N = over each N consecutive
        examples, running statistics averaged over the groups (see `layers.BatchNorm`).
      dtype: of the arithmetic.
      out_indices: the feature maps to return, 0..6 = layer1..layer7, 7 = the last convolution, in
        the network's order (mmpretrain's field); only read where num_classes is None.
      strides: of the stem and layer1..layer7; smaller ones for small images.
      remat: compute each block again in the backward pass instead of keeping its activations
        (mmpretrain's `with_cp`).
      frozen_stages: as mmpretrain's. k >= 0: the stem's parameters get no gradient (its statistics
        still follow the training batches); layer1..layer{k} get none either and normalise with
        their running statistics. -1 = nothing. See `trainable`.
      norm_eval: normalise with the running statistics everywhere while training, and keep them.
      folded: for inference: normalisations are part of the convolutions, which have biases; the
        variables are what `folding.fold` makes of the others: conv/{kernel,bias}, no batch_stats.
    """

    num_classes: int | None = 1000
    width: float = 1.0
    dropout: float = 0.0
    padding: str = "torch"
    bn_epsilon: float = 1e-5
    bn_momentum: float = 0.9
    bn_group_size: int = 0
    dtype: Any = jnp.float32
    out_indices: Sequence[int] = (7,)
    strides: Sequence[int] = (STEM_STRIDE, *(stage.stride for stage in STAGES))
    remat: bool = False
    frozen_stages: int = -1
    norm_eval: bool = False
    output_stride: int = 32
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array | tuple[jax.Array, ...]:
        """Classifies images, or returns their feature maps.

        Args:
          x: (N, H, W, 3), floating, already normalised.
          train: normalise with the batch's statistics, update the running ones (where the caller
            makes `batch_stats` mutable), and drop out.

        Returns:
          Logits (N, num_classes), float32 (float64 where `dtype` is). With num_classes None the
          feature maps of `out_indices`, in `dtype`.

        Raises:
          ValueError: the input or a field is not as described.
        """
        self._check(x, train)
        learn = train and not self.norm_eval  # where BatchNorm learns its statistics
        layer = partial(
            ConvNorm,
            padding=self.padding,
            bn_epsilon=self.bn_epsilon,
            bn_momentum=self.bn_momentum,
            bn_group_size=self.bn_group_size,
            dtype=self.dtype,
            folded=self.folded,
        )
        block = nn.remat(InvertedResidual, static_argnums=(2,)) if self.remat else InvertedResidual

        stem = partial(layer, kernel_size=3, stride=self.strides[0], frozen=self.frozen_stages >= 0)
        y: Any = stem(make_divisible(STEM_CHANNELS * self.width), name="stem")(
            x, learn
        )  # (N, H/2, W/2, 32)
        features = []
        for i, stage in enumerate(STAGES, start=1):
            frozen = i <= self.frozen_stages
            for j in range(stage.blocks):
                y = block(
                    channels=make_divisible(stage.channels * self.width),
                    expansion=stage.expansion,
                    stride=self.strides[i] if j == 0 else 1,
                    layer=partial(layer, frozen=frozen),
                    name=f"layer{i}_{j}",
                )(y, learn and not frozen)
            features.append(y)
        last = layer(make_divisible(LAST_CHANNELS * max(self.width, 1.0)), name="last")
        y = materialize(last(y, learn))
        features.append(y)  # (N, H/32, W/32, 1280)
        if self.num_classes is None:
            return tuple(features[i] for i in sorted(set(self.out_indices)))

        # Pooled features and logits are few: float32 costs nothing, bfloat16 would cost digits.
        kept = parameter_dtype(self.dtype)
        x = y.astype(kept).mean((1, 2))  # (N, 1280)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(
            self.num_classes,
            dtype=kept,
            param_dtype=kept,
            kernel_init=nn.initializers.normal(0.01),
            name="classifier",
        )(x)

    def _check(self, x: jax.Array, train: bool) -> None:
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"images must be (N, H, W, 3), floating and normalised, not {x.dtype} {x.shape}"
            )
        if len(self.strides) != 1 + len(STAGES) or not set(self.strides) <= {1, 2}:
            raise ValueError(f"strides must be {1 + len(STAGES)} of 1 or 2, not {self.strides}")
        if not set(self.out_indices) <= set(range(len(STAGES) + 1)):
            raise ValueError(f"out_indices must lie in 0..{len(STAGES)}, not {self.out_indices}")
        if train and self.folded:
            raise ValueError("a folded network has no statistics to train with: train it unfolded")
        if self.bn_group_size < 0:
            raise ValueError(f"bn_group_size must be 0 or more, not {self.bn_group_size}")
        check_frozen_stages(self.frozen_stages)


def check_frozen_stages(frozen_stages: int) -> None:
    """Raises ValueError unless `frozen_stages` is -1..7."""
    if frozen_stages not in range(-1, len(STAGES) + 1):
        raise ValueError(f"frozen_stages must lie in -1..{len(STAGES)}, not {frozen_stages}")


def trainable(params: Mapping[str, Any], frozen_stages: int) -> dict[str, Any]:
    """Says which parameters an optimizer may move.

    A frozen parameter's gradient is zero, but weight decay would still move it: mask its update.

    Args:
      params: the 'params' collection of a `MobileNetV2`, with or without classifier.
      frozen_stages: as the model's.

    Returns:
      The same tree with False in the stem and layer1..layer{frozen_stages} where these are frozen
      (the stem for frozen_stages >= 0), else True.

    Raises:
      ValueError: `frozen_stages` is not -1..7.
    """
    check_frozen_stages(frozen_stages)
    frozen = ["stem"] if frozen_stages >= 0 else []
    frozen += [f"layer{i}" for i in range(1, frozen_stages + 1)]
    return {
        name: jax.tree.map(lambda _, name=name: name.split("_")[0] not in frozen, subtree)
        for name, subtree in params.items()
    }
