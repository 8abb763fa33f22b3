"""The 1x1 convolutions as matrix products, and the stem's as a sum of shifted views.

On XLA's CPU backend a 1x1 convolution is many times slower as a `lax.conv_general_dilated` than as
the same matrix product, and so is a 3x3 of three colours than the same sums written out.
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

# Input channels of a convolution that is written out as sums: there are K x K terms for each.
FEW_CHANNELS = 4


def supports(kernel_shape: Sequence[int], stride: int) -> bool:
    """Whether `convolve` takes a (K, K, C, C') kernel: 1x1 without a stride, or of few channels."""
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
    """Adds up the products of K x K x C views of one channel with all C' of the kernel."""
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
    # Training does not use the images' gradient: then XLA does not compute it.
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

    Bias and ReLU6 cost nothing while a result is at hand.
    """
    wide = jnp.promote_types(jnp.float32, padded.dtype)  # as XLA's own convolution sums
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
    """Returns the gradient of a (K, K, C, C') kernel: a product of all views with the result's."""
    views = shifted_views(padded, shape[0], stride, dilation)
    columns = jnp.concatenate(views, axis=-1)  # (N, H', W', K x K x C)
    columns = columns.reshape(-1, columns.shape[-1])
    gradient = gradient.reshape(-1, gradient.shape[-1])
    return lax.dot_general(columns, gradient, (((0,), (0,)), ((), ()))).reshape(shape)
