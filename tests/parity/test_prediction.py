"""From the file to the class, against torchvision and mmpretrain; features against mmpretrain's."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mbv2_jax
from mbv2_jax import model_dir
from mbv2_jax.inference import Predictor
from tests.support import REPOSITORY, commands, peers, tiny_model


def test_prediction_of_a_file_is_torchvisions(tmp_path):
    torchvision = peers.torchvision()
    network = torchvision.models.mobilenet_v2(num_classes=6, width_mult=0.1).eval()
    peers.randomize(network, seed=0)
    model_dir.write(
        tmp_path / "model",
        peers.parameters(network),
        peers.statistics(network),
        tiny_model.DESCRIPTION,
    )
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((70, 51), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")

    transforms = torchvision.transforms
    prepare = transforms.Compose(
        [
            transforms.Resize(36),
            transforms.CenterCrop(32),
            transforms.ToTensor(),  # pixels / 255
            transforms.Normalize(np.divide(tiny_model.MEAN, 255), np.divide(tiny_model.STD, 255)),
        ]
    )
    with torch.no_grad():
        logits = network(prepare(Image.open(tmp_path / "photo.png"))[None])[0]
    theirs = torch.softmax(logits, 0).numpy()
    assert theirs.max() < 0.999  # otherwise softmax would hide differences

    predictor = mbv2_jax.init_model(tmp_path / "model")
    ours = mbv2_jax.inference_model(predictor, tmp_path / "photo.png")
    # float32 through 52 layers, whose sums are ordered differently; logits are of order ten.
    np.testing.assert_allclose(ours["pred_scores"], theirs, rtol=0, atol=1e-4)
    assert ours["pred_label"] == theirs.argmax()
    assert ours["pred_class"] == tiny_model.CLASSES[theirs.argmax()]


WIDTH, SIZE = 0.25, 64


@pytest.fixture(scope="module")
def mmpretrains() -> torch.nn.Module:
    network = peers.mmpretrain().models.ImageClassifier(
        backbone={"type": "MobileNetV2", "widen_factor": WIDTH},
        neck={"type": "GlobalAveragePooling"},
        head={"type": "LinearClsHead", "num_classes": 6, "in_channels": 1280},
    )
    peers.randomize(network, seed=0)
    return network.eval()


@pytest.fixture(scope="module")
def predictor(mmpretrains, tmp_path_factory) -> Predictor:
    spec = tiny_model.SPEC.replace({"model.width": WIDTH})
    folder = tmp_path_factory.mktemp("models") / "model"
    model_dir.write(
        folder,
        peers.parameters(mmpretrains),
        peers.statistics(mmpretrains),
        dataclasses.replace(tiny_model.DESCRIPTION, spec=spec),
    )
    return mbv2_jax.init_model(folder)


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, SIZE, SIZE, 3), np.float32)


def assert_same(ours: Any, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    # float32 through up to 52 layers with other orders of sums. Measured, relative to the largest
    # value: up to 6e-6 in layer1..layer7 and 2.6e-5 in the last map, which ReLU6 cuts at 6. There
    # torch's float32 is 2.6e-5 from its float64.
    assert abs(np.asarray(ours) - theirs).max() <= 1e-4 * abs(theirs).max()


@pytest.mark.parametrize("out_indices", [(7,), (0, 3), (1, 2, 4, 5, 6)])
def test_feature_maps_are_mmpretrains(predictor, mmpretrains, out_indices):
    mmpretrains.backbone.out_indices = out_indices
    with torch.no_grad():
        theirs = mmpretrains.extract_feat(peers.nchw(images()), stage="backbone")
    ours = predictor.extract_feat(images(), stage="backbone", out_indices=out_indices)
    assert len(ours) == len(theirs) == len(out_indices)
    for got, expected in zip(ours, theirs, strict=True):
        assert_same(got, peers.nhwc(expected))


def test_pooled_features_are_mmpretrains(predictor, mmpretrains):
    mmpretrains.backbone.out_indices = (7,)
    with torch.no_grad():
        (theirs,) = mmpretrains.extract_feat(peers.nchw(images()), stage="neck")
    assert_same(predictor.extract_feat(images()), theirs.numpy())


def test_photos_are_named_as_mmpretrain_names_them(check_data, tmp_path):
    """Compares our command with its own inferencer, with the real weights, on 20 photos."""
    peers.mmpretrain()
    from mmpretrain.apis import ImageClassificationInferencer

    weights, folder = check_data / "weights/mm_mobilenet_v2.pth", check_data / "data/imagenet_val20"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mbv2_jax.predict", str(folder), "--json", "--topk=1000"),
            f"--checkpoint={weights}",
        ],
        env=commands.environment(tmp_path),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ours = [json.loads(line) for line in done.stdout.splitlines()]
    files = sorted(folder.glob("*.JPEG"))
    assert [line["image"] for line in ours] == list(map(str, files))

    inferencer = ImageClassificationInferencer(
        "mobilenet-v2_8xb32_in1k", pretrained=str(weights), device="cpu"
    )
    theirs = inferencer(list(map(str, files)), batch_size=20)
    for mine, peer in zip(ours, theirs, strict=True):
        best = mine["predictions"][0]
        assert best["label"] == peer["pred_label"]
        assert best["class"] == peer["pred_class"]
        scores = np.zeros(1000)
        for entry in mine["predictions"]:
            scores[entry["label"]] = entry["score"]
        # float32 networks in two frameworks; measured up to 1.0e-6.
        np.testing.assert_allclose(scores, peer["pred_scores"], rtol=0, atol=1e-5)
