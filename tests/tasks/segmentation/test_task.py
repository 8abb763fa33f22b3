"""Segmentation as training and evaluation see it; tests/parity/ compares it with torch."""

import io
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from mbv2_jax import spec as spec_lib
from mbv2_jax import tasks
from mbv2_jax.data.sample import Frame, Sample
from mbv2_jax.data.sources import open_source
from mbv2_jax.data.sources.parts import Part
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.ops.resize import resize_bilinear
from mbv2_jax.runtime import mesh
from mbv2_jax.spec import Backbone, Preprocessing, TrainingMode
from mbv2_jax.tasks.segmentation import masks, scores
from mbv2_jax.tasks.segmentation.settings import Head, Settings
from mbv2_jax.tasks.segmentation.task import SCALES, Segmentation
from mbv2_jax.training import step as step_lib
from mbv2_jax.training.evaluation import Evaluation

NAMES = ("sky", "grass", "road", "never")
HUNDREDTHS = Preprocessing(mean=(0.0, 0.0, 0.0), std=(100.0, 100.0, 100.0))


class Colours(nn.Module):
    """A network whose logits are a pixel's colour, and -10 for a fourth class."""

    broken_above: float = math.inf  # logits are NaN where red is above it
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        logits = jnp.concatenate([images, jnp.full_like(images[..., :1], -10)], -1)
        return jnp.where(logits[..., :1] > self.broken_above, jnp.nan, logits)


class Scenes:
    """A split of pictures with their masks, given as arrays."""

    def __init__(
        self,
        pictures: Any,
        found: Any,
        class_names: tuple[str, ...] = NAMES,
    ):
        self.class_names = class_names
        self.parts = [Part("scenes", 0, len(pictures))]
        self.pictures, self.found = list(pictures), list(found)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        encoded = io.BytesIO()
        Image.fromarray(self.pictures[index]).save(encoded, "PNG")
        targets = {"mask": Image.fromarray(self.found[index])}
        return Sample(encoded.getvalue(), self.describe(index), targets)

    def describe(self, index: int) -> str:
        return f"scene {index}"


