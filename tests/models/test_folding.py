"""BatchNorm folded into the convolution before it."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from mbv2_jax.models.folding import fold
from mbv2_jax.models.mobilenet_v2 import MobileNetV2

SMALL: dict[str, Any] = {"num_classes": 7, "width": 0.25}


def images(size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, size, size, 3), np.float32)


def test_folding_keeps_the_digits_of_a_channel_that_is_all_but_dead():
    # Variance 1e-12 beside epsilon 1e-5, as pruned channels have: worked out in float64 by hand.
    params = {
        "conv": {"kernel": np.full((1, 1, 1, 1), 3, np.float32)},
        "norm": {"scale": np.array([1e-4], np.float32), "bias": np.array([0.25], np.float32)},
    }
    stats = {"norm": {"mean": np.array([1e-3], np.float32), "var": np.array([1e-12], np.float32)}}
    folded = fold(params, stats, 1e-5)["conv"]
    # 1e-4 / sqrt(1e-5 + 1e-12) = 0.0316227750, times 3, and 0.25 - 1e-3 times it; rounded once.
    np.testing.assert_allclose(folded["kernel"].ravel(), [0.0948683250], rtol=1e-7)
    np.testing.assert_allclose(folded["bias"], [0.2499683772], rtol=1e-7)


@pytest.mark.parametrize("norm_eval", [False, True])
def test_a_folded_network_refuses_to_train(norm_eval):
    model = MobileNetV2(**SMALL, folded=True, norm_eval=norm_eval)
    variables = jax.eval_shape(model.init, jax.random.key(0), images(32))
    with pytest.raises(ValueError, match="folded network has no statistics to train with"):
        jax.eval_shape(partial(model.apply, train=True), variables, images(32))
