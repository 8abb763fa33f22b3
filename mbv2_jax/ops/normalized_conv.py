"""The unit of training: normalise and cut off at 0 and 6, convolve, take the batch's statistics.

That is the end of one layer and the beginning of the next. Between two units lies the only array
that is kept for the backward pass, a convolution's result; all else is computed again from it.
TPUs and GPUs fuse what is in a unit by themselves. XLA's CPU backend doesn't: there the batch goes
through a unit piece by piece, forwards and backwards, and each piece stays in the cache meanwhile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec

from mbv2_jax.ops.chunks import length
from mbv2_jax.ops.convolution import (
    Padding,
    apart,
    channel_sums,
    explicit_padding,
    finish,
    pad,
    plain,
    pointwise_conv,
    product_gradient,
    stem_conv,
)
from mbv2_jax.ops.depthwise import (
    depthwise_conv,
    gradient_products,
    kernel_gradient,
    spread_gradient,
    sums,
)
from mbv2_jax.ops.platform import by_platform

# Of a convolution's input or result, whichever is larger, in one piece: several arrays of that size
# fit a core's second-level cache and its share of the third.
PIECE_BYTES = 2_000_000


class Norm(NamedTuple):
    """A normalisation, (x - mean) * factor + bias, of a batch in G groups.

    Attributes:
      mean, factor: (G, 1, 1, 1, C).
      bias: (C,).
    """

    mean: jax.Array
    factor: jax.Array
    bias: jax.Array


def normalize(x: jax.Array, norm: Norm) -> jax.Array:
    """Normalises (N, H, W, C), group by group; the arithmetic has the dtype of `norm`."""
    wide = x.reshape(norm.mean.shape[0], -1, *x.shape[1:]).astype(norm.factor.dtype)
    if x.dtype == norm.factor.dtype:
        y = (wide - norm.mean) * norm.factor + norm.bias
    else:
        y = wide * norm.factor + (norm.bias - norm.mean * norm.factor)
    return y.reshape(x.shape).astype(x.dtype)


def statistics(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the biased variance of (N, H, W, C) in consecutive groups.

    In float32 and wider the variance takes a second pass over x. E[x^2] - E[x]^2 loses every digit
    there once a channel's mean is some thousand times its deviation, and four where it is a hundred
    times; a frozen or badly scaled input gets there. Of a bfloat16 x, rounded to 2^-9 of its size,
    both sums are taken at once: what their difference loses in float32 is less than what the
    rounding of x had lost before. It is memory that takes the time there, and neither this nor the
    gradient of it reads x a second time (docs/tpu_step.md).

    Returns:
      Two of (groups, 1, 1, 1, C), float32 or wider.
    """
    wide = x.reshape(groups, -1, *x.shape[1:]).astype(jnp.promote_types(jnp.float32, x.dtype))
    mean = wide.mean((1, 2, 3), keepdims=True)
    if x.dtype == wide.dtype:
        return mean, lax.square(wide - mean).mean((1, 2, 3), keepdims=True)
    square = lax.square(wide).mean((1, 2, 3), keepdims=True)
    return mean, jnp.maximum(square - lax.square(mean), 0)


class _Conv(NamedTuple):
    """A convolution but for its arrays, hashable.

    Attributes:
      stride, pads, depthwise: of the convolution.
      shares: how many devices, side by side, hold parts of one group.
    """

    stride: int
    pads: Padding
    depthwise: bool
    shares: int


