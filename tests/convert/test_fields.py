"""The fields of a model that --set changes are those of spec.py."""

import pytest

from mbv2_jax.convert import fields
from mbv2_jax.errors import UserError
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode
from mbv2_jax.tasks.detection.settings import Head
from mbv2_jax.tasks.segmentation import settings

SPEC = ModelSpec("classification", Backbone(width=0.5), None, Preprocessing())
SEGMENTATION = ModelSpec(
    "segmentation", Backbone(width=0.5), settings.Head(num_classes=3), Preprocessing()
)
DETECTION = ModelSpec("detection", Backbone(width=0.5), Head(num_classes=3), Preprocessing())


# The fields that the arrays of a file determine.
SHAPES = (
    "model.width",
    "model.depth",
    "model.fixed_ends",
    "model.divisor",
    "model.last_convolution",
    "model.quantize",
)


def test_settable_fields_are_all_that_a_model_keeps_but_those_of_its_arrays():
    head = {"model.num_classes", "model.aspp_rates"}
    boxes = {"model.taps", "model.extra_channels", "model.anchors"}
    kept = {*SEGMENTATION.values(), *DETECTION.values()}
    assert {*fields.SETTABLE, *SHAPES, *head, *boxes} == kept
    for spec in (SPEC, SEGMENTATION, DETECTION):
        own = {name: value for name, value in spec.values().items() if name in fields.SETTABLE}
        assert fields.settable(spec) == own
    assert SEGMENTATION.values().keys() - SPEC.values().keys() == {*head, "model.align_corners"}


def test_each_part_gets_its_own_values():
    changed = fields.replace(
        SPEC, {"model.padding": "same", "model.dropout": 0.3, "data.mean": [1, 2, 3]}
    )
    assert changed == ModelSpec(
        task="classification",
        backbone=Backbone(width=0.5, padding="same"),
        head=None,
        preprocessing=Preprocessing(mean=(1, 2, 3)),
        mode=TrainingMode(dropout=0.3),
    )


def test_the_heads_fields_are_those_of_its_task():
    changed = fields.replace(SEGMENTATION, {"model.align_corners": False})
    assert changed.head == settings.Head(num_classes=3, align_corners=False)
    with pytest.raises(UserError, match=r"model\.align_corners cannot be set"):
        fields.replace(SPEC, {"model.align_corners": False})
    with pytest.raises(UserError, match=r"model\.align_corners is 1"):
        fields.replace(SEGMENTATION, {"model.align_corners": 1})


@pytest.mark.parametrize("name", [*SHAPES, "model.num_classes", "model.dtype", "seed"])
def test_other_fields_cannot_be_set(name):
    with pytest.raises(UserError, match=f"{name} cannot be set"):
        fields.replace(SPEC, {name: 1})


def test_all_impossible_values_are_named():
    values = {"model.bn_epsilon": 0, "model.bn_momentum": 2, "data.image_size": "big"}
    with pytest.raises(UserError) as caught:
        fields.replace(SPEC, values)
    for name in values:
        assert f"{name} is " in str(caught.value)