def random_scenes(count: int) -> Scenes:
    """Returns scenes in which a third of the pixels do not count, and no pixel is of class 3."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count, 6, 6, 3), np.uint8)
    found = rng.choice(np.array([0, 1, 2, 255], np.uint8), (count, 6, 6), p=[0.4, 0.2, 0.1, 0.3])
    found[1:2] = 255
    return Scenes(pictures, found)


def evaluation_of(
    source: Any, batch_size: int, *, network: Any = None, devices: int = 4, tta: bool = False
) -> Evaluation:
    return Evaluation(
        task=Segmentation(Head(len(NAMES)), NAMES),
        network=network or Colours(),
        preprocessing=HUNDREDTHS,
        source=source,
        transform=pipeline.make_transform("resize(6)", 6),
        batch_size=batch_size,
        workers=0,
        mesh=mesh.create(jax.devices()[:devices]),
        tta=tta,
    )


# ---- Scores ----


def test_scores_of_a_scene_worked_out_by_hand():
    # Rows are the true classes. Class 3 is nowhere; class 2 is named, and is nowhere.
    matrix = np.array([[6, 1, 1, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(scores.iou(matrix)[:3], [6 / 9, 3 / 5, 0.0])
    assert np.isnan(scores.iou(matrix)[3])
    assert scores.mean_iou(matrix) == pytest.approx(100 * (6 / 9 + 3 / 5 + 0) / 3, rel=1e-12)
    assert scores.pixel_accuracy(matrix) == 75.0
    sums: dict[str, Any] = {
        "confusion": matrix,
        "loss": np.float64(6),
        "pixels": np.float64(12),
        "examples": 2,
    }
    assert scores.summarize(sums) == {
        "mIoU": scores.mean_iou(matrix),
        "pixel_accuracy": 75.0,
        "loss": 0.5,
        "examples": 2,
    }
    assert scores.table(matrix, NAMES).splitlines() == [
        "class      IoU  accuracy  pixels",
        "sky      66.67     75.00   66.7%",
        "grass    60.00     75.00   33.3%",
        "road      0.00         -    0.0%",
        "never        -         -    0.0%",
    ]


def test_pixels_that_do_not_count_leave_no_trace():
    nothing = np.zeros((4, 4))
    sums: dict[str, Any] = {
        "confusion": nothing,
        "loss": np.float64(0),
        "pixels": np.float64(0),
        "examples": 1,
    }
    assert scores.summarize(sums) == {
        "mIoU": 0.0,
        "pixel_accuracy": 0.0,
        "loss": 0.0,
        "examples": 1,
    }
    logits = jnp.zeros((1, 2, 2, 4))
    ignored = jnp.full((1, 2, 2), 255, jnp.uint8)
    assert scores.mean_cross_entropy(logits, ignored, 0.1) == 0
    gradient = jax.grad(lambda logits: scores.mean_cross_entropy(logits, ignored, 0.1))(logits)
    np.testing.assert_array_equal(gradient, 0)


def test_loss_worked_out_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.2, 0.3, 0.5]]))
    labels = jnp.array([0, 2, 255], jnp.uint8)
    # Two pixels count. Half of a target is spread over three classes, each times its weight.
    expected = [
        -(0.5 + 1 / 6) * 1 * math.log(0.5) - (2 + 4) / 6 * math.log(0.25),
        -1 / 6 * math.log(0.125) - 2 / 6 * math.log(0.75) - (0.5 + 1 / 6) * 4 * math.log(0.125),
    ]
    found = scores.mean_cross_entropy(logits, labels, 0.5, (1.0, 2.0, 4.0))
    np.testing.assert_allclose(found, sum(expected) / 2, rtol=1e-6)  # float32
    plain = scores.mean_cross_entropy(logits, labels)
    np.testing.assert_allclose(plain, -(math.log(0.5) + math.log(0.125)) / 2, rtol=1e-6)


def test_confusion_and_iou_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([0, 1, 2, 4, 255], np.uint8), (3, 40, 50))
    predicted = rng.integers(0, 5, labels.shape).astype(np.uint8)
    ours = np.asarray(scores.confusion(jnp.asarray(labels), jnp.asarray(predicted), 6))
    counted = labels != 255
    truth, guess = labels[counted], predicted[counted]
    np.testing.assert_array_equal(ours, metrics.confusion_matrix(truth, guess, labels=range(6)))
    theirs = metrics.jaccard_score(truth, guess, labels=range(5), average=None)
    np.testing.assert_allclose(scores.iou(ours)[:5], theirs, rtol=1e-12)  # float64
    assert scores.mean_iou(ours) == pytest.approx(100 * theirs.mean(), rel=1e-12)


# ---- Evaluation ----


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 8])
def test_evaluation_counts_each_pixel_once_whatever_the_batch(batch_size, devices):
    source = random_scenes(11)
    truth = np.stack(source.found)
    logits = np.stack(source.pictures) / 100
    counted = truth != 255
    matrix = metrics.confusion_matrix(
        truth[counted], logits.argmax(-1)[counted], labels=range(len(NAMES))
    )
    all_logits = np.concatenate([logits, np.full_like(logits[..., :1], -10)], -1)[counted]
    losses = np.log(np.exp(all_logits).sum(-1))
    losses -= all_logits[np.arange(len(losses)), truth[counted]]

    score = evaluation_of(source, batch_size, devices=devices).score({})
    assert score.result == {
        "mIoU": scores.mean_iou(matrix),
        "pixel_accuracy": 100 * np.trace(matrix) / matrix.sum(),
        "loss": pytest.approx(losses.mean(), rel=1e-6),  # float32 sums of a few hundred losses
        "examples": 11,
    }
    # Class 3 is nowhere and is never named: the mean is over three classes.
    assert score.details == scores.table(matrix, NAMES)
    assert score.details.splitlines()[-1].split() == ["never", "-", "-", "0.0%"]


def test_rows_are_the_figures_of_each_picture():
    source = random_scenes(5)
    batches: list[Any] = []
    evaluation = evaluation_of(source, 4)
    evaluation.score({}, record=batches.append)
    rows = [
        {name: array[i] for name, array in batch.items()}
        for batch in batches
        for i in np.flatnonzero(batch["mask"])
    ]
    rows.sort(key=lambda row: row["index"])
    for row, picture, truth in zip(rows, source.pictures, source.found, strict=True):
        counted = truth != 255
        line = evaluation.task.record(row)
        assert line["pixels"] == counted.sum()
        right = (picture.argmax(-1) == truth).sum()
        assert line["pixel_accuracy"] == 100 * right / max(1, counted.sum())
        assert (line["loss"] > 0) == counted.any()


def test_evaluation_refuses_logits_that_are_not_numbers():
    with pytest.raises(RunFailed, match="loss of the evaluation is nan"):
        evaluation_of(random_scenes(4), 4, network=Colours(broken_above=1.0)).score({})


def test_chance_is_the_largest_class_everywhere():
    truth = np.zeros((4, 6, 6), np.uint8)
    truth[:, :, 4:] = 1  # a third
    truth[0] = 255
    chance = evaluation_of(Scenes(np.zeros((4, 6, 6, 3), np.uint8), truth), 4).score({}).chance
    assert chance is not None and chance.figure == "mIoU"
    # 2/3 of the pixels are of class 0, whose IoU that is; class 1 has 0.
    assert chance.value == pytest.approx(100 * (2 / 3) / 2, rel=1e-12)
    error = math.sqrt(2 / 3 * 1 / 3 / 4)  # of 4 images
    assert chance.margin == pytest.approx(2 * 100 * error / 2, rel=1e-12)
    one = Scenes(np.zeros((1, 6, 6, 3), np.uint8), np.zeros((1, 6, 6), np.uint8))
    assert evaluation_of(one, 4).score({}).chance is None


class Smooth(nn.Module):
    """A network that sees a pixel's neighbours, so that scales and mirror images differ."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        kernel = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 3, 4)), images.dtype)
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


