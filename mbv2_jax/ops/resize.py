"""Bilinear resizing of feature maps, with both conventions for the corners."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from mbv2_jax.ops import lowering

# LiteRT's converter knows the operation by this name.
COMPOSITE = "odml.upsample_bilinear2d"


def resize_bilinear(x: jax.Array, size: Sequence[int], *, align_corners: bool) -> jax.Array:
    """Resizes maps by bilinear interpolation, without antialiasing.

    Args:
      x: (N, H, W, C), floating.
      size: (H', W') of the result.
      align_corners: True places the centres of the corner pixels of x and of the result upon each
        other, as TensorFlow's DeepLab does; False their outer corners, as torch does by default.

    Returns:
      (N, H', W', C) in x's dtype.
    """
    new = (size[0], size[1])
    if x.shape[1:3] == new:
        return x
    return (_named if lowering.has_composites() else _resized)(x, new, align_corners)


def _resized(x: jax.Array, size: tuple[int, int], align_corners: bool) -> jax.Array:
    # In bfloat16 the weights of a pixel would not add up to 1.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows, columns = (
        # Matrix products: accelerators are slow at gathering.
        None if old == new else _weights(old, new, align_corners, wide)
        for old, new in zip(x.shape[1:3], size, strict=True)
    )
    dtype = x.dtype
    if rows is not None:
        x = jnp.einsum("oh,nhwc->nowc", rows, x.astype(wide), precision=lax.Precision.HIGHEST)
    if columns is not None:
        x = jnp.einsum("ow,nhwc->nhoc", columns, x.astype(wide), precision=lax.Precision.HIGHEST)
    return x.astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _named(x: jax.Array, size: tuple[int, int], align_corners: bool) -> jax.Array:
    """Resizes maps in a composite operation, so that exporters recognise it."""

    def decomposition(x: jax.Array, **attributes: object) -> jax.Array:
        del attributes  # the same values, as arrays
        return _resized(x, size, align_corners)

    resize = lax.composite(decomposition, name=COMPOSITE)
    resized: jax.Array = resize(
        x, size=np.array(size, np.int64), align_corners=align_corners, is_nchw_op=False
    )
    return resized


@_named.defjvp  # JAX differentiates no composites
def _named_jvp(
    size: tuple[int, int],
    align_corners: bool,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    return _named(*primals, size, align_corners), _resized(*tangents, size, align_corners)


def _weights(old: int, new: int, align_corners: bool, dtype: DTypeLike) -> jax.Array:
    """Returns the weight of each of `old` pixels in each of `new` ones, (new, old)."""
    # Whole numbers: the position of pixel i is step[i] / steps, and only the last line rounds.
    pixel = jnp.arange(new)
    if align_corners:
        step, steps = pixel * (old - 1), max(new - 1, 1)
    else:
        step, steps = (2 * pixel + 1) * old - new, 2 * new
    step = step.clip(0, (old - 1) * steps)  # outside, the nearest pixel counts
    distance = abs(step[:, None] - steps * jnp.arange(old))
    return jnp.maximum(0, steps - distance).astype(dtype) / steps
