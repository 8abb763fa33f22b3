"""Depthwise and pointwise convolutions, each with a lowering per platform.

XLA's CPU backend runs `lax.conv_general_dilated` many times slower than the same sums written out,
for both operations that MobileNetV2 consists of. TPUs want the plain convolution: the sums written
out move more than twice the bytes there. So one function, two lowerings of the same result, and
`lax.platform_dependent` picks when the program is lowered: no conditional is left in the executable.
"""

from collections.abc import Sequence
from functools import partial

import jax
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
        cpu=partial(_shifted_sums, stride=stride, pads=pads, dilation=dilation),
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


def _shifted_sums(
    x: jax.Array, kernel: jax.Array, *, stride: int, pads: Padding, dilation: int
) -> jax.Array:
    """The same as K x K multiply-adds of strided views of the padded input."""
    size = kernel.shape[0]
    span = dilation * (size - 1)
    x = lax.pad(x, x.dtype.type(0), ((0, 0, 0), (*pads[0], 0), (*pads[1], 0), (0, 0, 0)))
    batch, height, width, channels = x.shape
    height, width = (height - span - 1) // stride + 1, (width - span - 1) // stride + 1

    def view(i: int, j: int) -> jax.Array:
        top, left = i * dilation, j * dilation
        bottom, right = top + (height - 1) * stride + 1, left + (width - 1) * stride + 1
        return lax.slice(
            x, (0, top, left, 0), (batch, bottom, right, channels), (1, stride, stride, 1)
        )

    products = [view(i, j) * kernel[i, j, 0] for i in range(size) for j in range(size)]
    return sum(products[1:], start=products[0])
