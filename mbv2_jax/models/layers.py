"""The layers of the networks: convolution, batch normalisation, and both with ReLU6."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mbv2_jax.ops import conv as conv_ops
from mbv2_jax.ops import quantization
from mbv2_jax.ops.normalization import (
    Activation,
    DeferredActivation,
    Normalization,
    batch_statistics,
    materialize,
    normalize,
)
from mbv2_jax.spec import INT8, Backbone, TrainingMode

# mmpretrain's KaimingInit(layer='Conv2d'): variance 2 / fan_out. torch's fan_out of a depthwise
# kernel is 9 x channels (it does not divide by the groups), and so is that of a (3, 3, 1, C) here.
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

Statistics = tuple[jax.Array, jax.Array]


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Rounds a scaled channel count to a multiple of `divisor`, never losing more than 10 %.

    TensorFlow's slim (research/slim/nets/mobilenet/mobilenet.py) and all its ports round this way.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def parameter_dtype(dtype: Any) -> Any:
    """Returns the dtype of parameters and statistics under a compute dtype: float32 or wider."""
    return jnp.promote_types(jnp.float32, dtype)


def quantizes(mode: TrainingMode, folded: bool) -> bool:
    """Returns whether a network rounds to 8 bits; one for inference never does.

    Args:
      mode: its training mode.
      folded: whether it is for inference, with normalisations folded into the convolutions.
    """
    return mode.quantize == INT8 and not folded


class Conv(nn.Module):
    """A convolution: 1x1, depthwise, or the stem's full one.

    Parameters: kernel (K, K, C, features), or (K, K, 1, features) if depthwise; and with `bias`,
    bias (features,).

    Attributes:
      features: output channels; for a depthwise convolution those of the input.
      kernel_size: 1 or 3.
      stride: stride of both spatial axes.
      dilation: distance between neighbouring kernel elements.
      depthwise: whether each channel has its own kernel.
      padding: 'torch' or 'same', see `ops.conv.explicit_padding`.
      dtype: dtype of the arithmetic; the kernel is kept in float32 or wider.
      frozen: whether the kernel gets no gradient.
      bias: whether to add a bias, which starts at 0, as a convolution with a folded normalisation
        does.
      kernel_init: the initializer of the kernel.
      relu6: whether to apply ReLU6, min(max(y, 0), 6), to the result.
      quantize: whether the kernel is rounded to 8 bits.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    padding: str = Backbone.padding
    dtype: Any = jnp.dtype(TrainingMode.dtype)
    frozen: bool = False
    bias: bool = False
    kernel_init: nn.initializers.Initializer = kaiming_normal
    relu6: bool = False
    quantize: bool = False

    @nn.compact
    def __call__(self, x: Activation, groups: int = 0) -> Any:
        """Convolves x.

        Args:
          x: (N, H, W, C).
          groups: the number of equal parts of the batch to compute statistics of, in training; 0
            computes none.

        Returns:
          (N, ceil(H / stride), ceil(W / stride), features) in `dtype`. With `groups` also its mean
          and variance, see `ops.conv.convolution_with_statistics`.
        """
        kept = parameter_dtype(self.dtype)
        inputs = 1 if self.depthwise else x.shape[-1]
        shape = (self.kernel_size, self.kernel_size, inputs, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, kept)
        if self.frozen:
            kernel = lax.stop_gradient(kernel)
        if self.quantize:
            kernel = quantization.round_weights(kernel)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        window: dict[str, Any] = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }
        if groups:
            return conv_ops.convolution_with_statistics(
                x, kernel, groups=groups, depthwise=self.depthwise, **window
            )
        bias = None
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), kept)
            bias = bias.astype(self.dtype)
        convolve = conv_ops.depthwise_convolution if self.depthwise else conv_ops.convolution
        return convolve(x, kernel, bias, relu6=self.relu6, **window)