@pytest.mark.parametrize(
    "align_corners",
    [pytest.param(True, marks=pytest.mark.slow), False],  # 20 seconds
)
def test_views_average_the_probabilities_of_scales_and_mirror_images(align_corners):
    images = np.random.default_rng(1).standard_normal((2, 9, 13, 3)).astype(np.float32)
    truth = np.random.default_rng(2).integers(0, 4, (2, 9, 13)).astype(np.uint8)
    task = Segmentation(Head(4, align_corners=align_corners), NAMES)
    network: Any = Smooth()
    total = np.zeros((2, 9, 13, 4))
    assert sorted(SCALES) == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        # TensorFlow's deeplab (research/deeplab/model.py, scale_dimension): (side - 1) * scale + 1.
        corners = [int((side - 1) * scale + 1) for side in (9, 13)]
        size = corners if align_corners else [round(side * scale) for side in (9, 13)]
        for mirrored in (False, True):
            view = resize_bilinear(jnp.asarray(images), size, align_corners=align_corners)
            logits = network.apply({}, view[:, :, ::-1] if mirrored else view)
            logits = logits[:, :, ::-1] if mirrored else logits
            resized = resize_bilinear(logits, (9, 13), align_corners=align_corners)
            total += np.asarray(jax.nn.softmax(resized), np.float64)
    batch = {"image": jnp.asarray(images), "labels": jnp.asarray(truth), "mask": jnp.ones(2, bool)}
    merged = task.merge([network.apply({}, view) for view in task.views(batch["image"])])
    # Sums of twelve float32 probabilities.
    np.testing.assert_allclose(np.exp(merged), total / 12, rtol=1e-5, atol=1e-6)
    sums, _ = task.evaluate(merged, batch)
    np.testing.assert_array_equal(
        sums["confusion"],
        metrics.confusion_matrix(truth.ravel(), total.argmax(-1).ravel(), labels=range(4)),
    )


