"""The network's convolutions: one function each, for all platforms."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from mbv2_jax.ops import plain
from mbv2_jax.ops.cpu import convolution as cpu_convolution
from mbv2_jax.ops.cpu import depthwise as cpu_depthwise
from mbv2_jax.ops.cpu import pieces, training_unit
from mbv2_jax.ops.lowering import by_platform
from mbv2_jax.ops.normalization import (
    Activation,
    DeferredActivation,
    Normalization,
    batch_statistics,
    materialize,
    normalize,
)


def explicit_padding(
    padding: str, size: Sequence[int], *, kernel_size: int, stride: int, dilation: int = 1
) -> plain.Padding:
    """Returns the zeros to add (before, after) on each spatial axis.

    Args:
      padding: 'torch' adds the same number on both sides, whatever the size (PyTorch's
        `padding=dilation * (kernel_size - 1) // 2`); 'same' is TensorFlow's SAME, which adds just
        enough for ceil(size / stride) outputs, and the odd zero after. Where stride > 1, its
        padding depends on the size.
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


def convolution(
    x: Activation,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int = 1,
    padding: str = "torch",
    dilation: int = 1,
    relu6: bool = False,
) -> jax.Array:
    """Convolves all channels with each kernel.

    Args:
      x: (N, H, W, C).
      kernel: (K, K, C, C'), K odd, same dtype as x.
      bias: (C',), added to the result; same dtype as x.
      stride: stride of both axes, 1 or more.
      padding: 'torch' or 'same', see `explicit_padding`.
      dilation: distance between neighbouring kernel elements.
      relu6: whether to apply ReLU6, min(max(y, 0), 6), to the result.

    Returns:
      (N, ceil(H / stride), ceil(W / stride), C') in x's dtype.
    """
    x = materialize(x)
    settings = _settings(x, kernel, stride, padding, dilation) | {"relu6": relu6}
    default: Callable[..., jax.Array] = partial(plain.convolve, **settings)
    if not cpu_convolution.supports(kernel.shape, stride):
        return default(x, kernel, bias)
    cpu = partial(cpu_convolution.convolve, **settings)
    return by_platform(x, kernel, bias, cpu=cpu, default=default)


def depthwise_convolution(
    x: Activation,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int = 1,
    padding: str = "torch",
    dilation: int = 1,
    relu6: bool = False,
) -> jax.Array:
    """Convolves every channel with its own kernel (section 3.1 of the paper).

    Args:
      x: (N, H, W, C).
      kernel: (K, K, 1, C), K odd, same dtype as x.
      bias, stride, padding, dilation, relu6: as for `convolution`.

    Returns:
      (N, ceil(H / stride), ceil(W / stride), C) in x's dtype.
    """
    x = materialize(x)
    settings = _settings(x, kernel, stride, padding, dilation) | {"relu6": relu6}
    return by_platform(
        x,
        kernel,
        bias,
        cpu=partial(cpu_depthwise.convolve, **settings),
        default=partial(plain.convolve_depthwise, **settings),
    )


def convolution_with_statistics(
    x: Activation,
    kernel: jax.Array,
    *,
    groups: int,
    depthwise: bool = False,
    stride: int = 1,
    padding: str = "torch",
    dilation: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Convolves in training, and computes the statistics that will normalise the result.

    If x is a `DeferredActivation`, its normalisation and ReLU6 are applied on the way in: the end
    of one layer and the beginning of the next are one unit. Of each unit, only the convolution's
    result is kept for the backward pass; everything else is recomputed from the results.

    On CPUs a unit processes the batch in pieces. With several CPU devices, their mesh should be in
    context (`jax.set_mesh`, or `jax.sharding.use_abstract_mesh` while tracing), with all of its
    axes splitting the batch: each device then processes its own images, and the devices exchange
    statistics once per layer. Without the mesh the result is the same, but XLA communicates at
    every piece.

    Args:
      x: (N, H, W, C).
      kernel: (K, K, C, C'), or (K, K, 1, C) where `depthwise`; same dtype as x.
      groups: number of equal parts of the batch, each of which has its own statistics.
      depthwise: whether each channel has its own kernel.
      stride, padding, dilation: as for `convolution`.

    Returns:
      The result (N, H', W', C') in x's dtype; its mean and biased variance, see
      `normalization.batch_statistics`.
    """
    x, norm = (x.x, x.norm) if isinstance(x, DeferredActivation) else (x, None)
    settings = _settings(x, kernel, stride, padding, dilation) | {"depthwise": depthwise}

    def default(
        x: jax.Array, norm: Normalization | None, kernel: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        if norm is not None:
            x = jax.nn.relu6(normalize(x, norm))
        convolve = depthwise_convolution if depthwise else convolution
        y = convolve(x, kernel, stride=stride, padding=padding, dilation=dilation)
        return y, *batch_statistics(y, groups)

    if not training_unit.supports(x, norm, kernel, groups, stride=stride, depthwise=depthwise):
        return default(x, norm, kernel)
    cpu = partial(training_unit.convolve, groups=groups, **settings)
    return by_platform(x, norm, kernel, cpu=cpu, default=default)


def map_batch(function: Callable[[jax.Array], Any], images: jax.Array) -> Any:
    """Applies a function that treats the images of a batch independently; on CPUs, in pieces.

    Args:
      function: (n, H, W, C) -> a tree of arrays (n, ...), for any n.
      images: (N, H, W, C); where N is symbolic, all go through at once.

    Returns:
      The function's results for all images: a tree of arrays (N, ...).
    """
    count, height, width, _ = images.shape
    if not isinstance(count, int):  # symbolic, in jax.export: the number of pieces is not known
        return function(images)
    size = pieces.divisor(count, pieces.PIXELS // (height * width))
    if size == count:
        return function(images)
    cpu = partial(pieces.map_pieces, function, size=size)
    return by_platform(images, cpu=cpu, default=function)


def _settings(
    x: jax.Array, kernel: jax.Array, stride: int, padding: str, dilation: int
) -> dict[str, Any]:
    """Returns the keyword arguments that every lowering takes."""
    pads = explicit_padding(
        padding, x.shape[1:3], kernel_size=kernel.shape[0], stride=stride, dilation=dilation
    )
    return {"stride": stride, "pads": pads, "dilation": dilation}
