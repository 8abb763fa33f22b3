"""The deeper variants have the blocks and the parameters of timm's networks."""

import dataclasses

import numpy as np
import pytest
import torch

from mbv2_jax.models.mobilenet_v2 import MobileNetV2, blocks, feature_info
from mbv2_jax.models.profile import profile
from mbv2_jax.models.variants import VARIANTS
from tests.support import peers


@pytest.fixture(scope="module", params=["110d", "120d"])
def networks(request):
    """A variant's backbone, and timm's network."""
    variant = VARIANTS[f"mobilenet_v2_{request.param}"]
    return variant, peers.timm().create_model(f"mobilenetv2_{request.param}")


def test_blocks_are_timms(networks):
    variant, peer = networks
    ours = [
        (block.stage, block.inner, block.channels, block.stride)
        for block in blocks(variant.backbone)
    ]
    theirs = [
        (
            number,
            block.conv_dw.in_channels,
            (block.conv_pw if number == 1 else block.conv_pwl).out_channels,
            block.conv_dw.stride[0],
        )
        for number, stage in enumerate(peer.blocks, start=1)
        for block in stage
    ]
    assert ours == theirs
    info = feature_info(variant.backbone)
    assert info["stem"].channels == peer.conv_stem.out_channels
    assert info["last"].channels == peer.conv_head.out_channels


def test_parameters_and_multiply_adds_are_timms(networks):
    variant, peer = networks
    measured = profile(MobileNetV2(**dataclasses.asdict(variant.backbone)), 224)
    assert measured.params == sum(parameter.numel() for parameter in peer.parameters())
    count = 0

    def add(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal count
        count += layer.weight.numel() * int(np.prod(output.shape[2:]))

    for layer in peer.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(add)
    with torch.no_grad():
        peer.eval()(torch.zeros(1, 3, 224, 224))
    assert measured.multiply_adds == count


def test_preprocessing_is_timms(networks):
    variant, peer = networks
    given = peer.default_cfg
    assert (given["interpolation"], given["crop_pct"], given["input_size"]) == (
        "bicubic",
        0.875,
        (3, 224, 224),
    )
    for ours, name in ((variant.preprocessing.mean, "mean"), (variant.preprocessing.std, "std")):
        np.testing.assert_allclose(ours, [255 * value for value in given[name]], rtol=1e-6)
