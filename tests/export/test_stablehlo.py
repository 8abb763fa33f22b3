"""StableHLO files: read by jax alone, for the three tasks."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import zipfile
from typing import Any

import numpy as np
import pytest

import mbv2_jax
from mbv2_jax import inference
from mbv2_jax.errors import UserError
from mbv2_jax.export import program, stablehlo
from mbv2_jax.export.formats import Options
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing
from mbv2_jax.tasks.classification import settings as classification
from mbv2_jax.tasks.classification.task import Classification
from mbv2_jax.tasks.detection import settings as detection
from mbv2_jax.tasks.segmentation import settings as segmentation
from mbv2_jax.tasks.task import Task
from tests.support import short_network, tiny_model

NAMES = ("cat", "dog", "eel")
PIXELS = Preprocessing(33, "resize(size)", tiny_model.MEAN, tiny_model.STD)
SPECS = {
    "classification": dataclasses.replace(tiny_model.SPEC, head=classification.Head(3)),
    "segmentation": ModelSpec(
        "segmentation",
        Backbone(width=0.1, output_stride=16, last_convolution=False),
        segmentation.Head(3, (6,)),
        PIXELS,
    ),
    "detection": ModelSpec(
        "detection",
        Backbone(width=0.1, padding="same"),
        detection.Head(
            3, ("layer7", "last"), extra_channels=(16,), anchor_sizes=(0.2, 0.4, 0.6, 0.8)
        ),
        PIXELS,
    ),
}

# What a person without this package writes.
ALONE = """
import sys
import jax, numpy as np

assert "mbv2_jax" not in sys.modules
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
arrays = jax.jit(exported.call)(np.load(sys.argv[2]))
assert "mbv2_jax" not in sys.modules
np.savez(sys.argv[3], **arrays)
"""


def write(task: str, path: pathlib.Path) -> pathlib.Path:
    spec = SPECS[task]
    from mbv2_jax import tasks

    return tiny_model.write_for(tasks.find(task).for_model(spec.head, NAMES), spec, path)


def images(task: str, count: int) -> np.ndarray:
    size = SPECS[task].preprocessing.image_size
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("task", list(SPECS))
def test_jax_alone_runs_a_file_for_any_number_of_images(task, tmp_path, few_layers):
    saved = inference.open_model(write(task, tmp_path / "model"), seed=0)
    file = tmp_path / "m.stablehlo"
    stablehlo.write(program.Program(saved), file, Options())
    np.save(tmp_path / "images.npy", images(task, 5))
    arguments = [str(tmp_path / name) for name in ("m.stablehlo", "images.npy", "arrays.npz")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    predictor = mbv2_jax.init_model(tmp_path / "model")
    outputs: Any = predictor(images(task, 5))
    with np.load(tmp_path / "arrays.npz") as arrays:
        found = dict(arrays)
    if task == "detection":
        theirs = np.concatenate(outputs.logits, 1)
        theirs = np.exp(theirs - theirs.max(-1, keepdims=True))
        assert found["boxes"].shape == (*found["scores"].shape[:2], 4)
        expected = (theirs / theirs.sum(-1, keepdims=True))[..., :-1]
        np.testing.assert_allclose(found["scores"], expected, rtol=0, atol=1e-4)
        return
    # XLA's convolutions instead of those for CPUs: they round at 6e-8, in a dozen layers.
    np.testing.assert_allclose(found["logits"], np.asarray(outputs), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A classifier's file for two images of floats from 0 to 255, beside the classifier."""
    folder = tmp_path_factory.mktemp("stablehlo")
    with short_network.in_use():
        saved = inference.open_model(write("classification", folder / "model"), seed=0)
        made = program.Program(saved, batch=2, input="float32")
        stablehlo.write(made, folder / "m.stablehlo", Options())
    return folder / "m.stablehlo"


def test_a_file_is_loaded_with_its_metadata(file, few_layers):
    loaded = mbv2_jax.load_exported(file)
    assert loaded.metadata["classes"] == list(NAMES)
    assert loaded.metadata["mean"] == list(tiny_model.MEAN)
    assert loaded.metadata["eval_transforms"] == "resize_edge(36)|center_crop(size)"
    assert loaded.metadata["outputs"] == {"logits": [[3], "float32"]}
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("mbv2_jax.json")) == loaded.metadata
    pixels = images("classification", 2)
    logits = loaded(pixels.astype(np.float32))["logits"]
    expected = mbv2_jax.init_model(file.parent / "model")(pixels)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert loaded.exported.platforms == ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Own(Classification):
    """A task that says nothing about exported files."""

    exported = Task.exported


def test_a_task_without_exports_is_refused(tmp_path, few_layers):
    spec = dataclasses.replace(SPECS["classification"], task=f"{__name__}:Own")
    tiny_model.write_for(Own(spec.head, NAMES), spec, tmp_path / "model")
    saved = inference.open_model(tmp_path / "model", seed=0)
    with pytest.raises(UserError, match=r"model of .*:Own, which is not exported: give that class"):
        program.Program(saved)


@pytest.mark.parametrize("damage", [lambda content: content[:1000], lambda content: b"no file"])
def test_a_damaged_file_is_refused(damage, file, tmp_path):
    damaged = tmp_path / "m.stablehlo"
    damaged.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"m\.stablehlo is no file of .*--to=stablehlo"):
        mbv2_jax.load_exported(damaged)
