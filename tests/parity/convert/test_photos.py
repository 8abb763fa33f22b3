"""Converted weights of people's own models give the peer's logits and features on real photos.

The backbone has real ImageNet weights; both sides compute in float32.
"""

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from mbv2_jax import model_dir
from mbv2_jax.convert import importer, writer
from mbv2_jax.inference import Predictor
from tests.support import peers

# Logits are from -3 to 14, and float32 rounds sums through 53 layers: 2e-5 was measured.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def trained(check_data, tmp_path_factory) -> nn.Module:
    """Returns torchvision's network with the weights of mmpretrain's file."""
    file = tmp_path_factory.mktemp("trained") / "torchvision.pth"
    saved = model_dir.read(check_data / "weights" / "mm_mobilenet_v2.pth")
    writer.write(saved, "torchvision", file)
    model = peers.torchvision().models.mobilenet_v2()
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return model.eval()


def with_head(model: nn.Module, *layers: nn.Module) -> nn.Module:
    """Returns a network with the backbone of another and a head of its own."""
    found = peers.torchvision().models.mobilenet_v2()
    found.features = model.features
    found.classifier = nn.Sequential(*layers)
    return found.eval()


def save_whole(model: nn.Module, path: pathlib.Path) -> None:
    torch.save(model, path)


def save_lightning(model: nn.Module, path: pathlib.Path) -> None:
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "pytorch-lightning_version": "2.5.0", "epoch": 9}, path)


def save_state(model: nn.Module, path: pathlib.Path) -> None:
    torch.save(model.state_dict(), path)


MODELS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[..., None]]] = {
    "Lightning": (lambda model: model, save_lightning),
    "whole": (lambda model: model, save_whole),
    "linear": (lambda model: with_head(model, nn.Linear(1280, 9)), save_state),
    "two layers": (
        lambda model: with_head(model, nn.Linear(1280, 64), nn.ReLU(), nn.Linear(64, 9)),
        save_whole,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_photos(name, trained, check_data, tmp_path):
    make, save = MODELS[name]
    torch.manual_seed(0)
    model = make(trained)
    save(model, tmp_path / "net.pth")
    saved = importer.load(tmp_path / "net.pth").saved
    predictor = Predictor(saved)
    photos = sorted((check_data / "data" / "imagenet_val20").glob("*.JPEG"))
    pixels = np.stack([predictor.prepare(photo) for photo in photos])
    normalized = saved.spec.preprocessing.normalize(pixels)
    with torch.no_grad():
        x = peers.nchw(normalized)
        features, logits = model.features(x).mean((2, 3)).numpy(), model(x).numpy()
    assert logits.std() > 0.05
    np.testing.assert_allclose(np.asarray(predictor(pixels)), logits, rtol=0, atol=TOLERANCE)
    ours = predictor.extract_feat(list(photos))
    np.testing.assert_allclose(np.asarray(ours), features, rtol=0, atol=TOLERANCE)
