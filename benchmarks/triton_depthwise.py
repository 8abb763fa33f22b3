"""A depthwise 3x3 convolution written in Pallas for Triton, a candidate of benchmarks/gpu.py.

A program computes a tile of the result: some rows, COLUMNS of their pixels, and some channels. It
reads each pixel of its input once for every column of the kernel, and not once for each of the nine
products. Sums are in float32. The same kernel computes the input's gradient, which is a sum over
taps of the result's gradient, with other taps for each phase of the stride. For the kernel's
gradient each of PROGRAMS programs takes a share of the rows, and XLA adds up their sums.

Without a GPU it runs in Pallas's interpreter, slowly.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

SIZE, PAD = 3, 1  # of the kernel; before and behind rows and columns
COLUMNS = 16
SUMS = 4  # tiles that a program adds up at the same time; more do not fit into the registers
PROGRAMS = 1024  # several for each multiprocessor

Taps = Sequence[Sequence[tuple[int, int]]]  # of each phase: (kernel's index, offset in the source)


class _Stride(NamedTuple):
    """Result pixel `result * i + phase` reads source pixels `source * i + offset`."""

    source: int
    result: int
    taps: Taps


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(
    x: jax.Array, kernel: jax.Array, stride: int, interpret: bool = False
) -> jax.Array:
    """Convolves each channel by itself, with one zero around the images.

    Args:
      x: (N, H, W, C), floating.
      kernel: (3, 3, 1, C), same dtype.
      stride: 1 or 2.
      interpret: whether to run in Pallas's interpreter, without a GPU.

    Returns:
      (N, ceil(H / stride), ceil(W / stride), C), same dtype. Reverse mode differentiates it.
    """
    taps = [[(k, k - PAD) for k in range(SIZE)]]
    sizes = [-(-size // stride) for size in x.shape[1:3]]
    return _gather(x, kernel, _Stride(stride, 1, taps), sizes, interpret)


def _forward(x: jax.Array, kernel: jax.Array, stride: int, interpret: bool) -> tuple[Any, Any]:
    return depthwise_conv(x, kernel, stride, interpret), (x, kernel)


def _backward(stride: int, interpret: bool, saved: Any, gradient: jax.Array) -> tuple[Any, Any]:
    x, kernel = saved
    # Pixel stride * i + phase was read by result i + offset with the kernel's k.
    taps = [
        [(k, (phase + PAD - k) // stride) for k in range(SIZE) if (phase + PAD - k) % stride == 0]
        for phase in range(stride)
    ]
    of_x = _gather(gradient, kernel, _Stride(1, stride, taps), x.shape[1:3], interpret)
    return of_x, _kernel_gradient(x, gradient, stride, interpret).astype(kernel.dtype)


depthwise_conv.defvjp(_forward, _backward)


def _gather(
    source: jax.Array, kernel: jax.Array, stride: _Stride, sizes: Sequence[int], interpret: bool
) -> jax.Array:
    """Returns (N, *sizes, C): for each pixel the sum over its taps in `source`."""
    count, _, _, channels = source.shape
    width = _width(channels)
    rows = max(1, SUMS // stride.result**2)
    tiles = [_ceil(_ceil(sizes[0], stride.result), rows)]
    grid = (
        count * tiles[0],
        _ceil(_ceil(sizes[1], stride.result), COLUMNS),
        _ceil(channels, width),
    )
    return pl.pallas_call(
        partial(_gather_tile, stride=stride, tiles=tiles[0], rows=rows, width=width),
        out_shape=jax.ShapeDtypeStruct((count, *sizes, channels), source.dtype),
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="depthwise_gather",
    )(source, kernel)


def _gather_tile(
    source: Any, kernel: Any, result: Any, *, stride: _Stride, tiles: int, rows: int, width: int
) -> None:
    image, first = pl.program_id(0) // tiles, pl.program_id(0) % tiles * rows
    columns = pl.program_id(1) * COLUMNS + jnp.arange(COLUMNS)
    channels = pl.program_id(2) * width + jnp.arange(width)
    weights = _weights(kernel, channels)
    phases = range(stride.result)
    sums = {
        key: jnp.zeros((COLUMNS, width), jnp.float32)
        for key in itertools.product(range(rows), phases, phases)
    }
    offsets = sorted({offset for taps in stride.taps for _, offset in taps})
    above, below = offsets[0], stride.source * (rows - 1) + offsets[-1]
    for row, offset in itertools.product(range(above, below + 1), offsets):
        # The result rows that need this row, with their rows of the kernel; then the columns.
        of_rows = [
            (i, phase, k)
            for i, phase in itertools.product(range(rows), phases)
            for k, tap in stride.taps[phase]
            if stride.source * i + tap == row
        ]
        of_columns = [
            (phase, k) for phase in phases for k, tap in stride.taps[phase] if tap == offset
        ]
        where = (stride.source * first + row, stride.source * columns + offset)
        pixels = _load(source, image, *where, channels)
        for (i, p, k), (q, m) in itertools.product(of_rows, of_columns):
            sums[i, p, q] += pixels * weights[k][m]
    for (i, p, q), total in sums.items():
        where = (stride.result * (first + i) + p, stride.result * columns + q)
        _store(result, image, *where, channels, total)


def _kernel_gradient(x: jax.Array, gradient: jax.Array, stride: int, interpret: bool) -> jax.Array:
    """Returns (3, 3, 1, C), float32."""
    count, height, columns, channels = gradient.shape
    width = _width(channels)
    blocks = _ceil(channels, width)
    tiles = count * height * _ceil(columns, COLUMNS)
    each = _ceil(tiles, max(1, PROGRAMS // blocks))
    parts = _ceil(tiles, each)
    found = pl.pallas_call(
        partial(_kernel_gradient_part, stride=stride, each=each, width=width),
        out_shape=jax.ShapeDtypeStruct((parts, SIZE, SIZE, 1, channels), jnp.float32),
        grid=(parts, blocks),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="depthwise_kernel_gradient",
    )(x, gradient)
    return found.sum(0)


def _kernel_gradient_part(
    x: Any, gradient: Any, result: Any, *, stride: int, each: int, width: int
) -> None:
    _, height, columns, _ = gradient.shape
    part, across = pl.program_id(0), _ceil(columns, COLUMNS)
    channels = pl.program_id(1) * width + jnp.arange(width)

    def add(step: Any, sums: tuple) -> tuple:
        tile = part * each + step
        image, row = tile // (across * height), tile // across % height
        there = tile % across * COLUMNS + jnp.arange(COLUMNS)
        # Images beyond the last one contribute zero.
        moved = _load(gradient, image, row, there, channels)
        pixels = (
            _load(x, image, stride * row + k - PAD, stride * there + m - PAD, channels)
            for k, m in itertools.product(range(SIZE), repeat=2)
        )
        return tuple(total + some * moved for total, some in zip(sums, pixels, strict=True))

    zeros = (jnp.zeros((COLUMNS, width), jnp.float32),) * SIZE**2
    sums = lax.fori_loop(0, each, add, zeros)
    for (k, m), total in zip(itertools.product(range(SIZE), repeat=2), sums, strict=True):
        plgpu.store(
            result.at[part, k, m, 0, channels], total.sum(0), mask=channels < result.shape[-1]
        )


def _weights(kernel: Any, channels: jax.Array) -> list[list[jax.Array]]:
    mask = channels < kernel.shape[-1]
    return [
        [
            plgpu.load(kernel.at[k, m, 0, channels], mask=mask, other=0.0).astype(jnp.float32)
            for m in range(SIZE)
        ]
        for k in range(SIZE)
    ]


def _load(array: Any, image: Any, row: Any, columns: Any, channels: Any) -> jax.Array:
    """Returns (columns, channels) in float32, zero where the array ends."""
    where, mask = _where(array, image, row, columns, channels)
    return plgpu.load(where, mask=mask, other=0.0).astype(jnp.float32)


def _store(array: Any, image: Any, row: Any, columns: Any, channels: Any, value: Any) -> None:
    where, mask = _where(array, image, row, columns, channels)
    plgpu.store(where, value.astype(array.dtype), mask=mask)


def _where(array: Any, image: Any, row: Any, columns: Any, channels: Any) -> tuple[Any, Any]:
    """Returns a view of (columns, channels), and the mask of its part inside the array."""
    count, height, width, depth = array.shape
    columns, channels = columns[:, None], channels[None]
    inside = (image < count) & (row >= 0) & (row < height)
    mask = inside & (columns >= 0) & (columns < width) & (channels < depth)
    return array.at[image, row, columns, channels], mask


def _width(channels: int) -> int:
    """Returns the channels of a program: a power of two that leaves few unused."""
    return next(width for width in (64, 32, 16, 8) if channels % width == 0 or width == 8)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
