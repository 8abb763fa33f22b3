"""Prediction with a detector: boxes in the pictures' pixels, tables, JSON, pictures, refusals."""

import dataclasses
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mbv2_jax
from mbv2_jax import drawing, model_dir, spec
from mbv2_jax.inference import Predictor
from mbv2_jax.model_json import Description
from mbv2_jax.models.ssdlite import Outputs
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing
from mbv2_jax.tasks.detection.settings import Head
from mbv2_jax.tasks.detection.task import Detection
from tests.support import commands, tiny_model

COLOURS = ("red", "green", "blue")
PIXELS = Preprocessing(48, "resize(size)", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
SEEN = f"{__name__}:Seen"


class Quarters(nn.Module):
    """A network that finds an object in each quarter of one colour, of the colour's class."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> Outputs:
        count, height, width, _ = images.shape
        means = images.reshape(count, 2, height // 2, 2, width // 2, 3).mean((2, 4))
        colours = jnp.where(means.reshape(count, 4, 3) > 0.6, 10.0, 0.0)
        logits = jnp.concatenate([colours, jnp.full((count, 4, 1), 5.0)], -1)
        x, y = width / 2, height / 2
        corners = [(i * x, j * y, i * x + x, j * y + y) for j in (0, 1) for i in (0, 1)]
        anchors = jnp.broadcast_to(jnp.array(corners), (count, 4, 4))
        size = jnp.broadcast_to(jnp.array([height, width], jnp.float32), (count, 2))
        return Outputs((logits,), (jnp.zeros((count, 4, 4)),), (anchors,), size)


@dataclasses.dataclass(frozen=True)
class Seen(Detection):
    """Detection with a network whose boxes are known."""

    def network(self, backbone: Backbone, mode: spec.TrainingMode, *, folded: bool = False) -> Any:
        return Quarters()

    def fold(self, params: Any, batch_stats: Any, backbone: Backbone) -> dict[str, Any]:
        return {}


def seer(transforms: str) -> Predictor:
    """Returns the predictor of `Quarters`."""
    preprocessing = dataclasses.replace(PIXELS, eval_transforms=transforms)
    made = ModelSpec(SEEN, Backbone(), Head(3), preprocessing)
    description = Description(made, COLOURS, {"kind": "made by a test"})
    return Predictor(model_dir.SavedModel({}, {}, description, pathlib.Path("seer")))


def quarter(size: tuple[int, int], corner: tuple[int, int], colour: str) -> Image.Image:
    """Returns a black picture with a quarter of its size in one colour."""
    picture = Image.new("RGB", size)
    value = tuple(255 * (name == colour) for name in COLOURS)
    (width, height), (left, top) = size, corner
    picture.paste(value, (left, top, left + width // 2, top + height // 2))
    return picture


@pytest.mark.parametrize("size", [(48, 48), (96, 48), (24, 144), (300, 200)])
def test_boxes_are_in_pixels_of_the_picture(size):
    width, height = size
    pictures = [quarter(size, (width // 2, 0), "red"), quarter(size, (0, height // 2), "blue")]
    expected = [(width / 2, 0, width, height / 2), (0, height / 2, width / 2, height)]
    for found, box, name in zip(
        seer("resize(size)").predict(pictures), expected, ("red", "blue"), strict=True
    ):
        assert found["boxes"].dtype == np.float32
        # A few roundings of float32.
        np.testing.assert_allclose(found["boxes"], [box], rtol=1e-6, atol=1e-4)
        assert found["classes"] == [name]
        assert found["labels"].tolist() == [COLOURS.index(name)]
        # Softmax of (10, 0, 0, 5), the last of the background.
        np.testing.assert_allclose(found["scores"], [1 / (1 + np.exp(-5) + 2 * np.exp(-10))], 1e-5)


def test_boxes_go_back_through_padding_and_cropping():
    # 96 x 48 is shrunk to 48 x 24 and padded below: the upper left quarter is the left half.
    picture = Image.new("RGB", (96, 48))
    picture.paste((255, 0, 0), (0, 0, 48, 48))
    (found,) = seer("fit(size)|pad(size)").predict([picture])
    np.testing.assert_allclose(found["boxes"], [(0, 0, 48, 48)], atol=1e-4)
    # The middle of 96 x 48: its lower right quarter.
    picture = Image.new("RGB", (96, 48))
    picture.paste((0, 0, 255), (48, 24, 96, 48))
    (found,) = seer("center_crop(size)").predict([picture])
    np.testing.assert_allclose(found["boxes"], [(48, 24, 72, 48)], atol=1e-4)


def test_a_picture_without_objects_has_none():
    (found,) = seer("resize(size)").predict([Image.new("RGB", (64, 48))])
    assert found["boxes"].shape == (0, 4) and found["scores"].shape == (0,)
    assert found["classes"] == []


def test_confident_objects_entries_and_drawing():
    task = seer("resize(size)").task
    prediction: dict[str, Any] = {
        "boxes": np.array([[1, 2, 30, 40], [5, 5, 20, 20], [0, 0, 9, 9]], np.float32),
        "scores": np.array([0.9, 0.5, 0.25], np.float32),
        "labels": np.array([2, 0, 1], np.int32),
        "classes": ["blue", "red", "green"],
    }
    assert task.confident(prediction, 0.5)["classes"] == ["blue", "red"]
    assert task.confident(prediction, 0)["classes"] == ["blue", "red", "green"]
    best, _ = entries = task.entries(prediction, 2)
    assert len(entries) == 2
    expected = {"label": 2, "class": "blue", "x0": 1.0, "y0": 2.0, "x1": 30.0, "y1": 40.0}
    assert best == expected | {"score": pytest.approx(0.9, rel=1e-6)}  # float32
    json.dumps(entries)  # plain numbers
    picture = Image.new("RGB", (200, 160))
    wanted = drawing.boxes(
        picture, prediction["boxes"][:1], ["blue 90%"], [drawing.class_colour(2)]
    )
    np.testing.assert_array_equal(task.draw(picture, prediction, 1), wanted)


# ---- The real network, and the command ----

SIZE = 48
NAMES = ("cat", "dog", "wild boar")
TINY = ModelSpec(
    "detection",
    Backbone(width=0.1),
    Head(3, taps=("layer7", "last"), extra_channels=(16,), anchor_sizes=(0.2, 0.4, 0.6, 0.8)),
    Preprocessing(SIZE, "resize(size)", tiny_model.MEAN, tiny_model.STD),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a detector, a classifier and three pictures, two of one name."""
    task = Detection(TINY.head, NAMES)
    return tiny_model.prediction_folder(task, TINY, tmp_path_factory.mktemp("detection"))


def predict(cache: pathlib.Path, folder: pathlib.Path, *arguments: str) -> tuple[int, str, str]:
    return commands.run(cache, *arguments, module="tests.support.short_predict", cwd=folder)


def test_predictors_boxes_are_those_of_its_outputs(folder, few_layers):
    predictor = mbv2_jax.init_model(folder / "model")
    assert predictor.class_names == NAMES
    image = predictor.prepare(folder / "two.png")
    outputs = predictor(image[None])
    found = mbv2_jax.inference_model(predictor, folder / "two.png")
    assert set(found) == {"boxes", "scores", "labels", "classes"}
    assert len(found["boxes"]) > 10 and (np.diff(found["scores"]) <= 0).all()
    # The best is the best score of an object in any of the maps; its box, from SSD's codes.
    logits, codes, anchors = (
        np.concatenate([np.asarray(part[0], np.float64) for part in parts]) for parts in outputs[:3]
    )
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    anchor, label = np.unravel_index(scores[:, :-1].argmax(), (len(scores), 3))
    x0, y0, x1, y1 = anchors[anchor]
    x, y, width, height = codes[anchor] * (0.1, 0.1, 0.2, 0.2)
    middle = np.array([x * (x1 - x0) + (x0 + x1) / 2, y * (y1 - y0) + (y0 + y1) / 2])
    half = np.array([np.exp(width) * (x1 - x0), np.exp(height) * (y1 - y0)]) / 2
    box = np.concatenate([middle - half, middle + half]).clip(0, SIZE)
    in_picture = box * np.tile([70 / SIZE, 50 / SIZE], 2)  # the photo has 70 x 50 pixels
    # Two programs of the same network in float32; coordinates are up to 70.
    np.testing.assert_allclose(found["boxes"][0], in_picture, atol=1e-3)
    np.testing.assert_allclose(found["scores"][0], scores[anchor, label], atol=1e-5)
    assert (found["labels"][0], found["classes"][0]) == (label, NAMES[label])


def test_table_json_and_pictures(folder, cache, tmp_path, few_layers):
    predictor = mbv2_jax.init_model(folder / "model")
    found = {
        name: mbv2_jax.inference_model(predictor, folder / name)
        for name in ("one.jpg", "two.png", "more/one.png")
    }
    # Halfway between two scores, which differ by more than the roundings of two programs.
    scores = np.sort(np.concatenate([each["scores"] for each in found.values()]))[::-1]
    gap = 5 + int(np.argmax(scores[5:15] - scores[6:16]))
    least = float(scores[gap] + scores[gap + 1]) / 2
    show = tmp_path / "shown"
    status, text, err = predict(
        cache,
        folder,
        *("one.jpg", "two.png", "more", "--checkpoint=model", f"--score={least}"),
        f"--show-dir={show}",
    )
    assert status == 0, err
    header, *lines = text.splitlines()
    assert header.split() == ["image", "rank", "score", "x0", "y0", "x1", "y1", "label", "class"]
    expected: list[Any] = []
    for name, each in found.items():
        kept = (each["scores"] >= least).sum()
        parts = (each[part][:kept] for part in ("scores", "boxes", "labels", "classes"))
        expected += zip(*parts, strict=True) if kept else [name]
    assert gap + 1 <= len(lines) == len(expected)
    for line, row in zip(lines, expected, strict=True):
        if isinstance(row, str):
            assert line.split() == [row, "-", "nothing"]
            continue
        score, box, label, name = row
        shown = line.removesuffix(name).split()
        assert int(shown[-1]) == label and line.endswith(name)
        # One and two decimals; and two programs of the same network.
        assert float(shown[-6].rstrip("%")) == pytest.approx(100 * score, abs=0.01)
        np.testing.assert_allclose([float(value) for value in shown[-5:-1]], box, atol=0.06)
    # A column's numbers end where its heading ends.
    for name in ("x0", "y1"):
        end = header.index(name) + len(name)
        assert {line[end - 2] for line in lines if "nothing" not in line} == {"."}
    assert {file.name for file in show.iterdir()} == {"one.jpg", "two.png", "one.png"}
    kept = predictor.task.confident(found["two.png"], least)
    drawn = predictor.task.draw(tiny_model.photo(1), kept, 100)
    with Image.open(show / "two.png") as picture:
        assert picture.size == drawn.size == (210, 150)  # enlarged, as it is small
        assert (np.asarray(picture) == np.asarray(drawn)).mean() > 0.99  # roundings of corners

    status, text, err = predict(
        cache, folder, "two.png", "--checkpoint=model", "--json", "--score=0", "--topk=7"
    )
    assert status == 0, err
    entries = json.loads(text)["predictions"]
    assert len(entries) == 7
    boxes = [[entry[name] for name in ("x0", "y0", "x1", "y1")] for entry in entries]
    np.testing.assert_allclose(boxes, found["two.png"]["boxes"][:7], atol=1e-3)
    assert [entry["class"] for entry in entries] == found["two.png"]["classes"][:7]
    assert set(entries[0]) == {"score", "label", "class", "x0", "y0", "x1", "y1"}


def test_a_picture_without_confident_objects_has_a_line(folder, cache, few_layers):
    status, text, err = predict(cache, folder, "one.jpg", "--checkpoint=model", "--score=1")
    assert status == 0, err
    assert text.splitlines()[1].split() == ["one.jpg", "-", "nothing"]
    status, text, err = predict(
        cache, folder, "one.jpg", "--checkpoint=model", "--score=1", "--json"
    )
    assert status == 0, err
    assert json.loads(text) == {"image": "one.jpg", "predictions": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=model", "--score=30"], "--score=30.0: give a number from 0 to 1"),
        (["--checkpoint=model", "--score=nan"], "--score=nan: give a number from 0 to 1"),
        (["--checkpoint=model", "--score=high"], "'high'"),
        (
            ["--checkpoint=classifier", "--score=0.5"],
            "error: --score=0.5 is for objects, and classifier finds none: --topk limits",
        ),
        (
            ["--checkpoint=model", "--out-dir=out"],
            "error: --out-dir=out is for masks, and the predictions of model are none",
        ),
    ],
    ids=["30", "nan", "no number", "of a classifier", "masks"],
)
def test_refusals(folder, cache, arguments, message):
    status, text, err = predict(cache, folder, "one.jpg", *arguments)
    assert (status, text) == (2, "")
    assert message in err and "Traceback" not in err


def test_load_and_save(folder, tmp_path, few_layers, capsys):
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    fields = dataclasses.asdict(TINY.head) | {"num_classes": 2, "scores": "sigmoid"}
    fields |= {"anchors": "tensorflow", "max_detections": 3}
    model = mbv2_jax.load(folder / "classifier", task="detection", **fields)
    assert "with new heads" in capsys.readouterr().err
    saved = tmp_path / "saved"
    pixels = dataclasses.replace(model.preprocessing, eval_transforms="resize(size)")
    names = ["cup", "ball"]
    mbv2_jax.save(
        saved, model.module, model.variables, names, preprocessing=pixels, task="detection"
    )
    # The fields that the network does not read are kept, too.
    assert model_dir.read(saved).spec.head == Head(**fields)
    again = mbv2_jax.load(saved)
    ours, theirs = (
        jax.tree.leaves(each.module.apply(each.variables, each.preprocessing.normalize(images)))
        for each in (model, again)
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    (found,) = mbv2_jax.init_model(saved).predict(images[0])
    assert len(found["boxes"]) == 3  # of sigmoid scores near a half, of new heads
    np.testing.assert_allclose(found["scores"], 0.5, atol=0.1)
