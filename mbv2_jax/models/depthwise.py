"""Depthwise convolution, with a lowering per platform.

XLA's CPU backend runs a grouped `lax.conv_general_dilated` tens of times slower than the same sums
written out. TPUs want the plain convolution: the sums written out move more than twice the bytes
there. So there are two lowerings of the same result, and `lax.platform_dependent` picks one when
the program is lowered, leaving no conditional behind.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mbv2_jax.models.convolution import (
    Padding,
    apart,
    explicit_padding,
    finish,
    pad,
    plain,
    views,
)


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

    return lax.platform_dependent(x, kernel, bias, cpu=cpu, default=default)


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
    return (
        apart(sums, spread, kernel[::-1, ::-1], dilation=dilation),
        apart(kernel_gradient, pad(x, pads), gradient, **options),
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


def kernel_gradient(
    padded: jax.Array, gradient: jax.Array, *, kernel_size: int, stride: int, dilation: int = 1
) -> jax.Array:
    """The sum over images and positions of view times gradient, for each view: (K, K, 1, C).

    Autodiff would write K x K reductions over the whole batch, each reading x and the gradient
    again, on few threads. This is one reduction with K x K results that reads both once, in
    parallel over the batch. It sums in float32 or wider: of thousands of bfloat16 terms no digit
    would be left.
    """
    wide = jnp.promote_types(jnp.float32, padded.dtype)
    products = [
        view.astype(wide) * gradient.astype(wide)
        for view in views(padded, kernel_size, stride, dilation)
    ]
    zeros = [jnp.zeros((), wide)] * len(products)
    per_image = lax.reduce(products, zeros, _add_each, (1, 2))  # K x K of (N, C)
    shape = (kernel_size, kernel_size, 1, padded.shape[-1])
    return jnp.stack(per_image).sum(1).reshape(shape).astype(padded.dtype)


def _add_each(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    return [p + q for p, q in zip(a, b, strict=True)]
