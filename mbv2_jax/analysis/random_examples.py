"""The random examples of a split that a command examines."""

import numpy as np


def random_examples(total: int, count: int | None, seed: int) -> np.ndarray:
    """Returns the indices of `count` random examples of `total`, or of all, in rising order."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