def test_views_whose_probabilities_vanish_merge_to_numbers():
    task = Segmentation(Head(2), NAMES[:2])
    logits = [jnp.array([[[[0.0, 200.0]]]])] * 4  # exp(-200) is 0 in float32
    np.testing.assert_allclose(task.merge(logits), [[[[-200.0, 0.0]]]], atol=1e-5)


# ---- A task ----


def settings(**values: Any) -> dict[str, Any]:
    head = {f"model.{name}": value for name, value in spec_lib.to_json(Head()).items()}
    own = head | {"model.aspp_rates": ()} | spec_lib.to_json(Settings()) | {"class_weights": ()}
    return own | {name.replace("__", "."): value for name, value in values.items()}


def test_data_decide_the_number_of_classes():
    source = random_scenes(2)
    task = Segmentation.for_training(settings(label_smoothing=0.1), source)
    assert task == Segmentation(Head(4), NAMES, Settings(label_smoothing=0.1))
    given = settings(model__num_classes=7, model__aspp_rates=(6,), model__align_corners=False)
    assert Segmentation.for_training(given, None).head == Head(7, (6,), False)
    assert Segmentation.for_training(settings(), None).head is None
    with pytest.raises(UserError, match=r"num_classes is 7, but the data has 4 classes: .* to 4"):
        Segmentation.for_training(settings(model__num_classes=7), source)
    with pytest.raises(UserError, match="class_weights holds 2 numbers, and there are 4 classes"):
        Segmentation.for_training(settings(class_weights=(1.0, 2.0)), source)
    with pytest.raises(UserError, match="class_weights are all 0"):
        Segmentation.for_training(settings(class_weights=(0.0,) * 4), source)


def test_data_without_masks_are_refused_before_anything_is_compiled(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "a.png")
    source = open_source(f"folder:{tmp_path}", "train")
    with pytest.raises(UserError, match=r"a\.png: has no mask: for segmentation, give pairs:PATH"):
        Segmentation.for_training(settings(), source)


def test_data_without_classes_are_refused_by_their_first_sample():
    task = Segmentation(Head(4), NAMES)
    image = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(UserError, match=r"^cat\.jpg: has no mask: for segmentation, give pairs"):
        task.collate([Sample(image, "cat.jpg", {"label": 3})])
    odd = Image.fromarray(np.array([[0, 255], [4, 9]], np.uint8))
    with pytest.raises(UserError, match=r"^7: its mask holds 4, 9, and there are classes 0 to 3"):
        task.collate([Sample(image, "7", {"mask": odd})])


def test_collate_stacks_images_and_masks():
    task = Segmentation(Head(4), NAMES)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 5, 3), np.uint8)
    found = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), (2, 4, 5))
    samples = [
        Sample(image, "", {"mask": Image.fromarray(mask)})
        for image, mask in zip(images, found, strict=True)
    ]
    batch = task.collate(samples)
    np.testing.assert_array_equal(batch["image"], images)
    np.testing.assert_array_equal(batch["labels"], found)
    described = {name: (array.shape[1:], array.dtype) for name, array in batch.items()}
    assert described == task.batch_spec((4, 5))


def test_splits_of_other_classes_do_not_belong_together():
    train = random_scenes(1)
    assert Segmentation.split_fault(train, random_scenes(1)) == ""
    for names, odd in ((NAMES[:2], "never, road"), (NAMES[::-1], "their order")):
        fault = Segmentation.split_fault(train, Scenes([], [], names))
        assert fault.format("'a'", "'b'") == (
            f"the classes of 'a' and 'b' differ; in only one of them: {odd}"
        )


def test_without_a_head_the_network_is_the_backbone():
    backbone = Segmentation().backbone(Backbone(width=0.5))
    assert backbone == Backbone(width=0.5, last_convolution=False)
    network = Segmentation().network(backbone, TrainingMode())
    assert isinstance(network, MobileNetV2) and network.num_classes is None


