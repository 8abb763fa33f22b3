"""A tiny model with statistics like a trained one's, for tests that do not train."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mbv2_jax import model_dir, tasks
from mbv2_jax.model_json import Description
from mbv2_jax.models import mobilenet_v2
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode
from mbv2_jax.tasks.classification.settings import Head
from mbv2_jax.tasks.task import Task
from tests.support import short_network

CLASSES = ("cat", "dog", "eel", "fox", "gnu", "hen")
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 55.0, 50.0)
SIZE = 32

SPEC = ModelSpec(
    task="classification",
    backbone=Backbone(width=0.1),
    head=Head(num_classes=len(CLASSES)),
    preprocessing=Preprocessing(SIZE, "resize_edge(36)|center_crop(size)", MEAN, STD),
    mode=TrainingMode(dropout=0.2),
)
DESCRIPTION = Description(SPEC, CLASSES, {"kind": "made by a test"})


@functools.cache
def _shapes(stages: Any) -> dict[str, Any]:
    """Returns the shapes of the network's variables; its layers are those of `STAGES` in use."""
    del stages
    network = tasks.find(SPEC.task).for_model(SPEC.head, CLASSES).network(SPEC.backbone, SPEC.mode)
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(network.init, jax.eval_shape(jax.random.key, 0), image)


def variables(seed: int = 0) -> dict[str, Any]:
    """Returns {"params", "batch_stats"} as float32 numpy arrays, no two alike."""
    return filled(_shapes(mobilenet_v2.STAGES), seed)


def filled(shapes: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Returns the variables of a network by their shapes, as float32 numpy arrays, no two alike."""
    generator = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "kernel":  # variance-preserving, so that logits differ from each other
            scale = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return (scale * generator.standard_normal(leaf.shape)).astype(np.float32)
        low, high = (0.5, 1.5) if path[-1].key in ("scale", "var") else (-0.5, 0.5)
        return generator.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def write(path: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Writes the tiny model at `path`."""
    arrays = variables(seed)
    model_dir.write(path, arrays["params"], arrays["batch_stats"], DESCRIPTION)
    return path


def write_for(task: Task, spec: ModelSpec, path: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Writes a model of a task at `path`, of the layers in use."""
    shapes = model_dir.shapes_of(task.network(spec.backbone, spec.mode))
    description = Description(spec, task.classes, {"kind": "made by a test"})
    model_dir.write(path, **filled(shapes, seed), description=description)
    return path


def prediction_folder(task: Task, spec: ModelSpec, folder: pathlib.Path) -> pathlib.Path:
    """Writes a model of a task, a classifier and three photos, two of one name, all short."""
    with short_network.in_use():
        write_for(task, spec, folder / "model")
        write(folder / "classifier")
    (folder / "more").mkdir()
    for seed, name in enumerate(("one.jpg", "two.png", "more/one.png")):
        photo(seed).save(folder / name)
    return folder


def photo(seed: int) -> Image.Image:
    """Returns an image that is neither square nor of the network's size."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((70, 50), Image.Resampling.BICUBIC)


def write_images(folder: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """Writes the model, photos of seeds 0, 1, ... by these names, and two broken files."""
    write(folder / "model")
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        photo(seed).save(folder / name)
    (folder / "text.png").write_text("no image")
    (folder / "half.png").write_bytes((folder / names[0]).read_bytes()[:1000])
    return folder
