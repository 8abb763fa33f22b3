"""Evaluation on Pascal VOC's pictures at their own sizes, against scikit-learn.

Skipped where the pictures are not at hand (tests/conftest.py).
"""

import pathlib
import tarfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from mbv2_jax.data import sources
from mbv2_jax.data.sources.voc import CLASS_NAMES
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.runtime import mesh
from mbv2_jax.spec import Preprocessing
from mbv2_jax.tasks.segmentation import scores
from mbv2_jax.tasks.segmentation.settings import Head
from mbv2_jax.tasks.segmentation.task import Segmentation
from mbv2_jax.training.evaluation import Evaluation

# Logits of a pixel, from its colour: whole numbers, of which float32 makes no rounding errors.
WEIGHTS = np.random.default_rng(0).integers(-50, 51, (3, len(CLASS_NAMES)))
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
        np.concatenate(truth), np.concatenate(predicted), labels=range(len(CLASS_NAMES))
    )


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 5), (2, 8), (4, 4)])
def test_evaluation_is_scikit_learns_on_any_devices(devkit, theirs, devices, batch_size):
    source = sources.open_source(f"voc:{devkit.parent}", "val")
    evaluation = Evaluation(
        task=Segmentation(Head(len(CLASS_NAMES)), CLASS_NAMES),
        network=Colours(),
        preprocessing=PIXELS,
        source=source,
        transform=pipeline.make_transform(PIXELS.eval_transforms, PIXELS.image_size),
        batch_size=batch_size,
        workers=0,
        mesh=mesh.create(jax.devices()[:devices]),
    )
    found = evaluation.score({})
    assert found.details == scores.table(theirs, CLASS_NAMES)
    labels = np.repeat(np.indices(theirs.shape).reshape(2, -1), theirs.ravel(), axis=1)
    present = [label for label in range(len(CLASS_NAMES)) if (labels == label).any()]
    jaccard = metrics.jaccard_score(*labels, labels=present, average="macro")
    assert found.result["mIoU"] == pytest.approx(100 * jaccard, rel=1e-12)  # float64
    accuracy = metrics.accuracy_score(*labels)
    assert found.result["pixel_accuracy"] == pytest.approx(100 * accuracy, rel=1e-12)
    assert found.result["examples"] == 24
