"""The fields of a model that --set changes are those of spec.py."""

import pytest

from mbv2_jax.convert import fields
from mbv2_jax.errors import UserError
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode

SPEC = ModelSpec("classification", Backbone(width=0.5), None, Preprocessing())


# The fields that the arrays of a file determine.
SHAPES = (
    "model.width",
    "model.depth",
    "model.fixed_ends",
    "model.divisor",
    "model.last_convolution",
)


def test_settable_fields_are_all_that_a_model_keeps_but_those_of_its_arrays():
    assert {*fields.SETTABLE, *SHAPES} == set(SPEC.values())
    assert fields.settable(SPEC) == {name: SPEC.values()[name] for name in fields.SETTABLE}


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
