"""The network's convolutions that are not depthwise, and what all of them share.

On XLA's CPU backend a 1x1 convolution is a matrix product, many times faster than the same
`lax.conv_general_dilated`, and the stem's 3x3 on three colours is a sum of shifted views. The other
backends get the plain convolution.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from mbv2_jax.ops.platform import by_platform

Padding = tuple[tuple[int, int], tuple[int, int]]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def explicit_padding(
    padding: str, size: Sequence[int], *, kernel_size: int, stride: int, dilation: int = 1
) -> Padding:
    """Returns the zeros to add (before, after) on each spatial axis.

    Args:
      padding: 'torch' adds as much on both sides whatever the size (PyTorch's
        `padding=dilation * (kernel_size - 1) // 2`); 'same' is TensorFlow's SAME: as little as
        gives ceil(size / stride) outputs, the odd one after; where stride > 1 the size decides.
      size: height and width of the input.
      kernel_size: side of the kernel, odd.
      stride: stride of both axes.
      dilation: distance between neighbouring kernel elements.

    Raises:
      ValueError: `padding` is neither of the two.
    """
    span = dilation * (kernel_size - 1)
    if padding == "torch":
        return ((span // 2, span // 2), (span // 2, span // 2))
    if padding == "same":
        height, width = (max((-(-n // stride) - 1) * stride + span + 1 - n, 0) for n in size)
        return ((height // 2, height - height // 2), (width // 2, width - width // 2))
    raise ValueError(f"padding must be 'torch' or 'same', not {padding!r}")


def pointwise_conv(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, relu6: bool = False
) -> jax.Array:
    """Convolves with a 1x1 kernel: one matrix product over the channels.

    Args:
      x: (N, H, W, C).
      kernel: (1, 1, C, C'), same dtype as x.
      bias: (C',), added; same dtype as x.
      relu6: min(max(y, 0), 6) at the end.

    Returns:
      (N, H, W, C'), x's dtype.
    """

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))

    return finish(by_platform(x, kernel, cpu=product, default=plain), bias, relu6)


def stem_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int,
    padding: str,
    relu6: bool = False,
) -> jax.Array:
    """Convolves images, which have few channels, to many.

    Args:
      x: (N, H, W, C).
      kernel: (K, K, C, C'), same dtype as x.
      bias: (C',), added; same dtype as x.
      stride: 1 or more, both axes.
      padding: 'torch' or 'same', see `explicit_padding`.
      relu6: min(max(y, 0), 6) at the end.

    Returns:
      (N, ceil(H / stride), ceil(W / stride), C'), x's dtype.
    """
    pads = explicit_padding(padding, x.shape[1:3], kernel_size=kernel.shape[0], stride=stride)

    def default(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        return finish(plain(x, kernel, stride=stride, pads=pads), bias, relu6)

    def cpu(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        if bias is None:
            return finish(_shifted_sums(x, kernel, stride, pads), None, relu6)
        return apart(channel_sums, pad(x, pads), kernel, bias, stride=stride, relu6=relu6)

    return by_platform(x, kernel, bias, cpu=cpu, default=default)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted_sums(x: jax.Array, kernel: jax.Array, stride: int, pads: Padding) -> jax.Array:
    """A multiply-add for each of K x K x C views of one channel, with all C' of the kernel."""
    return apart(channel_sums, pad(x, pads), kernel, stride=stride)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _shifted_sums(x, kernel, stride, pads), (x, kernel)


def _backward(
    stride: int, pads: Padding, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    # Nobody asks for the images' gradient in training: then it is not computed.
    _, of_images = jax.vjp(lambda x: plain(x, kernel, stride=stride, pads=pads), x)
    return *of_images(gradient), product_gradient(pad(x, pads), gradient, kernel.shape, stride)


_shifted_sums.defvjp(_forward, _backward)


def channel_sums(
    padded: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int,
    relu6: bool = False,
) -> jax.Array:
    """Convolves (N, H, W, C) without padding, into (N, H', W', C').

    Bias and ReLU6 cost nothing while a result is at hand.
    """
    wide = jnp.promote_types(jnp.float32, padded.dtype)  # as XLA's own convolution sums
    taps = kernel.astype(wide).reshape(-1, kernel.shape[-1])  # (K x K x C, C')
    channels = [
        view[..., c : c + 1]
        for view in views(padded, kernel.shape[0], stride)
        for c in range(padded.shape[-1])
    ]
    products = [channel.astype(wide) * tap for channel, tap in zip(channels, taps, strict=True)]
    return finish(sum(products[1:], start=products[0]).astype(padded.dtype), bias, relu6)


def product_gradient(
    padded: jax.Array, gradient: jax.Array, shape: Sequence[int], stride: int
) -> jax.Array:
    """The gradient of a (K, K, C, C') kernel: a matrix product of all views with the gradient."""
    columns = jnp.concatenate(views(padded, shape[0], stride), axis=-1)  # (N, H', W', K x K x C)
    columns = columns.reshape(-1, columns.shape[-1])
    gradient = gradient.reshape(-1, gradient.shape[-1])
    return lax.dot_general(columns, gradient, (((0,), (0,)), ((), ()))).reshape(shape)


def pad(x: jax.Array, pads: Padding) -> jax.Array:
    """Adds zeros (before, after) on the spatial axes of (N, H, W, C).

    Written to memory, so that the views of it are plain slices: XLA fuses this into whatever makes
    x, and reads the views six times faster than it reads x with a test for the border at each.
    """
    (top, bottom), (left, right) = pads
    margin = ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0))
    return lax.pad(x, x.dtype.type(0), margin)


def views(padded: jax.Array, kernel_size: int, stride: int, dilation: int = 1) -> list[jax.Array]:
    """What each of the K x K kernel elements sees of a padded input: (N, H', W', C)."""
    starts = [tap * dilation for tap in range(kernel_size)]
    # The last result sees as far as the padded input goes, less what a stride leaves over.
    height, width = ((n - 1 - starts[-1]) // stride * stride + 1 for n in padded.shape[1:3])
    return [
        padded[:, top : top + height : stride, left : left + width : stride]
        for top in starts
        for left in starts
    ]


def plain(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    pads: Padding = ((0, 0), (0, 0)),
    dilation: int = 1,
    groups: int = 1,
) -> jax.Array:
    """XLA's own convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


def finish(y: jax.Array, bias: jax.Array | None, relu6: bool) -> jax.Array:
    """Adds the bias, if there is one, and cuts off at 0 and 6, if asked to."""
    if bias is not None:
        y = y + bias
    return lax.min(lax.max(y, y.dtype.type(0)), y.dtype.type(6)) if relu6 else y


def apart(function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """Calls `function` as a computation of its own, across whose border XLA fuses nothing.

    Without the border XLA's CPU backend computes sums of shifted views again inside each of their
    users (normalisation, its statistics, its gradient), and what feeds them again for each view.
    Its `optimization_barrier` doesn't help: it is gone before the CPU backend fuses. What is jitted
    inside `function` (much of jax.numpy) is apart, too: there lax serves better.

    Args:
      function: of the module: it is remembered, with each set of options, for as long as that.
      arrays: trees of arrays.
      options: static, hashable.
    """
    with set_xla_metadata(inlineable="false"):
        return _jitted(function, **options)(*arrays)


@cache
def _jitted(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """One for all layers, so that those of the same shape are traced once."""
    return jax.jit(partial(function, **options))