def count_groups(batch: int, group_size: int) -> int:
    """Returns the number of groups in which a batch is normalised; size 0 is the whole batch.

    Raises:
      ValueError: the batch doesn't divide into groups.
    """
    size = group_size or batch
    if batch % size:
        raise ValueError(
            f"a batch of {batch} does not divide into groups of {size} (bn_group_size)"
        )
    return batch // size


class BatchNorm(nn.Module):
    """Batch normalisation with torch's running statistics (torch.nn.BatchNorm2d).

    It differs from `flax.linen.BatchNorm` in three ways. The running variance is unbiased, with
    n - 1 in the denominator, as in torch. Statistics can be computed per group of the batch: the
    recipe of the published weights normalised each replica's 32 images separately. And in float32
    or wider the batch's variance is the mean of (x - mean)^2, see
    `ops.normalization.batch_statistics`.

    Under `jax.jit` a batch that is sharded over devices is one array, so the statistics are global.

    Parameters: scale, bias (C,). Collection batch_stats: mean, var (C,). All float32, or float64
    where `dtype` is float64, whatever the compute dtype.

    Attributes:
      epsilon: added to the variance.
      momentum: share of the running statistics that each step keeps (1 - torch's momentum).
      group_size: number of consecutive examples that are normalised together; 0 is the whole batch.
        Running statistics are updated with the mean of the groups' statistics.
      dtype: dtype of the result.
      frozen: whether scale and bias get no gradient; the statistics still depend on `train`.
      relu6: whether to apply ReLU6, min(max(y, 0), 6), to the result.
    """

    epsilon: float = Backbone.bn_epsilon
    momentum: float = TrainingMode.bn_momentum
    group_size: int = 0
    dtype: Any = jnp.dtype(TrainingMode.dtype)
    frozen: bool = False
    relu6: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, statistics: Statistics | None = None
    ) -> Activation:
        """Normalises x.

        Args:
          x: (N, H, W, C).
          train: whether to normalise with the batch's statistics and update the running ones;
            otherwise x is normalised with the running ones.
          statistics: the batch's mean and variance, if they have been computed already.

        Returns:
          x normalised, in `dtype`. In training with `relu6`, a `DeferredActivation`.

        Raises:
          ValueError: training on a batch that doesn't divide into groups, or on groups with one
            value per channel, which have no unbiased variance.
        """
        kept = parameter_dtype(self.dtype)
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, kept)
        var = self.variable("batch_stats", "var", jnp.ones, shape, kept)
        scale = self.param("scale", nn.initializers.ones, shape, kept)
        bias = self.param("bias", nn.initializers.zeros, shape, kept)
        if self.frozen:
            scale, bias = lax.stop_gradient(scale), lax.stop_gradient(bias)
        if not train or self.is_initializing():
            factor = scale * lax.rsqrt(var.value + self.epsilon)
            y = ((x.astype(kept) - mean.value) * factor + bias).astype(self.dtype)
            return nn.relu6(y) if self.relu6 else y

        groups = count_groups(x.shape[0], self.group_size)
        count = x.size // groups // x.shape[-1]
        if count == 1:
            raise ValueError(
                "batch normalisation needs more than 1 value per channel when training: "
                f"got groups of {x.shape[0] // groups} at {x.shape[1]}x{x.shape[2]}"
            )
        batch_mean, batch_var = statistics or batch_statistics(x, groups)
        self._update(mean, batch_mean)
        self._update(var, batch_var * (count / (count - 1)))
        norm = Normalization(batch_mean, scale * lax.rsqrt(batch_var + self.epsilon), bias)
        if self.relu6:
            return DeferredActivation(x, norm)
        return normalize(x, norm).astype(self.dtype)

    def _update(self, running: nn.Variable, batch: jax.Array) -> None:
        """Updates a running statistic with those of the groups, (G, 1, 1, 1, C)."""
        if self.is_mutable_collection("batch_stats"):
            new = lax.stop_gradient(batch).mean((0, 1, 2, 3))
            running.value = self.momentum * running.value + (1 - self.momentum) * new


