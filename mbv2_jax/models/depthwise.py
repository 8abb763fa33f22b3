"""Depthwise and pointwise convolutions, each with a lowering per platform.

XLA's CPU backend runs `lax.conv_general_dilated` many times slower than the same sums written out,
for both operations that MobileNetV2 consists of. TPUs want the plain convolution: the sums written
out move more than twice the bytes there. So one function, two lowerings of the same result, and
`lax.platform_dependent` picks when the program is lowered: no conditional is left in the executable.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def explicit_padding(
    padding: str, size: Sequence[int], *, kernel_size: int, stride: int, dilation: int = 1
) -> Padding:
    """Returns the zeros to add (before, after) on each spatial axis.

    Args:
      padding: 'torch' adds as much on both sides whatever the size (PyTorch's
        `padding=dilation * (kernel_size - 1) // 2`); 'same' is TensorFlow's SAME: as little as gives
        ceil(size / stride) outputs, the odd one after, so it depends on the size where stride > 1.
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


def depthwise_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: str, dilation: int = 1
) -> jax.Array:
    """Convolves every channel with its own kernel (section 3.1 of the paper).

    Args:
      x: (N, H, W, C).
      kernel: (K, K, 1, C), K odd, same dtype as x.
      stride: 1 or more, both axes.
      padding: 'torch' or 'same', see `explicit_padding`.
      dilation: distance between neighbouring kernel elements.

    Returns:
      (N, H', W', C), x's dtype; H' = ceil(H / stride) for either padding when K is odd.
    """
    pads = explicit_padding(
        padding, x.shape[1:3], kernel_size=kernel.shape[0], stride=stride, dilation=dilation
    )
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _shifted_sums(x, kernel, stride, pads, dilation),
        default=partial(_plain, stride=stride, pads=pads, dilation=dilation),
    )


def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with a 1x1 kernel: one matrix product over the channels.

    Args:
      x: (N, H, W, C).
      kernel: (1, 1, C, C'), same dtype as x.

    Returns:
      (N, H, W, C'), x's dtype.
    """

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=_LAYOUT)

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))

    return lax.platform_dependent(x, kernel, cpu=product, default=plain)


def _plain(
    x: jax.Array, kernel: jax.Array, *, stride: int, pads: Padding, dilation: int
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=_LAYOUT,
        feature_group_count=x.shape[-1],
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _shifted_sums(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Padding, dilation: int
) -> jax.Array:
    """The same as K x K multiply-adds of shifted views."""
    taps = kernel.reshape(-1, kernel.shape[-1])
    products = [
        view * tap
        for view, tap in zip(_views(x, kernel.shape[0], stride, pads, dilation), taps, strict=True)
    ]
    return sum(products[1:], start=products[0])


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
    """Gradients of x and the kernel.

    That of x is left to autodiff, which shifts back. That of the kernel would be K x K reductions over
    the whole batch, each reading x and the gradient again on few threads; this is one reduction with
    K x K results that reads both once, in parallel over the batch. It sums in float32 or wider: in
    bfloat16 thousands of terms would leave no digit.
    """
    # The barrier keeps XLA from taking the forward pass's views for these, and so from storing them.
    x, kernel, gradient = lax.optimization_barrier((*saved, gradient))
    size = kernel.shape[0]
    (x_gradient,) = jax.linear_transpose(
        lambda x: _shifted_sums.fun(x, kernel, stride, pads, dilation), x
    )(gradient)

    wide = jnp.promote_types(jnp.float32, x.dtype)
    products = [
        view.astype(wide) * gradient.astype(wide)
        for view in _views(x, size, stride, pads, dilation)
    ]
    zeros = [jnp.zeros((), wide)] * len(products)
    sums = lax.reduce(  # K x K of (N, C)
        products, zeros, lambda a, b: [p + q for p, q in zip(a, b, strict=True)], (1, 2)
    )
    kernel_gradient = jnp.stack([s.sum(0) for s in sums]).reshape(kernel.shape)
    return x_gradient, kernel_gradient.astype(kernel.dtype)


_shifted_sums.defvjp(_forward, _backward)


def _views(
    x: jax.Array, kernel_size: int, stride: int, pads: Padding, dilation: int
) -> list[jax.Array]:
    """What each of the K x K kernel elements sees: (N, H', W', C), zeros beyond the border.

    The part inside the input is cut out and then padded, since XLA fuses that into the arithmetic;
    a padded copy of the input, of which the views would be plain slices, it writes to memory.
    """
    span = dilation * (kernel_size - 1)
    cuts = [
        [
            _cut(n, tap * dilation - low, stride, (n + low + high - span - 1) // stride + 1)
            for tap in range(kernel_size)
        ]
        for n, (low, high) in zip(x.shape[1:3], pads, strict=True)
    ]
    zero = x.dtype.type(0)
    views = []
    for top, bottom, above, below in cuts[0]:
        for left, right, before, after in cuts[1]:
            inside = x[:, top:bottom:stride, left:right:stride]
            margin = ((0, 0, 0), (above, below, 0), (before, after, 0), (0, 0, 0))
            views.append(lax.pad(inside, zero, margin))
    return views


def _cut(size: int, offset: int, stride: int, outputs: int) -> tuple[int, int, int, int]:
    """Where offset + o * stride, o = 0..outputs-1, lies in 0..size-1: start, stop, and the numbers
    of o below and above."""
    below = min(max(0, -(offset // stride)), outputs)
    above = max(0, outputs - below - len(range(below * stride + offset, size, stride)))
    start = below * stride + offset
    return start, start + (outputs - below - above) * stride, below, above
