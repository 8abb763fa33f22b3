"""Bilinear resizing of feature maps, with both conventions for the corners."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


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
    # In bfloat16 the weights of a pixel would not add up to 1.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows, columns = (
        # Matrix products: accelerators are slow at gathering, and the weights are constants.
        None if old == new else jnp.asarray(_weights(old, new, align_corners), wide)
        for old, new in zip(x.shape[1:3], size, strict=True)
    )
    dtype = x.dtype
    if rows is not None:
        x = jnp.einsum("oh,nhwc->nowc", rows, x.astype(wide), precision=lax.Precision.HIGHEST)
    if columns is not None:
        x = jnp.einsum("ow,nhwc->nhoc", columns, x.astype(wide), precision=lax.Precision.HIGHEST)
    return x.astype(dtype)


def _weights(old: int, new: int, align_corners: bool) -> np.ndarray:
    """Returns the weight of each of `old` pixels in each of `new` ones: float64 (new, old)."""
    if align_corners:
        position = np.arange(new) * ((old - 1) / max(new - 1, 1))
    else:
        position = (np.arange(new) + 0.5) * (old / new) - 0.5
    position = position.clip(0, old - 1)  # outside, the nearest pixel counts
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old)))
