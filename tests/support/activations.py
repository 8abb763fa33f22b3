"""Random inputs for BatchNorm."""

import numpy as np

SHAPE = (12, 3, 5, 4)  # N, H, W, C


def draw_arrays() -> dict[str, np.ndarray]:
    """Returns random float64 input, output gradient, parameters and running statistics."""
    rng = np.random.default_rng(0)
    return {
        "x": 3 * rng.standard_normal(SHAPE) + rng.standard_normal(SHAPE[-1]),
        "gradient": rng.standard_normal(SHAPE),
        "scale": rng.uniform(0.5, 2, SHAPE[-1]),
        "bias": rng.standard_normal(SHAPE[-1]),
        "mean": rng.standard_normal(SHAPE[-1]),
        "var": rng.uniform(0.5, 2, SHAPE[-1]),
    }
