"""Batches in pieces, so that a layer's results are still in the cache when the next one reads them.

A whole batch of 32 makes arrays of 150 MB: each layer would write them to main memory and read them
back, and most of the time would go into this and into page faults.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# Input pixels in a piece: 4 images of 224 x 224. A piece of 1 image spends more time on starting
# operations than the cache saves, and one of 8 no longer fits the cache (docs/performance.md).
PIXELS = 4 * 224 * 224


def map_pieces(function: Callable[[jax.Array], Any], images: jax.Array, *, size: int) -> Any:
    """Applies a function to pieces of `size` images, one after another: see `conv.map_batch`."""
    count = len(images)
    results = lax.map(function, images.reshape(-1, size, *images.shape[1:]))
    return jax.tree.map(lambda part: part.reshape(count, *part.shape[2:]), results)


def divisor(count: int, most: int) -> int:
    """Returns the largest divisor of `count` up to `most`; at least 1."""
    return next((size for size in range(min(count, most), 1, -1) if count % size == 0), 1)
