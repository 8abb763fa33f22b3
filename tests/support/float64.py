"""Comparisons of networks with their peers in float64."""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

# Float64 rounds at 1e-16; 52 normalisations, some by the deviation of a few nearly equal values,
# enlarge that. Measured up to 1e-12 of a tensor's largest value, whose order is 1 to 1000; a wrong
# operation gives 1e-3 and more. (The 1.0 is for the gradients of the project norms' biases, which
# are zero but for rounding: the next convolution's norm takes any constant away.)
TOLERANCE = 1e-9


def noise(shape: tuple[int, ...]) -> np.ndarray:
    """Returns what outputs are multiplied with before they are summed up to a loss."""
    return np.random.default_rng(1).standard_normal(shape)


def assert_same(got: Any, expected: Any) -> None:
    """Compares trees; where torch has no gradient (None), ours must be zero everywhere."""
    got, expected = (flatten_dict(tree, sep="/") for tree in (got, expected))
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        ours = np.asarray(got[path])
        if value is None:
            assert not ours.any(), path
            continue
        assert ours.shape == value.shape, path
        assert abs(ours - value).max() <= TOLERANCE * max(1.0, abs(value).max()), path
