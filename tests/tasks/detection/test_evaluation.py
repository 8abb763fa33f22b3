"""Evaluation of detection on several devices and processes, and with other batches."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax import model_dir
from mbv2_jax.model_json import Description
from mbv2_jax.models.ssdlite import Outputs
from mbv2_jax.runtime import mesh
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing
from mbv2_jax.tasks.detection import coco
from mbv2_jax.tasks.detection.settings import Head
from mbv2_jax.tasks.detection.task import Detection
from mbv2_jax.training.evaluation import Evaluation, Score, in_order
from tests.support import boxed, groups, pycoco, short_network, tiny_model

CATEGORIES = {1: "cat", 5: "dog"}
NAMES = tuple(CATEGORIES.values())
SIDE = 160  # pixels of the pictures
CELLS = 8  # of a side of the image that the network sees
TWENTIETHS = Preprocessing(CELLS, "resize(size)", (128.0,) * 3, (20.0,) * 3)


class Cells(nn.Module):
    """A network that detects something in each pixel of its image: classes and codes by colour."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> Outputs:
        count, pixels = len(images), images.reshape(len(images), -1, 3)
        centres = jnp.stack(jnp.meshgrid(*[jnp.arange(CELLS) + 0.5] * 2), -1).reshape(1, -1, 2)
        half = jnp.resize(jnp.array([0.5, 1.0, 2.5]), (CELLS**2, 1))  # of anchors, in pixels
        anchors = jnp.concatenate([centres - half, centres + half], -1)
        return Outputs(
            (pixels,),
            (jnp.concatenate([pixels, pixels[..., :1]], -1) / 2,),
            (jnp.tile(anchors, (count, 1, 1)),),
            jnp.full((count, 2), CELLS, images.dtype),
        )


def write_pictures(root: pathlib.Path, annotations: Sequence[dict] = ()) -> pathlib.Path:
    """Writes pictures of noise with these objects; returns the annotation file."""
    images = {number: f"{number}.png" for number in (17, 11, 12, 19, 10, 13, 18, 14, 16, 15, 20)}
    file = root / "annotations" / "instances_val.json"
    boxed.write_coco(file, root / "val", images, annotations, CATEGORIES, (SIDE, SIDE))
    return file


def write_found(root: pathlib.Path, results: Sequence[dict]) -> pathlib.Path:
    """Writes pictures whose objects are near some of a network's detections, a few of them crowds.

    So a network that has learned nothing gets figures that are neither 0 nor 100.
    """
    rng = np.random.default_rng(0)
    annotations: list[dict] = []
    for image in range(10, 20):  # of the last picture none
        found = [each for each in results if each["image_id"] == image]
        for each in found[:14:2]:
            box = np.array(each["bbox"]) * rng.uniform(0.9, 1.1, 4)
            crowd = int(len(annotations) % 6 == 0)
            # Objects of each of COCO's sizes: an object's area is not its box's.
            area = (500, 5000, 20000)[len(annotations) % 3]
            number, category = len(annotations) + 1, each["category_id"]
            annotations.append(
                boxed.annotation(number, image, category, *box, iscrowd=crowd, area=area)
            )
    return write_pictures(root, annotations)


class Evaluated(NamedTuple):
    """A score, and the file of --out that belongs to it."""

    score: Score
    results: str


def evaluate(
    root: pathlib.Path,
    devices: int,
    batch_size: int,
    network: nn.Module,
    spec: ModelSpec,
    variables: Any,
) -> Evaluated:
    source = boxed.opened(f"coco:{root}", "val")
    task = Detection(spec.head, NAMES)
    evaluation = Evaluation(
        task=task,
        network=network,
        preprocessing=spec.preprocessing,
        source=source,
        transform=spec.preprocessing.transform,
        batch_size=batch_size,
        workers=0,
        mesh=mesh.create(jax.devices()[:devices]),
    )
    batches: list[Mapping[str, np.ndarray]] = []
    score = evaluation.score(variables, record=batches.append)
    return Evaluated(score, "".join(task.records(in_order(batches, len(source)), source)))


