"""Evaluation on Pascal VOC's pictures, against scikit-learn, LiteRT and an average by torch.

Skipped where the pictures are not at hand (tests/conftest.py).
"""

import json
import pathlib
import tarfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from PIL import Image
from sklearn import metrics

import mbv2_jax
from mbv2_jax.data import sources
from mbv2_jax.data.classes import VOC_NAMES
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.runtime import mesh
from mbv2_jax.spec import Preprocessing
from mbv2_jax.tasks.segmentation import scores
from mbv2_jax.tasks.segmentation.settings import Head
from mbv2_jax.tasks.segmentation.task import Segmentation
from mbv2_jax.training.evaluation import Evaluation
from tests.support import commands, peers

# Logits of a pixel, from its colour: whole numbers, of which float32 makes no rounding errors.
WEIGHTS = np.random.default_rng(0).integers(-50, 51, (3, len(VOC_NAMES)))
PIXELS = Preprocessing(513, "fit(size)|pad(size)", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Colours(nn.Module):
    """A network whose classes depend on nothing but a pixel's colour."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        weights = jnp.asarray(WEIGHTS, images.dtype)
        return jnp.einsum("nhwc,cd->nhwd", images, weights, precision="highest")


@pytest.fixture(scope="module")
def devkit(check_data, tmp_path_factory) -> pathlib.Path:
    """The 24 pictures with their masks."""
    folder = tmp_path_factory.mktemp("voc")
    with tarfile.open(check_data / "data" / "voc_seg.tar") as archive:
        archive.extractall(folder, filter="data")
    return folder / "VOC2012"


@pytest.fixture(scope="module")
def theirs(devkit) -> np.ndarray:
    """scikit-learn's confusion matrix of these predictions, over all pixels that count."""
    truth, predicted = [], []
    for name in (devkit / "ImageSets/Segmentation/val.txt").read_text().split():
        mask = np.asarray(Image.open(devkit / "SegmentationClassAug" / f"{name}.png"))
        picture = np.asarray(Image.open(devkit / "JPEGImages" / f"{name}.jpg").convert("RGB"))
        counted = mask != 255
        truth.append(mask[counted])
        predicted.append((picture.astype(int) @ WEIGHTS).argmax(-1)[counted])
    assert len(truth) == 24
    return metrics.confusion_matrix(
        np.concatenate(truth), np.concatenate(predicted), labels=range(len(VOC_NAMES))
    )


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 5), (2, 8), (4, 4)])
def test_evaluation_is_scikit_learns_on_any_devices(devkit, theirs, devices, batch_size):
    source = sources.open_source(f"voc:{devkit.parent}", "val")
    evaluation = Evaluation(
        task=Segmentation(Head(len(VOC_NAMES)), VOC_NAMES),
        network=Colours(),
        preprocessing=PIXELS,
        source=source,
        transform=pipeline.make_transform(PIXELS.eval_transforms, PIXELS.image_size),
        batch_size=batch_size,
        workers=0,
        mesh=mesh.create(jax.devices()[:devices]),
    )
    found = evaluation.score({})
    assert found.details == scores.table(theirs, VOC_NAMES)
    labels = np.repeat(np.indices(theirs.shape).reshape(2, -1), theirs.ravel(), axis=1)
    present = [label for label in range(len(VOC_NAMES)) if (labels == label).any()]
    jaccard = metrics.jaccard_score(*labels, labels=present, average="macro")
    assert found.result["mIoU"] == pytest.approx(100 * jaccard, rel=1e-12)  # float64
    accuracy = metrics.accuracy_score(*labels)
    assert found.result["pixel_accuracy"] == pytest.approx(100 * accuracy, rel=1e-12)
    assert found.result["examples"] == 24


# ---- A trained network, from its file to the figures ----


@pytest.fixture(scope="module")
def tflite(check_data) -> pathlib.Path:
    return check_data / "golden" / "deeplab_tf" / "deeplabv3_257_mv_gpu.tflite"


