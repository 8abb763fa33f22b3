"""The 1x1 convolutions as matrix products, and the stem's as a sum of shifted views.

On XLA's CPU backend a 1x1 convolution by `lax.conv_general_dilated` is many times slower than the
same matrix product, and a 3x3 convolution of three colours many times slower than the same sums
written out.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mbv2_jax.ops import plain
from mbv2_jax.ops.cpu.fusion import as_separate_computation
from mbv2_jax.ops.cpu.views import pad, shifted_views
from mbv2_jax.ops.plain import Padding, apply_epilogue

# The most input channels of a convolution that is written out as sums, K x K terms per channel.
FEW_CHANNELS = 4


def supports(kernel_shape: Sequence[int], stride: int) -> bool:
    """Returns whether `convolve` supports a (K, K, C, C') kernel: 1x1 of stride 1, or small C."""
    size, _, channels, _ = kernel_shape
    return (size == 1 and stride == 1) or channels <= FEW_CHANNELS


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int,
    pads: Padding,
    dilation: int,
    relu6: bool = False,
) -> jax.Array:
    """Convolves (N, H, W, C) with a (K, K, C, C') kernel: see `conv.convolution`."""
    if kernel.shape[0] == 1 and stride == 1:
        return apply_epilogue(multiply(x, kernel), bias, relu6)
    if bias is None:
        return apply_epilogue(_convolve(x, kernel, stride, pads, dilation), None, relu6)
    options = {"stride": stride, "dilation": dilation, "relu6": relu6}
    return as_separate_computation(convolve_padded, pad(x, pads), kernel, bias, **options)


def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with a (1, 1, C, C') kernel: one matrix product over the channels."""
    return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Padding, dilation: int
) -> jax.Array:
    """Sums K x K x C products, each of a one-channel view and its C' elements of the kernel."""
    options = {"stride": stride, "dilation": dilation}
    return as_separate_computation(convolve_padded, pad(x, pads), kernel, **options)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Padding, dilation: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel, stride, pads, dilation), (x, kernel)


def _backward(
    stride: int,
    pads: Padding,
    dilation: int,
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    convolve = partial(plain.convolve, stride=stride, pads=pads, dilation=dilation)
    # Training does not use the images' gradient, and XLA then removes it.
    _, pull = jax.vjp(lambda x: convolve(x, kernel), x)
    return *pull(gradient), kernel_gradient(pad(x, pads), gradient, kernel.shape, stride, dilation)


_convolve.defvjp(_forward, _backward)


def convolve_padded(
    padded: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int,
    dilation: int,
    relu6: bool = False,
) -> jax.Array:
    """Convolves (N, H, W, C) without padding, into (N, H', W', C').

    Bias and ReLU6 are applied before a result is stored, and so cost no pass over memory.
    """
    wide = jnp.promote_types(jnp.float32, padded.dtype)  # as in XLA's own convolution
    taps = kernel.astype(wide).reshape(-1, kernel.shape[-1])  # (K x K x C, C')
    channels = [
        view[..., c : c + 1]
        for view in shifted_views(padded, kernel.shape[0], stride, dilation)
        for c in range(padded.shape[-1])
    ]
    products = [channel.astype(wide) * tap for channel, tap in zip(channels, taps, strict=True)]
    total = sum(products[1:], start=products[0])
    return apply_epilogue(total.astype(padded.dtype), bias, relu6)


def kernel_gradient(
    padded: jax.Array, gradient: jax.Array, shape: Sequence[int], stride: int, dilation: int
) -> jax.Array:
    """Returns the gradient of a (K, K, C, C') kernel: the views times the result's gradient."""
    views = shifted_views(padded, shape[0], stride, dilation)
    columns = jnp.concatenate(views, axis=-1)  # (N, H', W', K x K x C)
    columns = columns.reshape(-1, columns.shape[-1])
    gradient = gradient.reshape(-1, gradient.shape[-1])
    return lax.dot_general(columns, gradient, (((0,), (0,)), ((), ()))).reshape(shape)
