"""Classification as training and evaluation see it; tests/parity/ compares it with its peers."""

import io
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mbv2_jax import spec as spec_lib
from mbv2_jax import tasks
from mbv2_jax.data.sample import Sample
from mbv2_jax.data.sources.parts import Part
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.runtime import mesh
from mbv2_jax.spec import Backbone, Preprocessing, TrainingMode
from mbv2_jax.tasks.classification.settings import Head, Settings
from mbv2_jax.tasks.classification.task import Classification
from mbv2_jax.training import step as step_lib
from mbv2_jax.training.evaluation import Evaluation

COLOURS = ("red", "green", "blue")
HUNDREDTHS = Preprocessing(mean=(0.0, 0.0, 0.0), std=(100.0, 100.0, 100.0))


class FirstPixel(nn.Module):
    """A network whose logits are the first pixel: three classes, red, green and blue."""

    broken_above: float = math.inf  # logits are NaN where red is above it
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        logits = images[:, 0, 0]
        return jnp.where(logits[:, :1] > self.broken_above, jnp.nan, logits)


class Pixels:
    """A split of one-coloured images."""

    def __init__(self, colours, labels, class_names: tuple[str, ...] = COLOURS):
        self.class_names = class_names
        self.parts = [Part("pixels", 0, len(colours))]
        self.colours, self.labels = colours, labels

    def __len__(self) -> int:
        return len(self.colours)

    def __getitem__(self, index: int) -> Sample:
        encoded = io.BytesIO()
        Image.new("RGB", (2, 2), tuple(self.colours[index])).save(encoded, "PNG")
        return Sample(encoded.getvalue(), self.describe(index), {"label": self.labels[index]})

    def describe(self, index: int) -> str:
        return f"image {index}"


def score(source: Pixels, batch_size: int, network: nn.Module) -> dict[str, Any]:
    return evaluation_of(source, batch_size, network).score({}).result


def evaluation_of(source: Pixels, batch_size: int, network: nn.Module) -> Evaluation:
    return Evaluation(
        task=Classification(Head(3), COLOURS),
        network=network,
        preprocessing=HUNDREDTHS,
        source=source,
        transform=pipeline.make_transform("resize(2)", 2),
        batch_size=batch_size,
        workers=0,
        mesh=mesh.create(),  # four devices, see conftest.py
    )


@pytest.mark.parametrize("batch_size", [4, 8, 16])
def test_evaluation_scores_each_example_once_whatever_the_batch(batch_size):
    generator = np.random.default_rng(0)
    colours = generator.permuted(np.tile([0, 90, 250], (11, 1)), axis=1).tolist()
    labels = [int(np.argmax(colour)) for colour in colours]
    labels[4] = (labels[4] + 1) % 3  # 10 of 11 are right, with these losses:
    logits = np.asarray(colours) / 100
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(11), labels]

    found = score(Pixels(colours, labels), batch_size, FirstPixel())
    assert found == {
        "top1": 100 * 10 / 11,
        "top5": 100.0,
        "loss": pytest.approx(losses.mean(), rel=1e-6),  # float32 sums of a few losses
        "examples": 11,
    }


def test_chance_is_the_share_of_the_largest_class_with_two_standard_errors():
    labels = [0] * 30 + [2] * 10
    source = Pixels([(250, 0, 0)] * 40, labels)
    chance = evaluation_of(source, 16, FirstPixel()).score({}).chance
    assert chance is not None
    assert (chance.figure, chance.value) == ("top1", 75.0)
    assert chance.margin == pytest.approx(2 * 100 * np.sqrt(0.75 * 0.25 / 40), rel=1e-12)
    # Naming the only class there is would always be right.
    assert evaluation_of(Pixels([(0, 0, 0)] * 4, [1] * 4), 4, FirstPixel()).score({}).chance is None


def test_standard_error_is_the_binomial_one():
    task, result = Classification(Head(3), COLOURS), {"top1": 20.0, "loss": 1.0, "examples": 400}
    assert task.standard_error("top1", result) == pytest.approx(2.0, rel=1e-12)
    assert task.standard_error("loss", result) == 0


def test_evaluation_refuses_logits_that_are_not_numbers():
    # Red is right by its rank alone: NaN sorts as the largest number.
    source = Pixels([(250, 0, 0), (0, 250, 0)], [0, 1])
    with pytest.raises(RunFailed, match="loss of the evaluation is nan"):
        score(source, 4, FirstPixel(broken_above=2.0))


@pytest.mark.parametrize("mask", [[True, True, False], [False] * 3])
def test_examples_are_counted_without_padding(mask):
    batch = {
        "image": np.zeros((3, 2, 2, 3), np.uint8),
        "label": np.zeros(3, np.int32),
        "mask": np.array(mask),
    }
    sums, rows = jax.jit(
        lambda batch: step_lib.eval_step(
            {},
            batch,
            task=Classification(Head(3), COLOURS),
            network=FirstPixel(),
            preprocessing=HUNDREDTHS,
        )
    )(batch)
    assert sums["examples"].dtype == np.int32
    assert sums["examples"] == sum(mask)
    assert {len(row) for row in rows.values()} == {3}


