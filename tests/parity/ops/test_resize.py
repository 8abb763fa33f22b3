"""Bilinear resizing against torch's, with both conventions for the corners."""

import jax
import numpy as np
import pytest
import torch

from mbv2_jax.ops.resize import resize_bilinear
from tests.support import peers


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((33, 33), (513, 513)),  # the network's logits
        ((513, 513), (257, 385)),  # a view of --tta that is smaller
        ((5, 9), (12, 9)),  # one axis stays
        ((1, 7), (4, 1)),  # a single row, and a single column
        ((6, 5), (1, 11)),
    ],
)
def test_values_and_gradients_are_torchs(old, new, align_corners):
    x = np.random.default_rng(0).standard_normal((2, *old, 3))
    pull = np.random.default_rng(1).standard_normal((2, *new, 3))
    with jax.enable_x64(True):

        def resized(x):
            return resize_bilinear(x, new, align_corners=align_corners)

        ours, back = jax.vjp(resized, x)
        (gradient,) = back(pull)
    tensor = peers.nchw(x).requires_grad_()
    theirs = torch.nn.functional.interpolate(
        tensor, new, mode="bilinear", align_corners=align_corners
    )
    theirs.backward(peers.nchw(pull))
    assert tensor.grad is not None
    # The same four products of float64 numbers of size 1 to 4, up to 1e-15 each. A pixel's gradient
    # is a sum over up to 1,000 pixels.
    np.testing.assert_allclose(np.asarray(ours), peers.nhwc(theirs), rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.asarray(gradient), peers.nhwc(tensor.grad), rtol=0, atol=1e-11)