_RANGE = ("low", "high")


def is_range(path: Sequence[Any]) -> bool:
    """Returns whether the path of a leaf of `batch_stats` is that of an end of a `Rounding`."""
    return getattr(path[-1], "key", None) in _RANGE


class Rounding(nn.Module):
    """Rounds activations to 8 bits over their running range (ops/quantization.py).

    The range follows the batches wherever the caller makes `batch_stats` mutable, from that of the
    first one on.

    Collection batch_stats: low, high (), float32 or wider; 0 while nothing has been seen, and then
    nothing is rounded.

    Attributes:
      momentum: share of the running range that each batch keeps.
    """

    momentum: float = 0.99

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Rounds an array.

        Args:
          x: of any shape.

        Returns:
          The same shape and dtype.
        """
        kept = parameter_dtype(x.dtype)
        low, high = (self.variable("batch_stats", end, jnp.zeros, (), kept) for end in _RANGE)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            share = jnp.where(high.value > low.value, self.momentum, 0)
            ends = quantization.range_of(lax.stop_gradient(x))
            low.value, high.value = (
                share * running.value + (1 - share) * batch
                for running, batch in zip((low, high), ends, strict=True)
            )
        return quantization.round_activations(x, low.value, high.value)


class ConvNorm(nn.Module):
    """Convolution, batch normalisation, and ReLU6 (unless a linear bottleneck ends here).

    The other fields are those of `Conv`, and of `BatchNorm` with `bn_` before their names.

    Attributes:
      relu6: whether to apply ReLU6, min(max(y, 0), 6), to the result.
      frozen: whether no parameter gets a gradient; the running statistics still follow `train`.
      folded: whether the normalisation is folded into the convolution, which then has a bias
        (`folding.fold`).
      kernel_init: the initializer of the kernel.
      quantize: whether the kernel is rounded to 8 bits. Its steps are a share of the largest weight
        of a channel, so that a normalisation folded into it would not change the result.
      round_result: with `quantize`, whether the result is rounded, too, as "range".
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    relu6: bool = True
    padding: str = Backbone.padding
    bn_epsilon: float = Backbone.bn_epsilon
    bn_momentum: float = TrainingMode.bn_momentum
    bn_group_size: int = 0
    dtype: Any = jnp.dtype(TrainingMode.dtype)
    frozen: bool = False
    folded: bool = False
    kernel_init: nn.initializers.Initializer = kaiming_normal
    quantize: bool = False
    round_result: bool = True

    @nn.compact
    def __call__(self, x: Activation, train: bool) -> Activation:
        """Convolves, normalises and, with `relu6`, applies ReLU6.

        Args:
          x: (N, H, W, C).
          train: see `BatchNorm`; not together with `quantize`.

        Returns:
          (N, ceil(H / stride), ceil(W / stride), features) in `dtype`. In training with `relu6` it
          is a `DeferredActivation`, which the next convolution computes.
        """
        conv = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.dilation,
            self.depthwise,
            self.padding,
            self.dtype,
            self.frozen,
            bias=self.folded,
            # Whenever flax applies a network, it traces the initializer to compare the shapes.
            # Zeros take the least time, and a folded kernel is computed from another one.
            kernel_init=nn.initializers.zeros if self.folded else self.kernel_init,
            relu6=self.folded and self.relu6,
            quantize=self.quantize,
            name="conv",
        )
        if self.folded:
            return conv(x)
        norm = BatchNorm(
            self.bn_epsilon,
            self.bn_momentum,
            self.bn_group_size,
            self.dtype,
            self.frozen,
            self.relu6,
            name="norm",
        )
        if not train or self.is_initializing():
            y = norm(conv(x), train)
            if self.quantize and self.round_result:
                return Rounding(name="range")(materialize(y))
            return y
        groups = count_groups(x.shape[0], self.bn_group_size)
        y, mean, var = conv(x, groups)
        return norm(y, train, (mean, var))
