"""The pieces MobileNetV2 is made of: convolution, batch normalisation, and the two with ReLU6."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mbv2_jax.models.convolution import pointwise_conv, stem_conv
from mbv2_jax.models.depthwise import depthwise_conv

# mmpretrain's KaimingInit(layer='Conv2d'): variance 2 / fan_out, where torch's fan_out of a
# depthwise kernel is 9 x channels (not divided by the groups), as it is of a (3, 3, 1, C) here.
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Rounds a scaled channel count to a multiple of `divisor`, never losing more than 10 %.

    As TensorFlow's slim (research/slim/nets/mobilenet/mobilenet.py) and every port of it.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def parameter_dtype(dtype: Any) -> Any:
    """The dtype of parameters and statistics under compute dtype `dtype`: float32 or wider."""
    return jnp.promote_types(jnp.float32, dtype)


class Conv(nn.Module):
    """A convolution: 1x1, depthwise, or (the stem's) full.

    Parameters: kernel (K, K, C, features), or (K, K, 1, features) where depthwise; bias (features,)
    where there is one.

    Attributes:
      features: output channels; for a depthwise convolution those of the input.
      kernel_size: 1 or 3.
      stride: of both spatial axes; 1 where kernel_size is 1.
      depthwise: each channel by itself.
      padding: 'torch' or 'same', see `convolution.explicit_padding`.
      dtype: of the arithmetic; the kernel is kept in float32 or wider.
      frozen: the kernel gets no gradient.
      bias: adds one; only a convolution into which its normalisation was folded has it.
      relu6: min(max(y, 0), 6) at the end.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    depthwise: bool = False
    padding: str = "torch"
    dtype: Any = jnp.float32
    frozen: bool = False
    bias: bool = False
    relu6: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), features), in `dtype`."""
        kept = parameter_dtype(self.dtype)
        inputs = 1 if self.depthwise else x.shape[-1]
        shape = (self.kernel_size, self.kernel_size, inputs, self.features)
        kernel = self.param("kernel", kaiming_normal, shape, kept)
        if self.frozen:
            kernel = lax.stop_gradient(kernel)
        bias = None
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), kept)
            bias = bias.astype(self.dtype)
        return self._convolve(x.astype(self.dtype), kernel.astype(self.dtype), bias)

    def _convolve(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        if self.kernel_size == 1:
            return pointwise_conv(x, kernel, bias, relu6=self.relu6)
        convolve = depthwise_conv if self.depthwise else stem_conv
        return convolve(x, kernel, bias, stride=self.stride, padding=self.padding, relu6=self.relu6)


class BatchNorm(nn.Module):
    """Batch normalisation with torch's running statistics (torch.nn.BatchNorm2d).

    Three things differ from `flax.linen.BatchNorm`. The running variance is the unbiased one,
    n / (n - 1), as torch keeps it. Statistics can be taken per group of the batch: the recipe
    behind the published weights normalised each replica's 32 images by themselves. And the batch's
    variance is, in float32 or wider, the mean of (x - mean)^2: see `_normalize`.

    Under `jax.jit` a batch sharded over devices is one array, so the statistics are global.

    Parameters: scale, bias (C,). Collection batch_stats: mean, var (C,). All float32, or float64
    where `dtype` is float64, whatever the compute dtype.

    Attributes:
      epsilon: added to the variance.
      momentum: what is kept of the running statistics each step, in Flax's sense (1 - torch's).
      group_size: examples that are normalised together; consecutive ones. 0 = the whole batch.
        Running statistics move by the mean of the groups' updates.
      dtype: of the result.
      frozen: scale and bias get no gradient. (The statistics are the caller's business: `train`.)
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    group_size: int = 0
    dtype: Any = jnp.float32
    frozen: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x (N, H, W, C) with the batch's statistics if `train`, else the running ones.

        Raises:
          ValueError: training on a batch that doesn't divide into groups, or on groups that hold
            one value per channel, whose variance says nothing.
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
            return ((x.astype(kept) - mean.value) * factor + bias).astype(self.dtype)

        groups, count = self._groups(x.shape)
        grouped = x.reshape(groups, -1, *x.shape[1:])  # (G, N/G, H, W, C)
        y, batch_mean, batch_var = self._normalize(grouped, scale, bias)
        self._update(mean, batch_mean)
        self._update(var, batch_var * (count / (count - 1)))
        return y.reshape(x.shape).astype(self.dtype)

    def _normalize(
        self, x: jax.Array, scale: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns x (G, N/G, H, W, C) normalised, and the groups' mean and biased variance.

        In float32 and wider the variance takes a second pass over x. E[x^2] - E[x]^2 loses every
        digit there once a channel's mean is some thousand times its deviation, and four where it is
        a hundred times; a frozen or badly scaled input gets there. Of a bfloat16 x, rounded to
        2^-9 of its size, both sums are taken at once: what their difference loses in float32 is
        less than what the rounding of x had lost before. It is memory that takes the time there,
        and neither this nor the gradient of it reads x a second time (docs/tpu_step.md).
        """
        wide = x.astype(scale.dtype)
        mean = wide.mean((1, 2, 3), keepdims=True)  # (G, 1, 1, 1, C)
        if x.dtype == scale.dtype:
            centred = wide - mean
            var = lax.square(centred).mean((1, 2, 3), keepdims=True)
            return centred * (scale * lax.rsqrt(var + self.epsilon)) + bias, mean, var
        square = lax.square(wide).mean((1, 2, 3), keepdims=True)
        var = jnp.maximum(square - lax.square(mean), 0)
        factor = scale * lax.rsqrt(var + self.epsilon)
        return wide * factor + (bias - mean * factor), mean, var

    def _groups(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns the number of groups, and the values per channel in each."""
        size = self.group_size or shape[0]
        if shape[0] % size:
            raise ValueError(
                f"a batch of {shape[0]} does not divide into groups of {size} (bn_group_size)"
            )
        count = size * shape[1] * shape[2]
        if count == 1:
            raise ValueError(
                "batch normalisation needs more than 1 value per channel when training: "
                f"got groups of {size} at {shape[1]}x{shape[2]}"
            )
        return shape[0] // size, count

    def _update(self, running: nn.Variable, batch: jax.Array) -> None:
        """Moves a running statistic towards the groups' (G, 1, 1, 1, C)."""
        if self.is_mutable_collection("batch_stats"):
            new = lax.stop_gradient(batch).mean((0, 1, 2, 3))
            running.value = self.momentum * running.value + (1 - self.momentum) * new


class ConvNorm(nn.Module):
    """Convolution, batch normalisation, and ReLU6 (unless a linear bottleneck ends here).

    Attributes: as `Conv`, and
      relu6: min(max(x, 0), 6) at the end.
      bn_epsilon, bn_momentum, bn_group_size: see `BatchNorm`.
      frozen: no parameter gets a gradient; the running statistics still follow `train`.
      folded: the normalisation is part of the convolution, which has a bias (`folding.fold`).
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    depthwise: bool = False
    relu6: bool = True
    padding: str = "torch"
    bn_epsilon: float = 1e-5
    bn_momentum: float = 0.9
    bn_group_size: int = 0
    dtype: Any = jnp.float32
    frozen: bool = False
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), features), in `dtype`."""
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.depthwise,
            self.padding,
            self.dtype,
            self.frozen,
            bias=self.folded,
            relu6=self.folded and self.relu6,
            name="conv",
        )(x)
        if self.folded:
            return x
        x = BatchNorm(
            self.bn_epsilon,
            self.bn_momentum,
            self.bn_group_size,
            self.dtype,
            self.frozen,
            name="norm",
        )(x, train)
        return nn.relu6(x) if self.relu6 else x
