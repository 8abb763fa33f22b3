"""Real weights on real photos, from the file to the figures, against mmpretrain's results.

Skipped where the weights and photos are not at hand (tests/conftest.py).
"""

import hashlib
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import mbv2_jax
from mbv2_jax.data.classes import IMAGENET_WNIDS
from mbv2_jax.inference import Predictor
from tests.support import REPOSITORY, commands, peers

# Logits are from -3 to 14. Both sides compute in float32 through 53 layers and order their sums
# differently: 1.8e-5 was measured with BatchNorm folded and 1.5e-5 without, and other machines may
# differ by more. Another crop, normalisation or epsilon moves logits by far more than a thousandth.
LOGIT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def weights(check_data) -> pathlib.Path:
    return check_data / "weights" / "mm_mobilenet_v2.pth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The folder of the converted model and of the files that these tests write."""
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def converted(weights, folder) -> pathlib.Path:
    """The model directory to which mmpretrain's file is converted."""
    process = subprocess.run(
        [sys.executable, "-m", "convert", str(weights), f"--output={folder / 'mm'}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return folder / "mm"


@pytest.fixture(scope="module")
def predictor(converted) -> Predictor:
    return mbv2_jax.init_model(converted)


@pytest.fixture(scope="module")
def golden(check_data) -> dict[str, np.ndarray]:
    """mmpretrain's "filename", "label", "crop_sha256" and "logits" of 500 photos."""
    return dict(np.load(check_data / "golden" / "mmpretrain_eval.npz"))


def evaluate(model: pathlib.Path, images: pathlib.Path) -> tuple[dict, list[dict[str, Any]]]:
    """Evaluates with the page's config; returns the result and the lines of --out."""
    predictions = model.with_name(f"{images.name}.jsonl")
    status, out, err = commands.run(
        model.with_name("compiled"),
        "--config=mobilenet_v2_8xb32_in1k",
        "--mode=eval",
        f"--checkpoint={model}",
        f"--config.data.source=folder:{images}",
        "--config.data.eval_split=all",
        "--config.data.workers=0",
        "--config.batch_size=20",
        f"--out={predictions}",
        module=commands.WHOLE,
    )
    assert status == 0, err
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    return json.loads(out.splitlines()[-1]), lines


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the cross entropy of (N, classes) logits, computed in float64."""
    logits = logits.astype(np.float64)
    right = logits[np.arange(len(labels)), labels]
    return np.log(np.exp(logits).sum(1)) - right


def test_evaluation_of_converted_weights_is_mmpretrains(check_data, converted, golden):
    result, lines = evaluate(converted, check_data / "data" / "imagenet_sample")
    assert (result["top1"], result["top5"], result["examples"]) == (77.2, 93.6, 500)
    ours = {pathlib.Path(line["image"]).name: line for line in lines}
    assert len(ours) == len(lines) == len(golden["filename"]) == 500
    lines = [ours[name] for name in golden["filename"]]
    assert [line["label"] for line in lines] == golden["label"].tolist()
    best = [line["predictions"][0]["label"] for line in lines]
    assert best == golden["logits"].argmax(1).tolist()
    expected = losses(golden["logits"], golden["label"])
    # A loss moves by at most twice what the logits do.
    found = [line["loss"] for line in lines]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 * LOGIT_TOLERANCE)
    assert result["loss"] == pytest.approx(expected.mean(), abs=LOGIT_TOLERANCE)


def test_crops_and_logits_are_mmpretrains(check_data, predictor, golden):
    photos = check_data / "data" / "imagenet_sample"
    files = {path.name: path for path in photos.rglob("*.JPEG")}
    crops = np.stack([predictor.prepare(files[name]) for name in golden["filename"]])
    hashes = [hashlib.sha256(crop.tobytes()).hexdigest() for crop in crops]
    assert hashes == golden["crop_sha256"].tolist()
    logits = np.concatenate([predictor(batch) for batch in np.split(crops, 20)])
    assert logits.shape == golden["logits"].shape == (500, 1000)
    largest = float(np.abs(logits - golden["logits"]).max())
    print(f"largest difference of the {logits.size:,} logits: {largest:.1e}")
    assert largest <= LOGIT_TOLERANCE


@pytest.fixture(scope="module")
def mmpretrain_logits(check_data, weights) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """mmpretrain's crops (20, 224, 224, 3) and logits (20, 1000) of 20 photos, and their names.

    Its model and test pipeline are built from its page's config; mmengine loads the weights.
    """
    package = peers.mmpretrain()
    import torch
    from mmengine.config import Config
    from mmengine.dataset import Compose, pseudo_collate
    from mmengine.runner import load_checkpoint
    from mmpretrain.registry import MODELS

    configs = pathlib.Path(package.__path__[0]) / ".mim" / "configs" / "mobilenet_v2"
    config = Config.fromfile(configs / "mobilenet-v2_8xb32_in1k.py")
    model = MODELS.build(config.model | {"data_preprocessor": config.data_preprocessor})
    load_checkpoint(model, str(weights), map_location="cpu", strict=True)
    model.eval()
    pipeline = Compose(config.test_dataloader.dataset.pipeline)
    photos = sorted((check_data / "data" / "imagenet_val20").glob("*.JPEG"))
    samples = [pipeline({"img_path": str(photo)}) for photo in photos]
    with torch.no_grad():
        batch = model.data_preprocessor(pseudo_collate(samples))
        logits = model(batch["inputs"], mode="tensor").numpy()
    crops = np.stack([peers.nhwc(sample["inputs"][None])[0] for sample in samples])
    return crops[..., ::-1], logits, [photo.name for photo in photos]  # OpenCV's order is BGR


def test_20_validation_photos_are_live_mmpretrains(
    check_data, folder, converted, predictor, mmpretrain_logits
):
    crops, logits, names = mmpretrain_logits
    photos = check_data / "data" / "imagenet_val20"
    ours = np.stack([predictor.prepare(photos / name) for name in names])
    np.testing.assert_array_equal(ours, crops)
    np.testing.assert_allclose(predictor(ours), logits, rtol=0, atol=LOGIT_TOLERANCE)

    listed = (line.split() for line in (photos / "labels.txt").read_text().splitlines())
    label = {name: int(number) for name, number in listed}
    for name in names:
        wordnet_id = IMAGENET_WNIDS[label[name]]
        (folder / "val20" / wordnet_id).mkdir(parents=True)
        (folder / "val20" / wordnet_id / name).symlink_to(photos / name)
    result, lines = evaluate(converted, folder / "val20")
    labels = np.array([label[name] for name in names])
    best = np.argsort(-logits, axis=1)[:, :5]
    right = best == labels[:, None]
    assert result["examples"] == len(lines) == len(names) == 20
    assert result["top1"] == 100 * right[:, 0].sum() / 20
    assert result["top5"] == 100 * right.sum() / 20
    found = {pathlib.Path(line["image"]).name: line for line in lines}
    for name, ranked in zip(names, best.tolist(), strict=True):
        assert found[name]["label"] == label[name]
        assert found[name]["predictions"][0]["label"] == ranked[0]