def test_classes_of_data_are_found_among_the_models():
    truth = np.array([[0, 1], [255, 1]], np.uint8)
    source = Scenes([np.zeros((2, 2, 3), np.uint8)], [truth], ("road", "sky"))
    task = Segmentation(Head(4), NAMES)
    aligned = task.align(source, "data", "model")
    assert aligned.found == (2, 0)
    assert aligned.note == "data: 2 of model's 4 classes, by name"
    assert aligned.source.class_names == NAMES
    np.testing.assert_array_equal(aligned.source[0].targets["mask"], [[2, 0], [255, 0]])
    assert aligned.source.describe(0) == "scene 0"
    assert task.unlike_published(aligned) == "they are for 4 classes, and the data has 2 of them"
    assert task.unlike_published(task.align(random_scenes(1), "data", "model")) == ""
    # A class that the data does not have must not become another one of the model's.
    source.found = [np.array([[0, 2]], np.uint8)]
    with pytest.raises(
        UserError, match=r"^scene 0: its mask holds 2, and there are classes 0 to 1"
    ):
        aligned.source[0]


# ---- Predictions ----


def test_a_prediction_is_placed_in_its_picture():
    task = Segmentation(Head(4), NAMES)
    # A picture of 5 x 4, shrunk to 3 x 2 (nothing is interpolated in a mask), and padded to 3 x 3.
    frame = Frame((6, 4), (0.0, 0.0, 6.0, 6.0))
    image = np.array([[0, 1, 1], [2, 2, 3], [3, 3, 3]], np.uint8)
    outputs = {"mask": np.stack([image, image]), "finite": np.array([True, False])}
    (found,) = task.decode(outputs, [frame])
    assert found["mask"].dtype == np.uint8
    np.testing.assert_array_equal(
        found["mask"], [[0, 0, 1, 1, 1, 1]] * 2 + [[2, 2, 2, 2, 3, 3]] * 2
    )
    assert found["classes"] == ["grass", "road", "sky", "never"]
    assert found["areas"] == [8 / 24, 8 / 24, 4 / 24, 4 / 24]
    assert task.entries(found, 2) == [
        {"share": 8 / 24, "label": 1, "class": "grass"},
        {"share": 8 / 24, "label": 2, "class": "road"},
    ]
    with pytest.raises(ValueError, match="not numbers"):
        task.decode(outputs, [frame, frame])


def test_a_mirrored_image_s_mask_is_turned_back():
    frame = Frame.whole(4, 1).part(1, 0, 0, 1)
    mask = np.array([[0, 1, 2, 3]], np.uint8)
    np.testing.assert_array_equal(masks.in_picture(mask, frame), [[3, 2, 1, 0]])


def test_masks_have_the_palette_of_voc():
    # VOCdevkit's VOClabelcolormap: aeroplane, bicycle, person, tv monitor, and the border.
    image = masks.to_image(np.array([[0, 1, 2, 15, 20, 255]], np.uint8))
    assert image.mode == "P"
    assert list(image.convert("RGB").get_flattened_data()) == [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (192, 128, 128),
        (0, 64, 128),
        (224, 224, 192),
    ]


def test_the_task_is_built_in():
    assert tasks.find("segmentation") is Segmentation
    assert tasks.settings("segmentation").Head is Head


def test_a_step_s_accuracy_and_loss_leave_out_pixels_that_do_not_count():
    logits = jnp.array([[[[5.0, 0.0], [0.0, 5.0], [5.0, 0.0]]]])
    labels = jnp.array([[[0, 0, 255]]], jnp.uint8)
    loss, logged = Segmentation(Head(2), NAMES[:2]).loss(logits, {"labels": labels})
    expected = (math.log1p(math.exp(-5)) + math.log1p(math.exp(5))) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)  # float32
    assert logged["pixel_accuracy"] == 50.0


def test_padding_rows_count_nothing():
    source = random_scenes(2)
    batch: dict[str, Any] = {
        "image": np.stack(source.pictures),
        "labels": np.stack(source.found),
        "mask": np.zeros(2, bool),
    }
    batch["labels"][1] = 0
    sums, rows = step_lib.eval_step(
        {}, batch, task=evaluation_of(source, 4).task, network=Colours(), preprocessing=HUNDREDTHS
    )
    assert not any(np.asarray(value).any() for value in sums.values())
    assert {len(row) for row in rows.values()} == {2}
