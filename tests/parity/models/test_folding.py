"""Folding batch normalisation changes no logit: against torchvision, and against ourselves."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from mbv2_jax.models.folding import fold
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from tests.support import peers

EPSILON = 1e-3  # large, so that forgetting it shows
SMALL: dict[str, Any] = {"num_classes": 7, "width": 0.25}


def images(size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, size, size, 3), np.float32)


@pytest.fixture(scope="module")
def peer() -> torch.nn.Module:
    network = peers.torchvision().models.MobileNetV2(
        num_classes=7, width_mult=0.25, norm_layer=partial(torch.nn.BatchNorm2d, eps=EPSILON)
    )
    peers.randomize(network, seed=0)
    return network.eval()


def test_folded_logits_are_torchvisions_and_the_unfolded_networks(peer):
    params, stats = peers.parameters(peer), peers.statistics(peer)
    x = images(64)
    with torch.no_grad():
        theirs = peer(peers.nchw(x)).numpy()
    plain = MobileNetV2(**SMALL, bn_epsilon=EPSILON)
    unfolded = jax.jit(plain.apply)({"params": params, "batch_stats": stats}, x)
    variables = {"params": fold(params, stats, EPSILON)}
    folded = jax.jit(MobileNetV2(**SMALL, folded=True).apply)(variables, x)
    # Rounding of float32, amplified by 52 layers. Of the largest logit, 60: folded, unfolded and
    # torch are 3.7e-6, 2.6e-6 and 3.9e-6 from torch's float64; folded and unfolded 4.9e-6 apart.
    tolerance = 2e-5 * abs(theirs).max()
    np.testing.assert_allclose(folded, theirs, rtol=0, atol=tolerance)
    np.testing.assert_allclose(folded, unfolded, rtol=0, atol=tolerance)
    assert np.ptp(theirs) > 1


def test_folding_is_exact_but_for_rounding(peer):
    # In float64 nothing hides behind the rounding. TensorFlow's padding, since the test above has
    # torch's; 50 has odd sides further down (25, 13), where the two differ.
    fields = {**SMALL, "num_classes": None, "out_indices": (0, 3, 7), "padding": "same"}
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, peers.parameters(peer))
        stats = jax.tree.map(np.float64, peers.statistics(peer))
        x = images(50).astype(np.float64)
        plain = MobileNetV2(**fields, bn_epsilon=EPSILON, dtype=jnp.float64)
        unfolded = jax.jit(plain.apply)({"params": params, "batch_stats": stats}, x)
        variables = {"params": fold(params, stats, EPSILON)}
        folded = jax.jit(plain.clone(folded=True).apply)(variables, x)
        for ours, expected in zip(folded, map(np.asarray, unfolded), strict=True):
            assert ours.dtype == np.float64
            # Measured up to 9.5e-14 of the largest value.
            atol = 1e-11 * abs(expected).max()
            np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=atol)


def test_folded_parameters_are_those_the_folded_network_has(peer):
    folded = fold(peers.parameters(peer), peers.statistics(peer), EPSILON)
    wanted = jax.eval_shape(MobileNetV2(**SMALL, folded=True).init, jax.random.key(0), images(64))
    assert list(wanted) == ["params"]  # and no batch_stats
    names = flatten_dict(wanted["params"], sep="/")
    assert {name: leaf.shape for name, leaf in names.items()} == {
        name: leaf.shape for name, leaf in flatten_dict(folded, sep="/").items()
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {np.dtype(np.float32)}
    # The kernels and biases of 52 convolutions and of the classifier.
    assert len(names) == 2 * 53
