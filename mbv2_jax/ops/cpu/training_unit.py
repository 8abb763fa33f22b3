"""The unit of training: normalise, apply ReLU6, convolve, and compute the batch's statistics.

On TPUs and GPUs, XLA fuses the parts of a unit by itself. Its CPU backend does not: here the batch
goes through a unit piece by piece, forwards and backwards, and each piece stays in the cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mbv2_jax.ops import plain
from mbv2_jax.ops.cpu import convolution, depthwise
from mbv2_jax.ops.cpu.fusion import as_separate_computation
from mbv2_jax.ops.cpu.pieces import divisor
from mbv2_jax.ops.cpu.views import pad
from mbv2_jax.ops.normalization import Normalization
from mbv2_jax.ops.plain import Padding, clamp

# Bytes of a convolution's input or result, whichever is larger, in one piece: several arrays of
# that size fit a core's second-level cache and its share of the third.
PIECE_BYTES = 2_000_000


class _Convolution(NamedTuple):
    """A convolution without its arrays; hashable.

    Attributes:
      stride, pads, dilation, depthwise: of the convolution.
      shares: number of neighbouring devices that hold parts of one group.
    """

    stride: int
    pads: Padding
    dilation: int
    depthwise: bool
    shares: int


def supports(
    x: jax.Array,
    norm: Normalization | None,
    kernel: jax.Array,
    groups: int,
    *,
    stride: int,
    depthwise: bool,
) -> bool:
    """Returns whether `convolve` supports these arguments.

    It supports float32 or wider, groups that are evenly spread over the devices, and the kinds of
    convolution of this network.
    """
    devices = _count_devices()
    # 3 groups on 2 devices, for example, are uneven: one group would lie on both devices.
    even = groups * _count_shares(groups) % devices == 0 and len(x) % devices == 0
    wide = x.dtype == jnp.promote_types(jnp.float32, x.dtype)
    kind = depthwise or convolution.supports(kernel.shape, stride)
    # Convolutions of few channels take images, which have no pending normalisation.
    images = kernel.shape[0] != 1 and not depthwise
    return even and wide and kind and not (images and norm is not None)


def convolve(
    x: jax.Array,
    norm: Normalization | None,
    kernel: jax.Array,
    *,
    groups: int,
    depthwise: bool,
    stride: int,
    pads: Padding,
    dilation: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `conv.convolution_with_statistics` on each CPU device separately, piece by piece."""
    conv = _Convolution(stride, pads, dilation, depthwise, shares=_count_shares(groups))
    devices = _count_devices()
    # Repeated, so that each device has a mean and a factor for each of its groups.
    if norm is not None:
        mean, factor = (jnp.repeat(a.reshape(groups, -1), conv.shares, 0) for a in norm[:2])
        norm = Normalization(mean, factor, norm.bias)
    convolve_groups = partial(_convolve_groups, groups=groups * conv.shares // devices, conv=conv)
    y, *statistics = _map_devices(convolve_groups, devices)(x, norm, kernel)
    mean, var = (array[:: conv.shares].reshape(groups, 1, 1, 1, -1) for array in statistics)
    return y, mean, var


def _count_devices() -> int:
    """Returns the number of devices of the mesh in context; 1 without one."""
    return max(1, jax.sharding.get_abstract_mesh().size)


def _count_shares(groups: int) -> int:
    """Returns the number of devices that exchange the statistics of a group."""
    return max(1, _count_devices() // groups)


def _map_devices(function: Callable[..., Any], devices: int) -> Callable[..., Any]:
    """Returns `function` applied on each device of the mesh in context to its part of the batch.

    Left to itself, XLA would communicate at every piece.
    """
    if devices == 1:
        return function
    split = PartitionSpec(jax.sharding.get_abstract_mesh().axis_names)

    def apply(x: jax.Array, norm: Normalization | None, kernel: jax.Array) -> Any:
        norm_specs = norm and Normalization(split, split, PartitionSpec())  # type: ignore[arg-type]
        specs = (split, norm_specs, PartitionSpec())
        return jax.shard_map(function, in_specs=specs, out_specs=split, check_vma=False)(
            x, norm, kernel
        )

    return apply


def _convolve_groups(
    x: jax.Array, norm: Normalization | None, kernel: jax.Array, *, groups: int, conv: _Convolution
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the unit of a device's groups; means, factors and variances are (groups, C)."""
    unit = partial(_unit, conv=conv)
    # A single group needs no vmap, whose axis of length 1 would make XLA's products slower.
    if groups == 1:
        only = norm and Normalization(norm.mean[0], norm.factor[0], norm.bias)
        y, mean, var = unit(x, only, kernel)
        return y, mean[None], var[None]
    axes = norm and Normalization(0, 0, None)  # type: ignore[arg-type]
    grouped = x.reshape(groups, -1, *x.shape[1:])
    y, mean, var = jax.vmap(unit, (0, axes, None))(grouped, norm, kernel)
    return y.reshape(-1, *y.shape[2:]), mean, var


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _unit(
    x: jax.Array, norm: Normalization | None, kernel: jax.Array, conv: _Convolution
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the unit of one group, or of a device's share of one, piece by piece.

    The arrays of norm, the mean and the variance are (C,). Gradients are in reverse mode.
    """
    y, mean, squares = _convolve_pieces(x, norm, kernel, conv)
    var = squares / _values_per_channel(y)
    if conv.shares > 1:
        gathered = lax.all_gather(jnp.stack([mean, var]), **_group_axes(conv), axis=1)
        means, variances = gathered
        mean = means.mean(0)
        var = (variances + lax.square(means - mean)).mean(0)
    return y, mean, var


def _convolve_pieces(
    x: jax.Array, norm: Normalization | None, kernel: jax.Array, conv: _Convolution
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the result, its mean, and the sum of its squared deviations from the mean."""
    pieces = _split(x, _images_per_piece(x, kernel, conv))

    def run(i: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        y = _convolve_padded(_padded_input(pieces, i, norm, conv), kernel, conv)
        mean = y.mean((0, 1, 2))
        return y, mean, lax.square(y - mean).sum((0, 1, 2))

    steps = len(pieces)
    if steps == 1:
        return run(0)

    def body(i: jax.Array, carry: tuple) -> tuple:
        results, mean, squares = carry
        y, piece_mean, piece_squares = run(i)
        # Combines the means and sums of squares of the pieces so far and of this one, without a
        # difference of large numbers (Chan, Golub and LeVeque 1979).
        share = 1 / (i.astype(x.dtype) + 1)
        delta = piece_mean - mean
        squares += piece_squares + lax.square(delta) * (_values_per_channel(y) * i * share)
        return _store_piece(results, y, i), mean + delta * share, squares

    result = jax.eval_shape(run, 0)[0]
    zeros = jnp.zeros(result.shape[-1], x.dtype)
    carry = (_allocate_pieces(result.shape, steps, x), zeros, zeros)
    results, mean, squares = lax.fori_loop(0, steps, body, carry)
    return results.reshape(-1, *result.shape[1:]), mean, squares


def _forward(
    x: jax.Array, norm: Normalization | None, kernel: jax.Array, conv: _Convolution
) -> tuple[Any, Any]:
    y, mean, var = _unit(x, norm, kernel, conv)
    return (y, mean, var), (x, norm, kernel, y, mean)


def _backward(conv: _Convolution, saved: tuple, cotangents: tuple) -> tuple:
    x, norm, kernel, y, mean = saved
    y_gradient, *statistics_gradients = cotangents
    if conv.shares > 1:
        statistics_gradients = lax.psum(statistics_gradients, **_group_axes(conv))
    # The result's gradient has terms from its mean and its variance.
    values = _values_per_channel(y) * conv.shares
    mean_term, var_term = (array / values for array in statistics_gradients)
    terms = (mean, mean_term, 2 * var_term)
    size = _images_per_piece(x, kernel, conv)
    pieces = tuple(_split(array, size) for array in (x, y, y_gradient))

    def run(i: Any) -> tuple:
        return _piece_gradients(pieces, i, norm, kernel, terms, conv)

    steps = len(pieces[0])
    if steps == 1:
        x_gradient, norm_gradient, kernel_gradient = run(0)
    else:
        shapes = jax.eval_shape(run, 0)

        def body(i: jax.Array, carry: tuple) -> tuple:
            x_gradient, *sums = carry
            piece, *addends = run(i)
            stored = None if x_gradient is None else _store_piece(x_gradient, piece, i)
            return stored, *jax.tree.map(jnp.add, sums, addends)

        start = shapes[0] and _allocate_pieces(shapes[0].shape, steps, y_gradient)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1:])
        x_gradient, norm_gradient, kernel_gradient = lax.fori_loop(0, steps, body, (start, *zeros))
    if x_gradient is None:
        # x is images. Training does not use their gradient, and XLA then removes it.
        output_gradient = _output_gradient(y_gradient[None], y[None], 0, *terms)
        convolve = partial(
            plain.convolve, stride=conv.stride, pads=conv.pads, dilation=conv.dilation
        )
        (x_gradient,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(output_gradient)
    return x_gradient.reshape(x.shape), norm_gradient, kernel_gradient


_unit.defvjp(_forward, _backward)


def _piece_gradients(
    pieces: tuple,
    i: Any,
    norm: Normalization | None,
    kernel: jax.Array,
    terms: tuple,
    conv: _Convolution,
) -> tuple[jax.Array | None, Normalization | None, jax.Array]:
    """Returns a piece's gradient of x (None where x is images), of norm, and of the kernel."""
    xs, ys, y_gradients = pieces
    padded = _padded_input(xs, i, norm, conv)
    output = (y_gradients, ys, i, *terms)
    if conv.depthwise:
        options = {"shape": xs.shape[1:], "size": kernel.shape[0], "conv": conv}
        spread = as_separate_computation(_spread_output_gradient, *output, **options)
        input_gradient = depthwise.input_gradient(spread, kernel, conv.dilation)
        products = as_separate_computation(_kernel_products, padded, spread, **options)
        kernel_gradient = depthwise.kernel_gradient(products).reshape(kernel.shape)
    else:
        gradient = as_separate_computation(_output_gradient, *output)
        if kernel.shape[0] != 1:
            options = {"stride": conv.stride, "dilation": conv.dilation}
            kernel_gradient = convolution.kernel_gradient(padded, gradient, kernel.shape, **options)
            return None, None, kernel_gradient
        kernel_gradient = _pointwise_kernel_gradient(padded, gradient).reshape(kernel.shape)
        input_gradient = lax.dot_general(gradient, kernel[0, 0], (((3,), (1,)), ((), ())))
    if norm is None:
        return input_gradient, None, kernel_gradient
    normalized = as_separate_computation(_relu6_gradient, input_gradient, xs, i, norm)
    bias_gradient = normalized.sum((0, 1, 2))
    factor_gradient = ((_take_piece(xs, i) - norm.mean) * normalized).sum((0, 1, 2))
    return (
        normalized * norm.factor,
        Normalization(-norm.factor * bias_gradient, factor_gradient, bias_gradient),
        kernel_gradient,
    )


def _padded_input(
    pieces: jax.Array, i: Any, norm: Normalization | None, conv: _Convolution
) -> jax.Array:
    """Returns a piece as the convolution sees it: normalised, after ReLU6, and padded."""
    return as_separate_computation(_normalize_and_pad, pieces, i, norm, pads=conv.pads)


def _normalize_and_pad(
    pieces: jax.Array, i: Any, norm: Normalization | None, *, pads: Padding
) -> jax.Array:
    x = _take_piece(pieces, i)
    if norm is not None:
        x = clamp((x - norm.mean) * norm.factor + norm.bias)
    return pad(x, pads)


def _convolve_padded(padded: jax.Array, kernel: jax.Array, conv: _Convolution) -> jax.Array:
    if kernel.shape[0] == 1 and not conv.depthwise:
        return convolution.multiply(padded, kernel)
    lowering = depthwise if conv.depthwise else convolution
    options = {"stride": conv.stride, "dilation": conv.dilation}
    return as_separate_computation(lowering.convolve_padded, padded, kernel, **options)


def _output_gradient(
    y_gradients: jax.Array,
    ys: jax.Array,
    i: Any,
    mean: jax.Array,
    constant: jax.Array,
    slope: jax.Array,
) -> jax.Array:
    """Returns the gradient of a piece of the result, including the terms from its statistics."""
    return _take_piece(y_gradients, i) + (constant + slope * (_take_piece(ys, i) - mean))


def _spread_output_gradient(
    *arrays: Any, shape: tuple[int, ...], size: int, conv: _Convolution
) -> jax.Array:
    gradient = _output_gradient(*arrays)
    return depthwise.spread_gradient(gradient, shape, size, conv.stride, conv.pads, conv.dilation)


def _kernel_products(
    padded: jax.Array,
    spread: jax.Array,
    *,
    shape: tuple[int, ...],
    size: int,
    conv: _Convolution,
) -> list[jax.Array]:
    """Returns the products that `depthwise.kernel_gradient` sums, from a spread gradient."""
    span = conv.dilation * (size - 1)
    spans = [  # of the gradient's elements, which lie `stride` apart
        (n + before + after - span - 1) // conv.stride * conv.stride + 1
        for n, (before, after) in zip(shape[1:3], conv.pads, strict=True)
    ]
    rows, columns = (
        slice(span - before, span - before + n, conv.stride)
        for n, (before, _) in zip(spans, conv.pads, strict=True)
    )
    options = {"kernel_size": size, "stride": conv.stride, "dilation": conv.dilation}
    return depthwise.gradient_products(padded, spread[:, rows, columns], **options)


def _relu6_gradient(
    gradient: jax.Array, pieces: jax.Array, i: Any, norm: Normalization
) -> jax.Array:
    """Returns the gradient of a piece before ReLU6: 0 outside the open interval (0, 6)."""
    y = (_take_piece(pieces, i) - norm.mean) * norm.factor + norm.bias
    return lax.select((y > 0) & (y < 6), gradient, lax.full_like(gradient, 0))


def _pointwise_kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns the gradient (C, C') of a 1x1 kernel.

    The product takes the narrower array first, which is faster.
    """
    a, b = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))
    contracted = (((0,), (0,)), ((), ()))
    if a.shape[1] <= b.shape[1]:
        return lax.dot_general(a, b, contracted)
    return lax.dot_general(b, a, contracted).T


def _group_axes(conv: _Convolution) -> dict[str, Any]:
    """Returns the arguments with which JAX's collectives combine the devices of each group."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = range(mesh.size)
    groups = [list(devices[i : i + conv.shares]) for i in devices[:: conv.shares]]
    return {"axis_name": mesh.axis_names, "axis_index_groups": groups}


def _images_per_piece(x: jax.Array, kernel: jax.Array, conv: _Convolution) -> int:
    count, height, width, channels = x.shape
    results = height * width * kernel.shape[-1] // conv.stride**2
    larger = max(height * width * channels, results) * x.dtype.itemsize
    return divisor(count, PIECE_BYTES // larger)


def _split(x: jax.Array, size: int) -> jax.Array:
    """Returns x as (pieces, images of a piece, H, W, C)."""
    return x.reshape(-1, size, *x.shape[1:])


def _take_piece(pieces: jax.Array, i: Any) -> jax.Array:
    shape = pieces.shape[1:]
    return lax.dynamic_slice(pieces, (i, 0, 0, 0, 0), (1, *shape)).reshape(shape)


def _store_piece(results: jax.Array, piece: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(results, piece[None], (i, 0, 0, 0, 0))


def _allocate_pieces(shape: tuple[int, ...], steps: int, source: jax.Array) -> jax.Array:
    """Returns an array (steps, *shape) that is filled with an element of `source`.

    If it were filled with zeros, XLA would allocate the arrays of all layers at once, when the step
    begins.
    """
    return lax.broadcast(source[(0,) * source.ndim], (steps, *shape))


def _values_per_channel(y: jax.Array) -> int:
    return y.size // y.shape[-1]
