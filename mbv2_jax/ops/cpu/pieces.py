"""A batch in pieces: the results of one layer are still in the cache when the next reads them.

As a whole, a batch of 32 makes arrays of 150 MB: each layer would write to memory and read from
it, and most of the time would go into that and into page faults.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# Input pixels in a piece: 4 images of 224 x 224. With 1 more time goes into starting each operation
# than the cache saves, and 8 no longer fit (docs/performance.md).
PIXELS = 4 * 224 * 224


def map_pieces(function: Callable[[jax.Array], Any], images: jax.Array, *, size: int) -> Any:
    """Applies a function to pieces of `size` images, one after another: see `conv.map_batch`."""
    count = len(images)
    results = lax.map(function, images.reshape(-1, size, *images.shape[1:]))
    return jax.tree.map(lambda part: part.reshape(count, *part.shape[2:]), results)


def divisor(count: int, most: int) -> int:
    """Returns the largest divisor of `count` that is not above `most`; at least 1."""
    return next((size for size in range(min(count, most), 1, -1) if count % size == 0), 1)
