"""XLA's own convolutions, the fastest on TPUs and GPUs."""

import jax
from jax import lax

# Zeros to add (before, after) on the two spatial axes.
Padding = tuple[tuple[int, int], tuple[int, int]]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int,
    pads: Padding,
    dilation: int = 1,
    relu6: bool = False,
) -> jax.Array:
    """Convolves (N, H, W, C) with a (K, K, C, C') kernel: see `conv.convolution`."""
    y = _convolve(x, kernel, stride, pads, dilation, groups=1)
    return apply_epilogue(y, bias, relu6)


def convolve_depthwise(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int,
    pads: Padding,
    dilation: int = 1,
    relu6: bool = False,
) -> jax.Array:
    """Convolves (N, H, W, C) with a (K, K, 1, C) kernel: see `conv.depthwise_convolution`."""
    y = _convolve(x, kernel, stride, pads, dilation, groups=x.shape[-1])
    return apply_epilogue(y, bias, relu6)


def apply_epilogue(y: jax.Array, bias: jax.Array | None, relu6: bool) -> jax.Array:
    """Adds the bias, if there is one, and applies ReLU6 if `relu6`."""
    if bias is not None:
        y = y + bias
    return clamp(y) if relu6 else y


def clamp(y: jax.Array) -> jax.Array:
    """Applies ReLU6, min(max(y, 0), 6), with operations of lax only.

    `jax.nn.relu6` is jitted, and XLA's CPU backend would make it a separate computation.
    """
    return lax.min(lax.max(y, y.dtype.type(0)), y.dtype.type(6))


def _convolve(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Padding, dilation: int, groups: int
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )
