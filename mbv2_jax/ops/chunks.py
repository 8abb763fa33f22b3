"""A batch in pieces: on a CPU what a layer makes is then still in the cache when the next reads it.

As a whole, a batch of 32 makes arrays of 150 MB: each layer would write to memory and read from
it, and most of the time would go into that and into page faults.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from mbv2_jax.ops.platform import by_platform

# Input pixels in a piece: 4 images of 224 x 224. With 1 more time goes into starting each operation
# than the cache saves, and 8 no longer fit (docs/performance.md).
PIXELS = 4 * 224 * 224


def map_batch(function: Callable[[jax.Array], Any], images: jax.Array) -> Any:
    """Applies a function of a batch that treats images one by one; on CPUs piece by piece.

    Args:
      function: (n, H, W, C) -> a tree of arrays (n, ...), for any n.
      images: (N, H, W, C).

    Returns:
      What `function` returns of all images: a tree of arrays (N, ...).
    """
    count, height, width, _ = images.shape
    size = length(count, PIXELS // (height * width))

    def pieces(images: jax.Array) -> Any:
        results = lax.map(function, images.reshape(-1, size, *images.shape[1:]))
        return jax.tree.map(lambda part: part.reshape(count, *part.shape[2:]), results)

    if size == count:
        return function(images)
    return by_platform(images, cpu=pieces, default=function)


def length(count: int, most: int) -> int:
    """Returns the largest divisor of `count` that is not above `most`; at least 1."""
    return next((size for size in range(min(count, most), 1, -1) if count % size == 0), 1)