def test_numbers_do_not_depend_on_devices_and_batches(tmp_path):
    how: Any = (Cells(), ModelSpec("detection", Backbone(), Head(2), TWENTIETHS), {})
    write_pictures(tmp_path)
    file = write_found(tmp_path, json.loads(evaluate(tmp_path, 1, 11, *how).results))
    score, results = evaluate(tmp_path, 1, 11, *how)
    out = tmp_path / "out.json"
    out.write_text(results)
    peer = pycoco.evaluated(file, out)
    assert ((peer.stats > 0.03) & (peer.stats < 0.95)).all()
    result, lines = score.result, score.details.splitlines()
    assert [result[name] for name in ("mAP", "mAP50", "mAP75")] == (100 * peer.stats[:3]).tolist()
    assert [line.split()[-1] for line in lines[:12]] == [f"{100 * each:.2f}" for each in peer.stats]
    for devices, batch_size in ((1, 3), (2, 4), (4, 8)):  # the last ones with padding
        other, same = evaluate(tmp_path, devices, batch_size, *how)
        assert same == results
        assert other.details == score.details
        loss = pytest.approx(result["loss"], rel=1e-5)  # float32 sums in another order
        assert other.result == result | {"loss": loss}


# ---- Through the command ----

CONFIG = """
from mbv2_jax.configs import default

def get_config():
    config = default.get_config("detection")
    config.data.source = "coco:FOLDER"
    config.data.eval_split = "val"
    config.data.workers = 0
    config.model.dtype = "float64"
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Pictures, a model of random weights that finds objects in them, and a config."""
    root = tmp_path_factory.mktemp("split")
    (root / "config.py").write_text(CONFIG.replace("FOLDER", str(root)))
    head = Head(2, ("layer1", "last"), extra_channels=(16,), anchor_sizes=(0.1, 0.3, 0.6, 0.9))
    preprocessing = Preprocessing(32, "resize(size)", (128.0,) * 3, (64.0,) * 3)
    spec = ModelSpec("detection", Backbone(width=0.1), head, preprocessing)
    with short_network.in_use():
        network = Detection(head, NAMES).network(spec.backbone, spec.mode)
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        shapes = jax.eval_shape(network.init, jax.eval_shape(jax.random.key, 0), image)
        variables = tiny_model.filled(shapes)
        write_pictures(root)
        first = evaluate(root, 1, 11, network, spec, variables)
    write_found(root, json.loads(first.results))
    description = Description(spec, NAMES, {"kind": "made by a test"})
    model_dir.write(root / "model", variables["params"], variables["batch_stats"], description)
    return root


def test_results_of_one_and_of_two_processes_are_pycocotools_on_the_file_of_out(
    folder, cache, tmp_path
):
    printed = []
    for processes, batch_size in ((1, 4), (2, 6)):
        out = tmp_path / f"{processes}.json"
        (status, text, err), *_ = groups.run(
            cache,
            f"--config={folder / 'config.py'}",
            "--mode=eval",
            f"--checkpoint={folder / 'model'}",
            f"--config.batch_size={batch_size}",
            f"--out={out}",
            processes=processes,
            devices=1,
        )
        assert status == 0, err
        *details, last = text.splitlines()[-16:]  # jax may print lines of its own before
        peer = pycoco.evaluated(folder / "annotations" / "instances_val.json", out)
        assert ((peer.stats > 0.03) & (peer.stats < 0.95)).all()
        result = json.loads(last)
        figures = [result[name] for name in ("mAP", "mAP50", "mAP75")]
        assert figures == (100 * peer.stats[:3]).tolist()
        assert [line.rsplit(maxsplit=1) for line in details[:12]] == [
            [name, f"{100 * each:.2f}"] for name, each in zip(coco.NAMES, peer.stats, strict=True)
        ]
        printed.append((result.pop("loss"), result, details))
    (loss, *one), (other, *two) = printed
    assert one == two
    assert loss == pytest.approx(other, rel=1e-10)  # float64 sums in another order
