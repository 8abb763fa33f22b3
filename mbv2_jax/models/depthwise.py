"""Depthwise and pointwise convolutions, each with a lowering per platform.

XLA's CPU backend runs `lax.conv_general_dilated` many times slower than the same sums written out,
for both operations that MobileNetV2 consists of. TPUs want the plain convolution: the sums written
out move more than twice the bytes there. So there are two lowerings of the same result, and
`lax.platform_dependent` picks one when the program is lowered, leaving no conditional behind.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

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
    """The same as K x K multiply-adds of shifted views, K x K sums in the kernel's gradient.

    Differentiable backwards, also twice; forward mode (`jax.jvp`) has no rule here.
    """
    return _apart(_sum, x, kernel, stride, pads, dilation)


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
    return (
        _apart(_input_gradient, x, kernel, gradient, stride, pads, dilation),
        _apart(_kernel_gradient, x, kernel, gradient, stride, pads, dilation),
    )


_shifted_sums.defvjp(_forward, _backward)


def _apart(function: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    """Calls `function` as a computation of its own, across whose border XLA fuses nothing.

    Without the border XLA's CPU backend computes these sums again inside each of their users
    (normalisation, its statistics, its gradient), and what feeds them again for each view. Its
    `optimization_barrier` doesn't help: it is gone before the CPU backend fuses.
    """
    with set_xla_metadata(inlineable="false"):
        return function(*arguments)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _sum(x: jax.Array, kernel: jax.Array, stride: int, pads: Padding, dilation: int) -> jax.Array:
    taps = kernel.reshape(-1, kernel.shape[-1])
    views = _views(x, kernel.shape[0], stride, pads, dilation)
    products = [view * tap for view, tap in zip(views, taps, strict=True)]
    return sum(products[1:], start=products[0])


@partial(jax.jit, static_argnums=(3, 4, 5))
def _input_gradient(
    x: jax.Array,
    kernel: jax.Array,
    gradient: jax.Array,
    stride: int,
    pads: Padding,
    dilation: int,
) -> jax.Array:
    """The sums transposed; of x only the shape matters."""
    transposed = jax.linear_transpose(lambda x: _sum(x, kernel, stride, pads, dilation), x)
    return transposed(gradient)[0]


@partial(jax.jit, static_argnums=(3, 4, 5))
def _kernel_gradient(
    x: jax.Array,
    kernel: jax.Array,
    gradient: jax.Array,
    stride: int,
    pads: Padding,
    dilation: int,
) -> jax.Array:
    """The sum over images and positions of view times gradient, for each view; in kernel's shape.

    Autodiff would write K x K reductions over the whole batch, each reading x and the gradient
    again, on few threads. This is one reduction with K x K results that reads both once, in
    parallel over the batch. It sums in float32 or wider: of thousands of bfloat16 terms no digit
    would be left.
    """
    wide = jnp.promote_types(jnp.float32, x.dtype)
    products = [
        view.astype(wide) * gradient.astype(wide)
        for view in _views(x, kernel.shape[0], stride, pads, dilation)
    ]
    zeros = [jnp.zeros((), wide)] * len(products)
    sums = lax.reduce(products, zeros, _add_each, (1, 2))  # K x K of (N, C)
    return jnp.stack(sums).sum(1).reshape(kernel.shape).astype(kernel.dtype)


def _add_each(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    return [p + q for p, q in zip(a, b, strict=True)]


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
