"""MobileNetV2: Inverted Residuals and Linear Bottlenecks (arXiv:1801.04381), in flax.linen."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbv2_jax import spec
from mbv2_jax.errors import nearest
from mbv2_jax.models.classifier import Classifier
from mbv2_jax.models.layers import ConvNorm, Rounding, make_divisible, quantizes
from mbv2_jax.ops.normalization import Activation, materialize


class Stage(NamedTuple):
    """A row of Table 2: `blocks` inverted residuals, the first of which has the stride."""

    expansion: int  # t
    channels: int  # c, at width 1
    blocks: int  # n
    stride: int  # s


# Table 2 of the paper. Its first row, the stem, is a 3x3 convolution to 32 channels with stride 2;
# its last three are a 1x1 convolution to 1280, the average pool, and the classifier.
STEM_CHANNELS = 32
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


class Block(NamedTuple):
    """The sizes of an inverted residual.

    Attributes:
      name: 'layer2_0', the first block of layer2.
      stage: the number of its stage: 2 for layer2.
      expansion: t, the ratio of the inner channels to the input's; 1 means no expansion layer.
      inner: channels of the depthwise convolution.
      channels: channels of the output.
      stride: stride of the depthwise convolution.
      dilation: dilation of the depthwise convolution.
      input_reduction: input pixels of the network per input pixel of the block, on each axis.
    """

    name: str
    stage: int
    expansion: int
    inner: int
    channels: int
    stride: int
    dilation: int
    input_reduction: int


class FeatureInfo(NamedTuple):
    """The size of a feature map.

    Attributes:
      channels: its channels.
      reduction: pixels of the image per pixel of the map, on each axis.
    """

    channels: int
    reduction: int


def stage_depths(architecture: spec.Backbone) -> tuple[int, ...]:
    """Returns the number of blocks of layer1 to layer7; those at the ends ignore the depth."""
    first, *inner, last = (stage.blocks for stage in STAGES)
    return first, *(math.ceil(count * architecture.depth) for count in inner), last


def blocks(architecture: spec.Backbone) -> list[Block]:
    """Returns the inverted residuals of layer1 to layer7, in order.

    With an output stride of 8 or 16, a block whose stride would exceed it has stride 1 instead, and
    the blocks after it are dilated by the lost stride, as in TensorFlow's deeplab
    (research/slim/nets/mobilenet/mobilenet.py). The default changes no stride.
    """
    found = []
    inputs = _stem_channels(architecture)
    reduction, dilation = architecture.strides[0], 1
    dilates = architecture.output_stride != spec.Backbone.output_stride
    stages = zip(STAGES, stage_depths(architecture), strict=True)
    for i, (stage, depth) in enumerate(stages, start=1):
        for j in range(depth):
            stride = architecture.strides[i] if j == 0 else 1
            lost = stride if dilates and reduction == architecture.output_stride else 1
            block = Block(
                name=f"layer{i}_{j}",
                stage=i,
                expansion=stage.expansion,
                inner=stage.expansion * inputs,
                channels=make_divisible(stage.channels * architecture.width, architecture.divisor),
                stride=stride // lost,
                dilation=dilation,
                input_reduction=reduction,
            )
            found.append(block)
            dilation *= lost
            reduction *= block.stride
            inputs = block.channels
    return found


def feature_info(architecture: spec.Backbone | None = None) -> dict[str, FeatureInfo]:
    """Returns the feature maps that a `Backbone` can return, in the order it computes them.

    "stem", "layer1_0", ..., "layer7_0" and "last" are the layers' outputs; "layer6_0/expand" is a
    block's expansion, after ReLU6. Without the last convolution there is no "last". Nothing is
    traced or run.

    Args:
      architecture: the backbone's fields; by default the paper's network.
    """
    architecture = architecture or spec.Backbone()
    reduction = architecture.strides[0]
    found = {"stem": FeatureInfo(_stem_channels(architecture), reduction)}
    for block in blocks(architecture):
        if block.expansion != 1:
            found[f"{block.name}/expand"] = FeatureInfo(block.inner, block.input_reduction)
        reduction = block.input_reduction * block.stride
        found[block.name] = FeatureInfo(block.channels, reduction)
    if architecture.last_convolution:
        found["last"] = FeatureInfo(_last_channels(architecture), reduction)
    return found


def endpoint_sizes(architecture: spec.Backbone, endpoints: Sequence[str]) -> list[FeatureInfo]:
    """Returns the sizes of some of the maps of `feature_info`.

    Raises:
      ValueError: there is no such endpoint.
    """
    known = feature_info(architecture)
    for name in endpoints:
        if name not in known:
            raise ValueError(f"there is no endpoint {name!r}: {nearest(name, known)}")
    return [known[name] for name in endpoints]


def stage_endpoints(architecture: spec.Backbone) -> tuple[str, ...]:
    """Returns the names of the outputs of layer1 to layer7: "layer1_0", "layer2_1", ..."""
    depths = enumerate(stage_depths(architecture), start=1)
    return tuple(f"layer{i}_{depth - 1}" for i, depth in depths)


def map_endpoints(architecture: spec.Backbone) -> tuple[str, ...]:
    """Returns the names of the maps that `out_indices` counts, of which the last one is pooled.

    They are the outputs of layer1 to layer7 and, where there is one, of the last convolution.
    """
    last = ("last",) if architecture.last_convolution else ()
    return *stage_endpoints(architecture), *last


def _stem_channels(architecture: spec.Backbone) -> int:
    width = 1.0 if architecture.fixed_ends else architecture.width
    return make_divisible(STEM_CHANNELS * width, architecture.divisor)


def _last_channels(architecture: spec.Backbone) -> int:
    width = 1.0 if architecture.fixed_ends else max(architecture.width, 1.0)
    return make_divisible(LAST_CHANNELS * width, architecture.divisor)


class InvertedResidual(nn.Module):
    """Table 1 of the paper: expand, filter depthwise, project to a linear bottleneck.

    Attributes:
      block: its sizes.
      layer: a function that makes a `ConvNorm` with the network's conventions.
      quantize: whether a sum is rounded to 8 bits, as "sum".
    """

    block: Block
    layer: Any
    quantize: bool = False

    @nn.compact
    def __call__(self, x: Activation, train: bool) -> tuple[jax.Array, Activation | None]:
        """Computes the block.

        Args:
          x: (N, H, W, C).
          train: see `ConvNorm`.

        Returns:
          The output (N, ceil(H / stride), ceil(W / stride), channels), and the expansion
          (N, H, W, inner), None where there is no expansion layer.
        """
        block = self.block
        expanded = None
        y = x
        if block.expansion != 1:
            y = expanded = self.layer(block.inner, name="expand")(y, train)  # (N, H, W, tC)
        y = self.layer(
            block.inner,
            kernel_size=3,
            stride=block.stride,
            dilation=block.dilation,
            depthwise=True,
            name="depthwise",
        )(y, train)  # (N, H/s, W/s, tC)
        y = self.layer(block.channels, relu6=False, name="project")(y, train)  # (N, H/s, W/s, C')
        if block.stride == 1 and x.shape[-1] == block.channels:
            y = x + y
            if self.quantize:
                y = Rounding(name="sum")(y)
        return y, expanded


class Backbone(nn.Module):
    """The network of Table 2 up to its last convolution, with the conventions of its ports.

    Other networks are built on it with `nn.share_scope`, so that its parameters have the same names
    in all of them; see `MobileNetV2`.

    Variables: `params` (stem, layer{1..7}_{j}/{expand,depthwise,project}, last: each conv/kernel
    and norm/{scale,bias}) and `batch_stats` (norm/{mean,var}). They are float32, or float64 where
    the compute dtype is.

    Attributes:
      architecture: the fields that change what the network computes from given weights.
      mode: the fields that change how it is trained; `bn_group_size` must be a number. Dropout is
        left to the head.
      endpoints: names of the feature maps to return, see `feature_info`. Layers after the last of
        them are neither run nor created.
      folded: whether, for inference, normalisations are folded into the convolutions. The variables
        are then those that `folding.fold` returns: conv/{kernel,bias}, and no batch_stats.

    With `mode.quantize`, batch_stats also has {layer}/range/{low,high} and {block}/sum/{low,high},
    (), see `layers.Rounding`.
    """

    architecture: spec.Backbone = spec.Backbone()
    mode: spec.TrainingMode = spec.TrainingMode()
    endpoints: Sequence[str] = ("last",)
    folded: bool = False

    @property
    def channels(self) -> tuple[int, ...]:
        """The channels of each of `endpoints`; timm's feature_info.channels()."""
        return tuple(info.channels for info in endpoint_sizes(self.architecture, self.endpoints))

    @property
    def reductions(self) -> tuple[int, ...]:
        """The pixels of the image per pixel of each of `endpoints`, on each axis."""
        return tuple(info.reduction for info in endpoint_sizes(self.architecture, self.endpoints))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """Computes feature maps.

        Args:
          x: (N, H, W, 3), floating, already normalised.
          train: whether to normalise with the batch's statistics, and to update the running ones
            (where the caller makes `batch_stats` mutable).

        Returns:
          The feature maps (N, h, w, channels) of `endpoints` by name, in the compute dtype.

        Raises:
          ValueError: the input or a field is not as described.
        """
        self._check(x, train)
        architecture, mode = self.architecture, self.mode
        learn = train and not mode.norm_eval  # whether BatchNorm uses the batch's statistics
        quantize = quantizes(mode, self.folded)
        layer = partial(
            ConvNorm,
            padding=architecture.padding,
            bn_epsilon=architecture.bn_epsilon,
            bn_momentum=mode.bn_momentum,
            bn_group_size=int(mode.bn_group_size),
            dtype=jnp.dtype(mode.dtype),
            folded=self.folded,
            quantize=quantize,
        )
        make_block: Any = InvertedResidual
        if mode.remat:
            make_block = nn.remat(InvertedResidual, static_argnums=(2,))
        wanted = set(self.endpoints)
        found: dict[str, Any] = {}

        y: Any = layer(
            _stem_channels(architecture),
            kernel_size=3,
            stride=architecture.strides[0],
            frozen=mode.frozen_stages >= 0,
            name="stem",
        )(x, learn)
        found["stem"] = y  # (N, H/2, W/2, 32)
        for block in blocks(architecture):
            if wanted <= found.keys():
                break
            frozen = block.stage <= mode.frozen_stages
            make_layer = partial(layer, frozen=frozen)
            y, expanded = make_block(block, make_layer, quantize, name=block.name)(
                y, learn and not frozen
            )
            found |= {f"{block.name}/expand": expanded, block.name: y}
        if "last" in wanted:
            found["last"] = layer(_last_channels(architecture), name="last")(
                y, learn
            )  # (N, H/32, W/32, 1280)
        return {name: materialize(found[name]) for name in self.endpoints}

    def _check(self, x: jax.Array, train: bool) -> None:
        strides = self.architecture.strides
        group_size: Any = self.mode.bn_group_size
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"images must be (N, H, W, 3), floating and normalised, not {x.dtype} {x.shape}"
            )
        if len(strides) != 1 + len(STAGES) or not set(strides) <= {1, 2}:
            raise ValueError(f"strides must be {1 + len(STAGES)} of 1 or 2, not {strides}")
        if not self.architecture.depth > 0:
            raise ValueError(f"depth must be above 0, not {self.architecture.depth}")
        if self.architecture.output_stride not in (8, 16, 32):
            raise ValueError(
                f"output_stride must be 8, 16 or 32, not {self.architecture.output_stride}"
            )
        endpoint_sizes(self.architecture, self.endpoints)
        if train and self.folded:
            raise ValueError("a folded network has no statistics to train with: train it unfolded")
        if train and self.mode.folded_norm and not self.mode.norm_eval:
            raise ValueError(
                "folded_norm: the file of these weights had no statistics of BatchNorm, and those "
                "here are made up: train with norm_eval=True"
            )
        if train and quantizes(self.mode, self.folded) and not self.mode.norm_eval:
            raise ValueError(
                "quantize: normalisations are part of 8-bit weights, and must not change with each "
                "batch: train with norm_eval=True"
            )
        if quantizes(self.mode, self.folded) and self.mode.dtype == "bfloat16":
            raise ValueError("quantize: the steps of bfloat16 are wider than those of 8 bits")
        if not spec.is_integer(group_size) or group_size < 0:
            raise ValueError(f"bn_group_size must be 0 or more, not {group_size}")
        check_frozen_stages(self.mode.frozen_stages)


class MobileNetV2(nn.Module):
    """The classification network of Table 2: `Backbone` and `Classifier`, with flat fields.

    Without the last convolution, the classifier gets the output of layer7.

    Variables: those of both, side by side. Training with dropout takes an rng named 'dropout'.

    Attributes:
      num_classes: number of logits; None leaves out the classifier and returns feature maps.
      width: the width multiplier, section 4 ("Trade-off hyper parameters"), by which every layer's
        channels are multiplied; the last convolution's only if it is above 1.
      dropout: the fraction of pooled features dropped before the classifier (torchvision 0.2,
        mmpretrain 0), and of the outputs of each hidden layer.
      padding: 'torch' (1 on every side of a 3x3) or 'same' (TensorFlow's, asymmetric at stride 2).
      bn_epsilon: 1e-5 in the PyTorch family, 1e-3 in TensorFlow's.
      bn_momentum: share of the running statistics that each step keeps (1 - torch's momentum).
      bn_group_size: 0 = BatchNorm statistics over the global batch; N = over each N consecutive
        examples, running statistics averaged over the groups (see `layers.BatchNorm`).
      dtype: compute dtype.
      out_indices: the feature maps to return, 0..6 = layer1..layer7, 7 = the last convolution, in
        the network's order (mmpretrain's field); None returns the last one. Only read where
        num_classes is None.
      strides: of the stem and layer1..layer7; small images need smaller ones.
      remat: recompute each block in the backward pass instead of keeping its activations
        (mmpretrain's `with_cp`).
      frozen_stages: as mmpretrain's. k >= 0: the stem's parameters get no gradient (its statistics
        still follow the training batches); layer1..layer{k} get none either and normalise with
        their running statistics. -1 = nothing. See `trainable`.
      norm_eval: normalise with the running statistics everywhere while training, and keep them.
      folded: see `Backbone`.
      output_stride: 8 or 16 turns the strides beyond it into dilation, see `blocks`.
      depth: the depth multiplier: the blocks of layer2 to layer6 times this, rounded up.
      fixed_ends: whether the stem and the last convolution have 32 and 1280 channels at any width.
      divisor: the channels of each layer are a multiple of this.
      last_convolution: whether there is a convolution to 1280 channels after layer7.
      hidden: widths of dense layers with ReLU before the classifier.
      folded_norm: whether the statistics of BatchNorm are made up, because the file of the weights
        had them folded into the convolutions; training then needs `norm_eval`. The arrays here are
        not folded, which is what `folded` is about.
      quantize: 'int8' rounds weights and activations to 8 bits, see `layers.Rounding`; needs
        `norm_eval` in training. Folded networks round nothing.
    """

    num_classes: int | None = 1000
    width: float = spec.Backbone.width
    dropout: float = spec.TrainingMode.dropout
    padding: str = spec.Backbone.padding
    bn_epsilon: float = spec.Backbone.bn_epsilon
    bn_momentum: float = spec.TrainingMode.bn_momentum
    bn_group_size: int | str = spec.TrainingMode.bn_group_size
    dtype: Any = jnp.dtype(spec.TrainingMode.dtype)
    out_indices: Sequence[int] | None = None
    strides: Sequence[int] = spec.Backbone.strides
    remat: bool = spec.TrainingMode.remat
    frozen_stages: int = spec.TrainingMode.frozen_stages
    norm_eval: bool = spec.TrainingMode.norm_eval
    folded: bool = False
    output_stride: int = spec.Backbone.output_stride
    depth: float = spec.Backbone.depth
    fixed_ends: bool = spec.Backbone.fixed_ends
    divisor: int = spec.Backbone.divisor
    last_convolution: bool = spec.Backbone.last_convolution
    hidden: Sequence[int] = ()
    folded_norm: bool = spec.TrainingMode.folded_norm
    quantize: str = spec.TrainingMode.quantize

    @property
    def architecture(self) -> spec.Backbone:
        """The fields that change what the network computes from given weights."""
        return self._select(spec.Backbone)

    @property
    def mode(self) -> spec.TrainingMode:
        """The fields that change how the network is trained."""
        return self._select(spec.TrainingMode, dtype=jnp.dtype(self.dtype).name)

    @property
    def channels(self) -> tuple[int, ...]:
        """The channels of each feature map that is returned; timm's feature_info.channels().

        With a classifier it is one map, the last, which is pooled for it.
        """
        return tuple(info.channels for info in self._endpoint_sizes())

    @property
    def reductions(self) -> tuple[int, ...]:
        """The pixels of the image per pixel of each map in `channels`, on each axis."""
        return tuple(info.reduction for info in self._endpoint_sizes())

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array | tuple[jax.Array, ...]:
        """Classifies images, or returns their feature maps.

        Args:
          x: (N, H, W, 3), floating, already normalised.
          train: whether to normalise with the batch's statistics, update the running ones (where
            the caller makes `batch_stats` mutable), and drop out.

        Returns:
          Logits (N, num_classes), float32 (float64 where `dtype` is). With num_classes None the
          feature maps of `out_indices`, in `dtype`.

        Raises:
          ValueError: the input or a field is not as described.
        """
        names = self._endpoints()
        backbone = Backbone(self.architecture, self.mode, names, self.folded)
        nn.share_scope(self, backbone)
        features = backbone(x, train)
        if self.num_classes is None:
            return tuple(features[name] for name in names)
        quantize = quantizes(self.mode, self.folded)
        classifier = Classifier(
            self.num_classes, self.dropout, self.dtype, tuple(self.hidden), quantize
        )
        nn.share_scope(self, classifier)
        return classifier(features[names[0]], train)

    def _endpoints(self) -> tuple[str, ...]:
        """Returns the names of the maps of `out_indices`, or of the one that is classified."""
        maps = map_endpoints(self.architecture)
        last = len(maps) - 1
        chosen = (last,) if self.out_indices is None else self.out_indices
        if not set(chosen) <= set(range(last + 1)):
            raise ValueError(f"out_indices must lie in 0..{last}, not {self.out_indices}")
        indices = (last,) if self.num_classes is not None else sorted(set(chosen))
        return tuple(maps[i] for i in indices)

    def _endpoint_sizes(self) -> list[FeatureInfo]:
        return endpoint_sizes(self.architecture, self._endpoints())

    def _select(self, cls: type, **changes: Any) -> Any:
        """Returns a dataclass of spec.py with the values that its fields have here."""
        values = {f.name: spec.frozen(getattr(self, f.name)) for f in dataclasses.fields(cls)}
        return cls(**values | changes)


def check_frozen_stages(frozen_stages: int) -> None:
    """Raises ValueError unless `frozen_stages` is -1..7."""
    if frozen_stages not in range(-1, len(STAGES) + 1):
        raise ValueError(f"frozen_stages must lie in -1..{len(STAGES)}, not {frozen_stages}")


def trainable(params: Mapping[str, Any], frozen_stages: int) -> dict[str, Any]:
    """Returns a mask of the parameters that an optimizer may update.

    A frozen parameter's gradient is zero, but weight decay would still change it without a mask.

    Args:
      params: the 'params' collection of a network with a `Backbone`, with or without a head.
      frozen_stages: as the network's.

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