def normalized_conv(
    x: jax.Array,
    norm: Norm | None,
    kernel: jax.Array,
    *,
    stride: int,
    padding: str,
    depthwise: bool,
    groups: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises, cuts off at 0 and 6, convolves, and takes the result's statistics.

    Where the batch is split over several CPU devices, their mesh should be in context
    (`jax.set_mesh`, or `jax.sharding.use_abstract_mesh` while tracing), all of its axes splitting
    the batch: each device then takes its images piece by piece, and they exchange statistics once a
    layer. Without it the result is the same, but XLA exchanges something at every piece.

    Args:
      x: (N, H, W, C).
      norm: what is done to x, with ReLU6 after it; None for nothing.
      kernel: (K, K, C, C'), or (K, K, 1, C) where depthwise; same dtype as x.
      stride: of both axes; 1 where K is 1.
      padding: 'torch' or 'same', see `convolution.explicit_padding`.
      depthwise: each channel by itself.
      groups: how many equal parts of the batch have statistics of their own.

    Returns:
      The result (N, H', W', C') in x's dtype; its mean and biased variance, see `statistics`.
    """
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    # How many devices have to exchange what they know of a group.
    shares = max(1, devices // groups)
    convolve: Callable[..., jax.Array] = pointwise_conv
    if kernel.shape[0] != 1:
        convolve = depthwise_conv if depthwise else stem_conv
        convolve = partial(convolve, stride=stride, padding=padding)
    whole = partial(_whole, convolve=convolve, groups=groups)
    narrow = x.dtype != jnp.promote_types(jnp.float32, x.dtype)
    # As 3 groups on 2 devices: neither has each device whole groups nor each group whole devices.
    uneven = groups * shares % devices or len(x) % devices
    if narrow or uneven:
        return whole(x, norm, kernel)
    pads = explicit_padding(padding, x.shape[1:3], kernel_size=kernel.shape[0], stride=stride)
    conv = _Conv(stride, pads, depthwise, shares)
    pieces = partial(_pieces, groups=groups, devices=devices, conv=conv)
    return by_platform(x, norm, kernel, cpu=pieces, default=whole)


def _whole(
    x: jax.Array,
    norm: Norm | None,
    kernel: jax.Array,
    *,
    convolve: Callable[..., jax.Array],
    groups: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`normalized_conv` of the whole batch at once, for compilers that fuse what is in it."""
    if norm is not None:
        x = nn.relu6(normalize(x, norm))
    y = convolve(x, kernel)
    return y, *statistics(y, groups)


def _pieces(
    x: jax.Array, norm: Norm | None, kernel: jax.Array, *, groups: int, devices: int, conv: _Conv
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`normalized_conv` on each CPU device by itself, piece by piece."""
    # A mean and a factor for each group of each device.
    if norm is not None:
        mean, factor = (jnp.repeat(a.reshape(groups, -1), conv.shares, 0) for a in norm[:2])
        norm = Norm(mean, factor, norm.bias)
    convolve = partial(_each_group, groups=groups * conv.shares // devices, conv=conv)
    y, *taken = _on_each_device(convolve, devices)(x, norm, kernel)
    mean, var = (array[:: conv.shares].reshape(groups, 1, 1, 1, -1) for array in taken)
    return y, mean, var


def _on_each_device(convolve: Callable[..., Any], devices: int) -> Callable[..., Any]:
    """Applies `convolve` on each device of the mesh in context to its part of the batch.

    Left to itself, XLA would exchange something at every piece.
    """
    if devices == 1:
        return convolve
    each = PartitionSpec(jax.sharding.get_abstract_mesh().axis_names)

    def apply(x: jax.Array, norm: Norm | None, kernel: jax.Array) -> Any:
        of_norm = norm and Norm(each, each, PartitionSpec())  # type: ignore[arg-type]
        given = (each, of_norm, PartitionSpec())
        return jax.shard_map(convolve, in_specs=given, out_specs=each, check_vma=False)(
            x, norm, kernel
        )

    return apply


def _each_group(
    x: jax.Array, norm: Norm | None, kernel: jax.Array, *, groups: int, conv: _Conv
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`normalized_conv` of a device's groups; means, factors and variances are (groups, C)."""
    unit = partial(_unit, conv=conv)
    # One group is not mapped over: an axis of length 1 would keep XLA from its best products.
    if groups == 1:
        alone = norm and Norm(norm.mean[0], norm.factor[0], norm.bias)
        y, mean, var = unit(x, alone, kernel)
        return y, mean[None], var[None]
    axes = norm and Norm(0, 0, None)  # type: ignore[arg-type]
    grouped = x.reshape(groups, -1, *x.shape[1:])
    y, mean, var = jax.vmap(unit, (0, axes, None))(grouped, norm, kernel)
    return y.reshape(-1, *y.shape[2:]), mean, var


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _unit(
    x: jax.Array, norm: Norm | None, kernel: jax.Array, conv: _Conv
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`normalized_conv` of one group, or a device's share of one, piece by piece.

    The arrays of norm, the mean and the variance are (C,). Differentiable backwards.
    """
    y, mean, squares = _convolve_pieces(x, norm, kernel, conv)
    var = squares / _values(y)
    if conv.shares > 1:
        means, variances = lax.all_gather(jnp.stack([mean, var]), **_sharers(conv), axis=1)
        mean = means.mean(0)
        var = (variances + lax.square(means - mean)).mean(0)
    return y, mean, var


def _convolve_pieces(
    x: jax.Array, norm: Norm | None, kernel: jax.Array, conv: _Conv
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the result, its mean, and the sum of squares of what it is off that."""
    view = _view(x, _images_in_a_piece(x, kernel, conv))

    def run(i: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        y = _convolve(_entering(view, i, norm, conv), kernel, conv)
        mean = y.mean((0, 1, 2))
        return y, mean, lax.square(y - mean).sum((0, 1, 2))

    steps = len(view)
    if steps == 1:
        return run(0)

    def body(i: jax.Array, carry: tuple) -> tuple:
        results, mean, squares = carry
        y, piece_mean, piece_squares = run(i)
        # Joins the mean and the sum of squares of what was before and of this piece, without a
        # difference of large numbers (Chan, Golub and LeVeque 1979).
        share = 1 / (i.astype(x.dtype) + 1)
        off = piece_mean - mean
        squares += piece_squares + lax.square(off) * (_values(y) * i * share)
        return _store(results, y, i), mean + off * share, squares

    result = jax.eval_shape(run, 0)[0]
    zeros = jnp.zeros(result.shape[-1], x.dtype)
    carry = (_room(result.shape, steps, x), zeros, zeros)
    results, mean, squares = lax.fori_loop(0, steps, body, carry)
    return results.reshape(-1, *result.shape[1:]), mean, squares


def _forward(x: jax.Array, norm: Norm | None, kernel: jax.Array, conv: _Conv) -> tuple[Any, Any]:
    y, mean, var = _unit(x, norm, kernel, conv)
    return (y, mean, var), (x, norm, kernel, y, mean)


def _backward(conv: _Conv, saved: tuple, cotangents: tuple) -> tuple:
    x, norm, kernel, y, mean = saved
    of_y, *of_statistics = cotangents
    if conv.shares > 1:
        of_statistics = lax.psum(of_statistics, **_sharers(conv))
    # The result's gradient, with what comes through its mean and variance.
    of_mean, of_var = (array / (_values(y) * conv.shares) for array in of_statistics)
    terms = (mean, of_mean, 2 * of_var)
    size = _images_in_a_piece(x, kernel, conv)
    views = tuple(_view(array, size) for array in (x, y, of_y))

    def run(i: Any) -> tuple:
        return _piece_gradients(views, i, norm, kernel, terms, conv)

    steps = len(views[0])
    if steps == 1:
        of_x, of_norm, of_kernel = run(0)
    else:
        shapes = jax.eval_shape(run, 0)

        def body(i: jax.Array, carry: tuple) -> tuple:
            of_x, *sums_before = carry
            piece, *sums_here = run(i)
            stored = None if of_x is None else _store(of_x, piece, i)
            return stored, *jax.tree.map(jnp.add, sums_before, sums_here)

        room = None if shapes[0] is None else _room(shapes[0].shape, steps, of_y)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1:])
        of_x, of_norm, of_kernel = lax.fori_loop(0, steps, body, (room, *zeros))
    if of_x is None:
        # Of images. Nobody asks for it in training: then it is not computed.
        whole = _leave(of_y[None], y[None], 0, *terms)
        transposed = jax.linear_transpose(
            lambda x: plain(x, kernel, stride=conv.stride, pads=conv.pads), x
        )
        (of_x,) = transposed(whole)
    return of_x.reshape(x.shape), of_norm, of_kernel


_unit.defvjp(_forward, _backward)


def _piece_gradients(
    views: tuple, i: Any, norm: Norm | None, kernel: jax.Array, terms: tuple, conv: _Conv
) -> tuple[jax.Array | None, Norm | None, jax.Array]:
    """Returns a piece's gradient of x (None where x is the images), of norm, and of the kernel."""
    xs, ys, of_ys = views
    entering = _entering(xs, i, norm, conv)
    if kernel.shape[0] == 1:
        leaving = apart(_leave, of_ys, ys, i, *terms)
        of_kernel = _product_gradient(entering, leaving).reshape(kernel.shape)
        of_entering = lax.dot_general(leaving, kernel[0, 0], (((3,), (1,)), ((), ())))
    elif conv.depthwise:
        shape, size = xs.shape[1:], kernel.shape[0]
        spread = apart(_leave_spread, of_ys, ys, i, *terms, shape=shape, size=size, conv=conv)
        of_entering = apart(sums, spread, kernel[::-1, ::-1])
        products = apart(_products, entering, spread, shape=shape, size=size, conv=conv)
        of_kernel = kernel_gradient(products).reshape(kernel.shape)
    else:
        leaving = apart(_leave, of_ys, ys, i, *terms)
        return None, None, product_gradient(entering, leaving, kernel.shape, conv.stride)
    if norm is None:
        return of_entering, None, of_kernel
    through = apart(_through_relu6, of_entering, xs, i, norm)
    of_bias = through.sum((0, 1, 2))
    of_factor = ((_piece(xs, i) - norm.mean) * through).sum((0, 1, 2))
    return through * norm.factor, Norm(-norm.factor * of_bias, of_factor, of_bias), of_kernel


def _entering(view: jax.Array, i: Any, norm: Norm | None, conv: _Conv) -> jax.Array:
    """What the convolution sees of a piece: normalised, cut off at 0 and 6, with its margins."""
    return apart(_enter, view, i, norm, pads=conv.pads)


def _enter(view: jax.Array, i: Any, norm: Norm | None, *, pads: Padding) -> jax.Array:
    x = _piece(view, i)
    if norm is not None:
        x = finish((x - norm.mean) * norm.factor + norm.bias, None, relu6=True)
    return pad(x, pads)


def _convolve(entering: jax.Array, kernel: jax.Array, conv: _Conv) -> jax.Array:
    if kernel.shape[0] == 1:
        return lax.dot_general(entering, kernel[0, 0], (((3,), (0,)), ((), ())))
    return apart(sums if conv.depthwise else channel_sums, entering, kernel, stride=conv.stride)


def _leave(
    of_ys: jax.Array, ys: jax.Array, i: Any, mean: jax.Array, constant: jax.Array, slope: jax.Array
) -> jax.Array:
    """The gradient of a piece of the result."""
    return _piece(of_ys, i) + (constant + slope * (_piece(ys, i) - mean))


def _leave_spread(*arrays: Any, shape: tuple, size: int, conv: _Conv) -> jax.Array:
    return spread_gradient(_leave(*arrays), shape, size, conv.stride, conv.pads)


def _products(
    entering: jax.Array, spread: jax.Array, *, shape: tuple, size: int, conv: _Conv
) -> list[jax.Array]:
    """Takes the gradient out of what `_leave_spread` made of it, for `kernel_gradient`."""
    tops = [size - 1 - before for before, _ in conv.pads]
    results = [
        (n + before + after - size) // conv.stride * conv.stride + 1
        for n, (before, after) in zip(shape[1:3], conv.pads, strict=True)
    ]
    rows, columns = (
        slice(top, top + span, conv.stride) for top, span in zip(tops, results, strict=True)
    )
    gradient = spread[:, rows, columns]
    return gradient_products(entering, gradient, kernel_size=size, stride=conv.stride)


def _through_relu6(gradient: jax.Array, view: jax.Array, i: Any, norm: Norm) -> jax.Array:
    """The gradient of what was cut off at 0 and 6 is 0, of 0 and 6 themselves, too."""
    y = (_piece(view, i) - norm.mean) * norm.factor + norm.bias
    return lax.select((y > 0) & (y < 6), gradient, lax.full_like(gradient, 0))


def _product_gradient(entering: jax.Array, leaving: jax.Array) -> jax.Array:
    """The gradient (C, C') of a 1x1 kernel; the narrower array first, which is faster."""
    a, b = (array.reshape(-1, array.shape[-1]) for array in (entering, leaving))
    contracted = (((0,), (0,)), ((), ()))
    if a.shape[1] <= b.shape[1]:
        return lax.dot_general(a, b, contracted)
    return lax.dot_general(b, a, contracted).T


def _sharers(conv: _Conv) -> dict[str, Any]:
    """Which devices hold parts of this one's group, as JAX's collectives take it."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = range(mesh.size)
    groups = [list(devices[i : i + conv.shares]) for i in devices[:: conv.shares]]
    return {"axis_name": mesh.axis_names, "axis_index_groups": groups}


def _images_in_a_piece(x: jax.Array, kernel: jax.Array, conv: _Conv) -> int:
    count, height, width, channels = x.shape
    results = height * width * kernel.shape[-1] // conv.stride**2
    larger = max(height * width * channels, results) * x.dtype.itemsize
    return length(count, PIECE_BYTES // larger)


def _view(x: jax.Array, size: int) -> jax.Array:
    """Returns x as (pieces, images of a piece, H, W, C)."""
    return x.reshape(-1, size, *x.shape[1:])


def _piece(view: jax.Array, i: Any) -> jax.Array:
    return lax.dynamic_slice(view, (i, 0, 0, 0, 0), (1, *view.shape[1:])).reshape(view.shape[1:])


def _store(results: jax.Array, piece: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(results, piece[None], (i, 0, 0, 0, 0))


def _room(shape: tuple[int, ...], steps: int, source: jax.Array) -> jax.Array:
    """Returns room for `steps` pieces, of any values: of an element of `source`.

    Not of zeros: XLA would make the room of all layers at once, at the step's beginning.
    """
    return lax.broadcast(source[(0,) * source.ndim], (steps, *shape))


def _values(y: jax.Array) -> int:
    """How many values each channel has."""
    return y.size // y.shape[-1]
