"""Dilated networks against transformers' MobileNetV2, in float64 on the CPU."""

import jax
import numpy as np
import pytest

from mbv2_jax import spec
from mbv2_jax.models.mobilenet_v2 import Backbone, blocks
from tests.support import peers
from tests.support.float64 import assert_same, noise

WIDTH = 0.35


@pytest.mark.parametrize(
    ("output_stride", "padding", "size"),
    [(8, "same", 49), (8, "torch", 48), (16, "same", 64), (16, "torch", 65)],
)
def test_a_training_step_is_transformers(output_stride, padding, size):
    transformers = peers.transformers()
    config = transformers.MobileNetV2Config(
        depth_multiplier=WIDTH, output_stride=output_stride, tf_padding=padding == "same"
    )
    peer = transformers.MobileNetV2Model(config)
    peers.randomize(peer, seed=3)
    peer.double().train()
    images = np.random.default_rng(0).standard_normal((2, size, size, 3))
    architecture = spec.Backbone(
        width=WIDTH, padding=padding, bn_epsilon=config.layer_norm_eps, output_stride=output_stride
    )
    with jax.enable_x64(True):
        variables = {"params": peers.parameters(peer), "batch_stats": peers.statistics(peer)}
        names = [block.name for block in blocks(architecture)]
        backbone = Backbone(architecture, spec.TrainingMode(dtype="float64"), (*names, "last"))

        def loss(params, x):
            features, _ = backbone.apply(
                variables | {"params": params}, x, train=True, mutable=["batch_stats"]
            )
            return (features["last"] * noise(features["last"].shape)).sum(), features

        (dparams, dx), features = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
            variables["params"], images
        )

    x = peers.nchw(images).requires_grad_()
    outputs = peer(x, output_hidden_states=True)
    last = outputs.last_hidden_state
    n, c, h, w = last.shape
    (last * peers.nchw(noise((n, h, w, c)))).sum().backward()
    assert x.grad is not None
    maps = dict(zip(names[1:], outputs.hidden_states, strict=True)) | {"last": last}
    ours = {"features": {name: features[name] for name in maps}, "params": dparams, "images": dx}
    theirs = {"features": {name: peers.nhwc(value) for name, value in maps.items()}}
    assert_same(ours, theirs | {"params": peers.gradients(peer), "images": peers.nhwc(x.grad)})
    # That the case is dilated: the plain network would have a map of size / 32.
    assert h == -(-size // output_stride)
