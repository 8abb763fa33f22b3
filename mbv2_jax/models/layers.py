"""The pieces MobileNetV2 is made of: convolution, batch normalisation, and the two with ReLU6."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mbv2_jax.ops.convolution import pointwise_conv, stem_conv
from mbv2_jax.ops.depthwise import depthwise_conv
from mbv2_jax.ops.normalized_conv import Norm, normalize, normalized_conv, statistics

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
    def __call__(self, x: jax.Array, norm: Norm | None = None, groups: int = 0) -> Any:
        """(N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), features), in `dtype`.

        With `groups` also the result's mean and variance in so many groups, and x is normalised by
        `norm` first: see `normalized_conv`.
        """
        kept = parameter_dtype(self.dtype)
        inputs = 1 if self.depthwise else x.shape[-1]
        shape = (self.kernel_size, self.kernel_size, inputs, self.features)
        kernel = self.param("kernel", kaiming_normal, shape, kept)
        if self.frozen:
            kernel = lax.stop_gradient(kernel)
        if groups:
            return normalized_conv(
                x.astype(self.dtype),
                norm,
                kernel.astype(self.dtype),
                stride=self.stride,
                padding=self.padding,
                depthwise=self.depthwise,
                groups=groups,
            )
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


class Pending(NamedTuple):
    """A convolution's result whose normalisation and ReLU6 are still due.

    In training the next convolution does both (`normalized_conv`).
    """

    x: jax.Array
    norm: Norm


def settle(x: jax.Array | Pending) -> jax.Array:
    """Does what is due, if anything is."""
    return nn.relu6(normalize(*x)) if isinstance(x, Pending) else x


def count_groups(batch: int, group_size: int) -> int:
    """Returns in how many groups a batch is normalised, 0 = all together.

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
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        taken: tuple[jax.Array, jax.Array] | None = None,
        later: bool = False,
    ) -> Any:
        """Normalises x (N, H, W, C) with the batch's statistics if `train`, else the running ones.

        Args:
          x: (N, H, W, C).
          train: whether the batch's statistics count, and move the running ones.
          taken: the batch's statistics, where they are known already.
          later: leaves it to the next convolution to normalise (and to cut off at 0 and 6): only
            in training.

        Returns:
          x normalised, in `dtype`; with `later` a `Pending`.

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

        groups = count_groups(x.shape[0], self.group_size)
        count = x.size // groups // x.shape[-1]
        if count == 1:
            raise ValueError(
                "batch normalisation needs more than 1 value per channel when training: "
                f"got groups of {x.shape[0] // groups} at {x.shape[1]}x{x.shape[2]}"
            )
        batch_mean, batch_var = taken or statistics(x, groups)
        self._update(mean, batch_mean)
        self._update(var, batch_var * (count / (count - 1)))
        norm = Norm(batch_mean, scale * lax.rsqrt(batch_var + self.epsilon), bias)
        return Pending(x, norm) if later else normalize(x, norm).astype(self.dtype)

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
    def __call__(self, x: jax.Array | Pending, train: bool) -> jax.Array | Pending:
        """(N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), features), in `dtype`.

        In training a result that ends with ReLU6 is `Pending`, for the next convolution to finish.
        """
        learn = train and not self.is_initializing()
        conv = Conv(
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
        )
        if self.folded:
            return conv(settle(x))
        norm = BatchNorm(
            self.bn_epsilon,
            self.bn_momentum,
            self.bn_group_size,
            self.dtype,
            self.frozen,
            name="norm",
        )
        if not learn:
            y = norm(conv(settle(x)), train)
            return nn.relu6(y) if self.relu6 else y
        x, due = x if isinstance(x, Pending) else (x, None)
        groups = count_groups(x.shape[0], self.bn_group_size)
        y, *taken = conv(x, due, groups)
        return norm(y, train, tuple(taken), later=self.relu6)