def settings(**values: Any) -> dict[str, Any]:
    own = {"model.num_classes": None, "model.hidden": ()} | spec_lib.to_json(Settings())
    return own | {name.replace("__", "."): value for name, value in values.items()}


def test_data_decide_the_number_of_classes():
    source = Pixels([(0, 0, 0)], [0])
    task = Classification.for_training(settings(label_smoothing=0.1), source)
    assert task == Classification(Head(3), COLOURS, Settings(label_smoothing=0.1))
    assert Classification.for_training(settings(model__num_classes=3), source).head == Head(3)
    assert Classification.for_training(settings(model__num_classes=7), None).head == Head(7)
    with_hidden = settings(model__num_classes=7, model__hidden=(4, 2))
    assert Classification.for_training(with_hidden, None).head == Head(7, hidden=(4, 2))
    assert Classification.for_training(settings(), None).head is None
    with pytest.raises(UserError, match=r"num_classes is 7, but the data has 3 classes: .* to 3"):
        Classification.for_training(settings(model__num_classes=7), source)


@pytest.mark.parametrize(
    ("features", "fault"),
    [(np.ones((1, 4)), "1 training image is too few"), (np.full((9, 4), np.nan), "NaN")],
)
def test_features_to_which_no_head_can_be_fitted_are_refused(features, fault):
    rows = {"features": features, "label": np.zeros(len(features), np.int32)}
    with pytest.raises(UserError, match=fault):
        Classification(Head(3), COLOURS).fit_head({"params": {}}, rows)


def test_a_head_with_hidden_layers_is_not_fitted():
    task = Classification(Head(3, hidden=(4,)), COLOURS)
    network = task.network(Backbone(), TrainingMode())
    with pytest.raises(UserError, match=r"model\.hidden is \(4,\): give --config\.fit_head=false"):
        task.features(network, {}, jnp.zeros((1, 32, 32, 3)))


def test_splits_of_other_classes_do_not_belong_together():
    train = Pixels([], [])
    assert Classification.split_fault(train, Pixels([], [])) == ""
    for names, odd in ((("red", "green"), "blue"), (COLOURS[::-1], "their order")):
        fault = Classification.split_fault(train, Pixels([], [], names))
        assert fault.format("'a'", "'b'") == (
            f"the classes of 'a' and 'b' differ; in only one of them: {odd}"
        )


def test_collate_stacks_images_and_labels_and_refuses_a_missing_label():
    task = Classification(Head(3), COLOURS)
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    samples = [Sample(image, f"image {i}", {"label": i}) for i, image in enumerate(images)]
    batch = task.collate(samples)
    np.testing.assert_array_equal(batch["image"], images)
    np.testing.assert_array_equal(batch["label"], [0, 1])
    described = {name: (array.shape[1:], array.dtype) for name, array in batch.items()}
    assert described == task.batch_spec((4, 5))
    for targets in ({}, {"label": -1}):
        with pytest.raises(UserError, match=r"^image 2: has no label"):
            task.collate([*samples, Sample(images[0], "image 2", targets)])


def test_network_has_the_fields_of_its_specs():
    backbone = Backbone(
        width=0.5,
        strides=(1,) * 8,
        padding="same",
        bn_epsilon=1e-3,
        depth=1.2,
        fixed_ends=True,
        divisor=4,
        last_convolution=False,
    )
    mode = TrainingMode(
        dropout=0.3, bn_momentum=0.8, dtype="bfloat16", frozen_stages=2, folded_norm=True
    )
    network = Classification(Head(3, hidden=(4,))).network(backbone, mode, folded=True)
    assert network == MobileNetV2(
        num_classes=3,
        width=0.5,
        strides=(1,) * 8,
        padding="same",
        bn_epsilon=1e-3,
        depth=1.2,
        fixed_ends=True,
        divisor=4,
        last_convolution=False,
        hidden=(4,),
        dropout=0.3,
        bn_momentum=0.8,
        dtype=jnp.dtype("bfloat16"),
        frozen_stages=2,
        folded_norm=True,
        folded=True,
    )
    assert Classification().network(backbone, mode).num_classes is None


def test_a_task_is_named_or_a_class_of_ones_own():
    assert tasks.find("classification") is Classification
    assert tasks.find(f"{__name__}:Classification") is Classification
    assert tasks.settings("classification").Head is Head


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("clasification", "task is 'clasification': did you mean 'classification'?"),
        ("", "task is '': known are 'classification', 'detection', 'segmentation'"),
        (
            ":X",
            "task is ':X': known are 'classification', 'detection', 'segmentation'",
        ),
        ("no.module:X", "task is 'no.module:X', which cannot be imported: No module named 'no'"),
        ("mbv2_jax.tasks:Nothing", "which cannot be imported: module 'mbv2_jax.tasks' has no"),
    ],
)
def test_an_unknown_task_is_refused_by_name(name, named):
    with pytest.raises(UserError, match="task is") as refused:
        tasks.find(name)
    assert named in str(refused.value)
