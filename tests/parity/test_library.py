"""Feature maps of `load` beside timm's, and a saved model in torchvision, with the same weights."""

import pathlib
import sys

import jax
import numpy as np
import pytest
import torch

import mbv2_jax
from mbv2_jax import command_line
from mbv2_jax.convert import __main__ as convert
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.spec import Preprocessing
from tests.support import peers

OURS = (0, 1, 2, 4, 6)  # the last map of each size, which timm returns
CLASSES = ("cat", "dog", "eel", "fox", "gnu")


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    model = peers.timm().create_model("mobilenetv2_050", num_classes=len(CLASSES))
    peers.randomize(model, seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory) -> pathlib.Path:
    """The network, saved as a person would who has its arrays."""
    path = tmp_path_factory.mktemp("library") / "model"
    variables = {"params": peers.parameters(network), "batch_stats": peers.statistics(network)}
    module = MobileNetV2(num_classes=len(CLASSES), width=0.5)
    mbv2_jax.save(path, module, variables, CLASSES, preprocessing=Preprocessing(image_size=64))
    return path


@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_feature_maps_and_their_sizes_are_timms(network, checkpoint, output_stride):
    peer = peers.timm().create_model(
        "mobilenetv2_050", features_only=True, output_stride=output_stride
    )
    peer.load_state_dict(network.state_dict(), strict=False)
    ours = mbv2_jax.load(
        checkpoint, features_only=True, out_indices=OURS, output_stride=output_stride
    )
    assert ours.module.channels == tuple(peer.feature_info.channels())
    assert ours.module.reductions == tuple(peer.feature_info.reduction())

    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    maps = jax.jit(ours.module.apply)(ours.variables, images)
    with torch.no_grad():
        expected = peer.eval()(peers.nchw(images))
    for found, theirs in zip(maps, map(peers.nhwc, expected), strict=True):
        assert found.shape == theirs.shape
        # Float32 through up to 50 layers, each of which adds a rounding of 6e-8 of its sums.
        np.testing.assert_allclose(found, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_a_saved_model_is_written_for_torchvision(network, checkpoint, tmp_path, monkeypatch):
    file = tmp_path / "model.pth"
    arguments = [str(checkpoint), "--to=torchvision", f"--output={file}"]
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(convert.main)
    assert stopped.value.code == 0
    peer = peers.torchvision().models.mobilenet_v2(width_mult=0.5, num_classes=len(CLASSES))
    peer.load_state_dict(torch.load(file, weights_only=True), strict=True)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 64, 64)))
    with torch.no_grad():
        found, expected = (model.double().eval()(images) for model in (peer, network))
    network.float()
    # Two torch networks with the same numbers, in float64, may sum them in another order.
    assert abs(found - expected).max() < 1e-12
