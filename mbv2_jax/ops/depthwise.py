"""Depthwise convolution, with a lowering per platform.

XLA's CPU backend runs a grouped `lax.conv_general_dilated` tens of times slower than the same sums
written out. TPUs want the plain convolution: the sums written out move more than twice the bytes
there. So there are two lowerings of the same result (`platform.by_platform`).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mbv2_jax.ops.chunks import length
from mbv2_jax.ops.convolution import Padding, apart, explicit_padding, finish, pad, plain, views
from mbv2_jax.ops.platform import by_platform

# Of a result, added up before they are summed; a divisor of their number up to this.
ROWS = 8


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int,
    padding: str,
    dilation: int = 1,
    relu6: bool = False,
) -> jax.Array:
    """Convolves every channel with its own kernel (section 3.1 of the paper).

    Args:
      x: (N, H, W, C).
      kernel: (K, K, 1, C), K odd, same dtype as x.
      bias: (C,), added; same dtype as x.
      stride: 1 or more, both axes.
      padding: 'torch' or 'same', see `convolution.explicit_padding`.
      dilation: distance between neighbouring kernel elements.
      relu6: min(max(y, 0), 6) at the end.

    Returns:
      (N, H', W', C), x's dtype; H' = ceil(H / stride) for either padding when K is odd.
    """
    pads = explicit_padding(
        padding, x.shape[1:3], kernel_size=kernel.shape[0], stride=stride, dilation=dilation
    )

    def default(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        groups = x.shape[-1]
        y = plain(x, kernel, stride=stride, pads=pads, dilation=dilation, groups=groups)
        return finish(y, bias, relu6)

    def cpu(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        if bias is None:
            return finish(_shifted_sums(x, kernel, stride, pads, dilation), None, relu6)
        options = {"stride": stride, "dilation": dilation, "relu6": relu6}
        return apart(sums, pad(x, pads), kernel, bias, **options)

    return by_platform(x, kernel, bias, cpu=cpu, default=default)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _shifted_sums(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Padding, dilation: int
) -> jax.Array:
    """The same as K x K multiply-adds of shifted views.

    Differentiable backwards, also twice; forward mode (`jax.jvp`) has no rule here.
    """
    return apart(sums, pad(x, pads), kernel, stride=stride, dilation=dilation)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Padding, dilation: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _shifted_sums(x, kernel, stride, pads, dilation), (x, kernel)


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
    products = apart(gradient_products, pad(x, pads), gradient, **options)
    return (
        apart(sums, spread, kernel[::-1, ::-1], dilation=dilation),
        kernel_gradient(products).reshape(kernel.shape).astype(kernel.dtype),
    )


_shifted_sums.defvjp(_forward, _backward)


def sums(
    padded: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    relu6: bool = False,
) -> jax.Array:
    """Convolves (N, H, W, C) without padding: K x K multiply-adds of its shifted views.

    Bias and ReLU6 cost nothing while a result is at hand.
    """
    wide = jnp.promote_types(jnp.float32, padded.dtype)  # as XLA's own convolution sums
    taps = kernel.astype(wide).reshape(-1, kernel.shape[-1])
    seen = views(padded, kernel.shape[0], stride, dilation)
    products = [view.astype(wide) * tap for view, tap in zip(seen, taps, strict=True)]
    return finish(sum(products[1:], start=products[0]).astype(padded.dtype), bias, relu6)


def spread_gradient(
    gradient: jax.Array,
    shape: Sequence[int],
    kernel_size: int,
    stride: int,
    pads: Padding,
    dilation: int = 1,
) -> jax.Array:
    """Spreads the gradient of a result so that `sums` of it and the flipped kernel is the input's.

    Args:
      gradient: (N, H', W', C), of the result.
      shape: of the input, (N, H, W, C).
      kernel_size, stride, pads, dilation: of the convolution.

    Returns:
      (N, H + dilation * (K - 1), W + ..., C): stride - 1 zeros between neighbours, zeros around.
    """
    span = dilation * (kernel_size - 1)
    margins = []
    for size, results, (before, _) in zip(shape[1:3], gradient.shape[1:3], pads, strict=True):
        low = span - before
        high = size + span - low - ((results - 1) * stride + 1)
        margins.append((low, high, stride - 1))
    return lax.pad(gradient, gradient.dtype.type(0), ((0, 0, 0), *margins, (0, 0, 0)))


def gradient_products(
    padded: jax.Array, gradient: jax.Array, *, kernel_size: int, stride: int, dilation: int = 1
) -> list[jax.Array]:
    """For each view its product with the gradient, a few neighbouring rows' added up: K x K arrays.

    `kernel_gradient` of them is the kernel's. Summed at once over positions, XLA would go down a
    channel at a time, one value after another; added row by row, the channels of a row are added
    side by side, and a few rows leave little to be summed. Of 28 rows it is slower again.

    Args:
      padded: (N, H, W, C).
      gradient: (N, H', W', C), of the result.
      kernel_size, stride, dilation: of the convolution.

    Returns:
      K x K of (N, H' / rows, W', C), float32 or wider: of thousands of bfloat16 terms no digit
      would be left.
    """
    wide = jnp.promote_types(jnp.float32, padded.dtype)
    count, height, width, channels = gradient.shape
    rows = length(height, ROWS)
    shape = (count, height // rows, rows, width, channels)

    def rows_of(array: jax.Array) -> list[jax.Array]:
        split = array.reshape(shape).astype(wide)
        return [split[:, :, row] for row in range(rows)]

    gradients = rows_of(gradient)
    products = []
    for view in views(padded, kernel_size, stride, dilation):
        each = [a * b for a, b in zip(rows_of(view), gradients, strict=True)]
        products.append(sum(each[1:], start=each[0]))
    return products


def kernel_gradient(products: Sequence[jax.Array]) -> jax.Array:
    """Sums K x K arrays (N, ..., C) to (K x K, C)."""
    return jnp.stack([product.sum((0, 1, 2)) for product in products])