@pytest.fixture(scope="module")
def converted(tflite, tmp_path_factory) -> pathlib.Path:
    """The model directory to which TensorFlow's DeepLab of width 0.5 and size 257 is converted."""
    folder = tmp_path_factory.mktemp("deeplab") / "model"
    arguments = (str(tflite), f"--output={folder}")
    status, _, err = commands.run(None, *arguments, module="mbv2_jax.convert")
    assert status == 0, err
    return folder


def evaluate(
    cache: pathlib.Path, devkit: pathlib.Path, converted: pathlib.Path, *flags: str, devices: int
) -> dict[str, Any]:
    """Returns the result of --mode=eval."""
    status, out, err = commands.run(
        cache,
        "--config=deeplabv3_mobilenet_v2_voc",
        "--mode=eval",
        f"--checkpoint={converted}",
        f"--config.data.source=voc:{devkit.parent}",
        "--config.data.workers=0",
        *flags,
        devices=devices,
        module=commands.WHOLE,
    )
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def prepared(devkit: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, (N, 257, 257, 3), and masks of a split as an evaluation sees them."""
    source = sources.open_source(f"voc:{devkit.parent}", split)
    transform = pipeline.make_transform(PIXELS.eval_transforms, 257)
    rng = np.random.default_rng(0)
    samples = [transform.from_encoded(source[i], rng) for i in range(len(source))]
    masks = [np.asarray(sample.targets["mask"]) for sample in samples]
    return np.stack([sample.image for sample in samples]), np.stack(masks)


def figures(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Returns scikit-learn's mIoU and accuracy in percent, over the classes that are anywhere."""
    counted = truth != 255
    pair = truth[counted], predicted[counted]
    present = np.union1d(*pair)
    jaccard = metrics.jaccard_score(*pair, labels=present, average="macro")
    return 100 * jaccard, 100 * metrics.accuracy_score(*pair)


def test_a_converted_network_has_the_figures_of_tensorflows_file(cache, devkit, tflite, converted):
    images, truth = prepared(devkit, "val")
    interpreter = Interpreter(str(tflite))
    interpreter.allocate_tensors()
    (read,), (write,) = interpreter.get_input_details(), interpreter.get_output_details()
    predicted = []
    for image in images:
        interpreter.set_tensor(read["index"], (image[None] / 127.5 - 1).astype(np.float32))
        interpreter.invoke()
        predicted.append(interpreter.get_tensor(write["index"])[0].argmax(-1))
    miou, accuracy = figures(truth, np.stack(predicted))
    assert 30 < miou < 60  # that both are right: the file's makers give no figure
    for devices, batch_size in ((1, 5), (4, 8)):
        flag = f"--config.batch_size={batch_size}"
        found = evaluate(cache, devkit, converted, flag, devices=devices)
        # Logits that are equal but for float32's rounding: a pixel in a million may turn.
        assert found["mIoU"] == pytest.approx(miou, abs=0.01)
        assert found["pixel_accuracy"] == pytest.approx(accuracy, abs=0.01)


@pytest.mark.slow
def test_views_are_averaged_as_by_hand(cache, devkit, converted):
    model = mbv2_jax.load(converted)
    images, truth = prepared(devkit, "val[:20%]")
    run = jax.jit(model.module.apply)
    pixels = peers.nchw(model.preprocessing.normalize(images))

    def resize(x: torch.Tensor, side: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(x, (side, side), mode="bilinear", align_corners=True)

    total = torch.zeros(())
    for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        for flips in ((), (3,)):
            view = resize(pixels, int(256 * scale + 1)).flip(flips)
            logits = peers.nchw(np.asarray(run(model.variables, peers.nhwc(view))))
            total = total + torch.softmax(resize(logits.flip(flips), 257).double(), 1)
    miou, accuracy = figures(truth, total.argmax(1).numpy())
    flags = ["--tta", "--config.data.eval_split=val[:20%]", "--config.batch_size=5"]
    found = evaluate(cache, devkit, converted, *flags, devices=1)
    assert found["examples"] == len(images)
    # As above: logits that differ by rounding.
    assert found["mIoU"] == pytest.approx(miou, abs=0.01)
    assert found["pixel_accuracy"] == pytest.approx(accuracy, abs=0.01)
