"""Depthwise convolution as sums of shifted views.

XLA's CPU backend runs a grouped `lax.conv_general_dilated` tens of times slower than the same sums
written out. On a TPU the sums would move more than twice the bytes of the plain convolution.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mbv2_jax.ops.cpu.fusion import as_separate_computation
from mbv2_jax.ops.cpu.pieces import divisor
from mbv2_jax.ops.cpu.views import pad, shifted_views
from mbv2_jax.ops.plain import Padding, apply_epilogue

# The most neighbouring rows that `gradient_products` adds up; their number divides the height.
ROWS = 8


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
    """Convolves (N, H, W, C) with a (K, K, 1, C) kernel: see `conv.depthwise_convolution`.

    It can be differentiated in reverse mode, also twice, but not in forward mode (`jax.jvp`).
    """
    if bias is None:
        return apply_epilogue(_convolve(x, kernel, stride, pads, dilation), None, relu6)
    options = {"stride": stride, "dilation": dilation, "relu6": relu6}
    return as_separate_computation(convolve_padded, pad(x, pads), kernel, bias, **options)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Padding, dilation: int
) -> jax.Array:
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
    size = kernel.shape[0]
    spread = spread_gradient(gradient, x.shape, size, stride, pads, dilation)
    options = {"kernel_size": size, "stride": stride, "dilation": dilation}
    products = as_separate_computation(gradient_products, pad(x, pads), gradient, **options)
    return (
        input_gradient(spread, kernel, dilation),
        kernel_gradient(products).reshape(kernel.shape).astype(kernel.dtype),
    )


_convolve.defvjp(_forward, _backward)


def convolve_padded(
    padded: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    relu6: bool = False,
) -> jax.Array:
    """Convolves (N, H, W, C) without padding, by K x K multiply-adds of its shifted views.

    Bias and ReLU6 are applied before a result is stored, and so cost no pass over memory.
    """
    wide = jnp.promote_types(jnp.float32, padded.dtype)  # as in XLA's own convolution
    taps = kernel.astype(wide).reshape(-1, kernel.shape[-1])
    views = shifted_views(padded, kernel.shape[0], stride, dilation)
    products = [view.astype(wide) * tap for view, tap in zip(views, taps, strict=True)]
    total = sum(products[1:], start=products[0])
    return apply_epilogue(total.astype(padded.dtype), bias, relu6)


def spread_gradient(
    gradient: jax.Array,
    shape: Sequence[int],
    kernel_size: int,
    stride: int,
    pads: Padding,
    dilation: int,
) -> jax.Array:
    """Spreads and pads the gradient of a result for `input_gradient`.

    Args:
      gradient: (N, H', W', C), of the result.
      shape: of the input, (N, H, W, C).
      kernel_size, stride, pads, dilation: of the convolution.

    Returns:
      (N, H + dilation * (K - 1), W + dilation * (K - 1), C): the gradient with stride - 1 zeros
      between neighbours, and zeros around it.
    """
    span = dilation * (kernel_size - 1)
    margins = []
    for size, results, (before, _) in zip(shape[1:3], gradient.shape[1:3], pads, strict=True):
        low = span - before
        high = size + span - low - ((results - 1) * stride + 1)
        margins.append((low, high, stride - 1))
    return lax.pad(gradient, gradient.dtype.type(0), ((0, 0, 0), *margins, (0, 0, 0)))


def input_gradient(spread: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """Returns the input's gradient: the spread gradient convolved with the flipped kernel."""
    flipped = kernel[::-1, ::-1]
    return as_separate_computation(convolve_padded, spread, flipped, dilation=dilation)


def gradient_products(
    padded: jax.Array, gradient: jax.Array, *, kernel_size: int, stride: int, dilation: int
) -> list[jax.Array]:
    """Multiplies each view by the gradient, and adds up a few neighbouring rows of the products.

    `kernel_gradient` sums the result to the kernel's gradient. If all positions were summed at
    once, XLA would sum one channel at a time, value by value. The addition of rows is vectorised
    over the channels, and leaves little to sum. With 28 rows it is slower again.

    Args:
      padded: (N, H, W, C).
      gradient: (N, H', W', C), of the result.
      kernel_size, stride, dilation: of the convolution.

    Returns:
      K x K arrays (N, H' / rows, W', C), float32 or wider, since a sum of thousands of bfloat16
      terms would have no correct digit.
    """
    wide = jnp.promote_types(jnp.float32, padded.dtype)
    count, height, width, channels = gradient.shape
    rows = divisor(height, ROWS)
    shape = (count, height // rows, rows, width, channels)

    def rows_of(array: jax.Array) -> list[jax.Array]:
        split = array.reshape(shape).astype(wide)
        return [split[:, :, row] for row in range(rows)]

    gradients = rows_of(gradient)
    products = []
    for view in shifted_views(padded, kernel_size, stride, dilation):
        each = [a * b for a, b in zip(rows_of(view), gradients, strict=True)]
        products.append(sum(each[1:], start=each[0]))
    return products


def kernel_gradient(products: Sequence[jax.Array]) -> jax.Array:
    """Sums K x K arrays (N, ..., C) to (K x K, C)."""
    return jnp.stack([product.sum((0, 1, 2)) for product in products])
