"""Class activation maps against pytorch-grad-cam, for the same weights and photos."""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from mbv2_jax.analysis import cam
from mbv2_jax.convert import importer
from mbv2_jax.model_dir import SavedModel
from tests.support import peers, tiny_model

# Both sides compute in float32 and scale their maps to 0..1; another resizing or another layer
# differs by tenths.
TOLERANCE = 1e-3
SIZE = 96  # the smallest map, of the last layer, is 3 x 3


@pytest.fixture(scope="module")
def grad_cam():
    """The peer; torchvision, which it imports, needs the same care as elsewhere."""
    peers.torchvision()
    import pytorch_grad_cam

    return pytorch_grad_cam


def random_model(network: torch.nn.Module) -> SavedModel:
    """Returns a model of the random weights that torchvision's network of width 0.35 is given."""
    peers.randomize(network, seed=0)
    network.eval()
    spec = dataclasses.replace(
        tiny_model.SPEC,
        backbone=dataclasses.replace(tiny_model.SPEC.backbone, width=0.35),
        preprocessing=dataclasses.replace(
            tiny_model.SPEC.preprocessing,
            image_size=SIZE,
            eval_transforms="resize(size)",
        ),
    )
    description = dataclasses.replace(tiny_model.DESCRIPTION, spec=spec)
    params, stats = peers.parameters(network), peers.statistics(network)
    return SavedModel(params, stats, description, pathlib.Path("random"))


@pytest.fixture
def short(few_layers) -> tuple[torch.nn.Module, SavedModel]:
    """Both networks with two blocks, layer1_0 and layer7_0."""
    network = peers.short_torchvision(num_classes=6, width=0.35)
    return network, random_model(network)


def normalized(saved: SavedModel, crops: np.ndarray) -> torch.Tensor:
    """Returns crops (N, H, W, 3) as torch's network takes them."""
    preprocessing = saved.spec.preprocessing
    mean, std = (np.asarray(value, np.float32) for value in (preprocessing.mean, preprocessing.std))
    return peers.nchw((crops.astype(np.float32) - mean) / std)


def theirs(
    method: Any, network: torch.nn.Module, layer: Any, images: torch.Tensor, label: int | None
) -> np.ndarray:
    """Returns the peer's maps (N, H, W)."""
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = None if label is None else [ClassifierOutputTarget(label)] * len(images)
    with method(model=network, target_layers=[layer]) as explain:
        return explain(input_tensor=images, targets=targets)


def compare(
    method: Any,
    network: torch.nn.Module,
    layer: Any,
    explainer: cam.Explainer,
    saved: SavedModel,
    photos: list[Any],
    label: int | None,
) -> None:
    """Compares the maps, classes and probabilities of photos with the peer's."""
    crops = np.stack([explainer.prepare(photo) for photo in photos])
    images = normalized(saved, crops)
    found = explainer(crops, label)
    expected = theirs(method, network, layer, images, label)
    np.testing.assert_allclose(found.heat, expected, rtol=0, atol=TOLERANCE)
    assert expected.max() > 0.99  # maps of zeros would prove nothing
    with torch.no_grad():
        logits = network(images)
    labels = np.full(len(photos), label) if label is not None else logits.argmax(1).numpy()
    np.testing.assert_array_equal(found.labels, labels)
    scores = logits.softmax(1).numpy()[np.arange(len(photos)), labels]
    np.testing.assert_allclose(found.scores, scores, rtol=1e-3)  # of logits 1e-4 apart


@pytest.mark.parametrize(
    ("layer", "module", "label"),
    [
        ("last", lambda features: features[3], None),
        ("layer7", lambda features: features[2], 4),
        ("layer7_0/expand", lambda features: features[2].conv[0], None),
        ("stem", lambda features: features[0], 2),
    ],
)
def test_grad_cam_of_random_weights(grad_cam, short, layer, module, label):
    network, saved = short
    explainer = cam.Explainer(saved, layer)
    photos = [tiny_model.photo(seed) for seed in range(5)]
    layer_of_theirs = module(network.features)
    compare(grad_cam.GradCAM, network, layer_of_theirs, explainer, saved, photos, label)


def test_grad_cam_of_the_whole_network(grad_cam):
    network = peers.torchvision().models.MobileNetV2(num_classes=6, width_mult=0.35)
    saved = random_model(network)
    # Of the last layer: behind earlier ones a ReLU6 whose input is 0 but for rounding may or may
    # not pass its gradient. Of layer5, the peer's own maps in float32 and float64 differ by 0.011.
    explainer = cam.Explainer(saved, "last")
    photos = [tiny_model.photo(seed) for seed in range(5)]
    compare(grad_cam.GradCAM, network, network.features[18], explainer, saved, photos, None)


def test_score_cam_of_random_weights(grad_cam, short, monkeypatch):
    # The peer upsamples masks with aligned corners; the authors' code and ours do not.
    upsample = functools.partial(torch.nn.Upsample, mode="bilinear", align_corners=False)
    monkeypatch.setattr(torch.nn, "UpsamplingBilinear2d", upsample)
    network, saved = short
    explainer = cam.Explainer(saved, "layer1", "score")  # of 8 channels: each is a pass
    photos = [tiny_model.photo(seed) for seed in range(2)]
    compare(grad_cam.ScoreCAM, network, network.features[1], explainer, saved, photos, 2)


@pytest.mark.parametrize(("layer", "number"), [("last", 18), ("layer5", 13)])
def test_grad_cam_of_real_weights_on_five_photos(grad_cam, check_data, layer, number):
    saved = importer.load(str(check_data / "weights" / "mm_mobilenet_v2.pth")).saved
    network = peers.torchvision().models.mobilenet_v2()
    peers.assign(network, saved.variables())
    network.eval()
    explainer = cam.Explainer(saved, layer)
    photos: list[Any] = sorted((check_data / "data" / "imagenet_val20").glob("*.JPEG"))[:5]
    module = network.features[number]
    compare(grad_cam.GradCAM, network, module, explainer, saved, photos, None)
