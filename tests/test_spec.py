"""The declarations of fields: their defaults, their values, and the forms derived from them."""

import dataclasses
import json
from typing import Any

import pytest

from mbv2_jax import spec
from mbv2_jax.models import mobilenet_v2
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode
from mbv2_jax.tasks.classification.settings import Head, Settings
from mbv2_jax.training import settings

DECLARATIONS: list[Any] = [Backbone, Preprocessing, TrainingMode, Head, Settings, settings.Run]
DECLARATIONS += settings.SECTIONS.values()
FIELDS = [
    pytest.param(field, id=f"{cls.__name__}.{field.name}")
    for cls in DECLARATIONS
    for field in dataclasses.fields(cls)
]
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("field", FIELDS)
def test_every_default_is_accepted_and_every_field_explained(field):
    values, default = field.metadata["values"], field.default
    if default is None:
        assert field.metadata["optional"]
    else:
        assert values.fault(default) == ""
    assert field.metadata["help"] and not field.metadata["help"].endswith(".")
    assert not values.accepts(None) and values.fault(None)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_refuses_another_type(field):
    values = field.metadata["values"]
    for value in (object(), [None], {}, NAN, INFINITY):
        assert not values.accepts(value)
        assert values.fault(value).startswith(f"is {value!r}: ")


@pytest.mark.parametrize(
    ("cls", "name", "value", "fault"),
    [
        (Backbone, "width", 0, "width is 0: it must be above 0"),
        (Backbone, "width", True, "width is True: it must be above 0"),
        (Backbone, "width", "1", "width is '1': it must be above 0"),
        (Backbone, "strides", (2,) * 7, "it must be 8 numbers, each 1 or 2, such as (2, 1, 2,"),
        (Backbone, "strides", (2,) * 7 + (3,), "it must be 8 numbers"),
        (Backbone, "padding", "SAME", "padding is 'SAME': known are 'torch', 'same'"),
        (Backbone, "padding", "sam", "padding is 'sam': did you mean 'same'?"),
        (Backbone, "output_stride", 12, "output_stride is 12: known are '8', '16', '32'"),
        (Preprocessing, "image_size", 0, "image_size is 0: it must be a whole number, 1 or more"),
        (Preprocessing, "image_size", 1.5, "image_size is 1.5: it must be a whole number"),
        (Preprocessing, "std", (1, 0, 1), "it must be three numbers above 0, of R, G and B"),
        (TrainingMode, "dropout", 1.5, "dropout is 1.5: it must be 0 or more, at most 1"),
        (TrainingMode, "remat", 1, "remat is 1: it must be True or False"),
        (TrainingMode, "frozen_stages", 8, "it must be a whole number, -1 or more, at most 7"),
        (TrainingMode, "bn_group_size", "devise", "'device' (each device's share of it) or a num"),
        (Backbone, "depth", 0, "depth is 0: it must be above 0"),
        (Head, "num_classes", 0, "num_classes is 0: it must be a whole number, 1 or more"),
        (Head, "hidden", (64, 0), "hidden is (64, 0): it must be whole numbers, 1 or more, such"),
        (Head, "hidden", 64, "hidden is 64: it must be whole numbers"),
        (settings.Run, "seed", -1, "it must be a whole number, 0 or more, at most 4294967295"),
        (settings.Optimizer, "lr_multipliers", (("(", 1.0),), "it must be pairs of (regular"),
        (settings.Schedule, "milestones", ("3",), "it must be numbers of epochs"),
        (settings.Schedule, "name", "polly", "name is 'polly': did you mean 'poly'?"),
    ],
)
def test_faults_name_the_field_and_its_values(cls, name, value, fault):
    (found,) = spec.faults(cls, {name: value})
    assert fault in found
    (found,) = spec.faults(cls, {name: value}, "section")
    assert found.startswith(f"section.{name} is {value!r}: ")


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (Backbone, {"width": 1, "strides": [1] * 8, "bn_epsilon": 1e-3}),
        (TrainingMode, {"dropout": 1, "bn_group_size": "device", "frozen_stages": 7}),
        (TrainingMode, {"dropout": 0, "bn_group_size": 32, "frozen_stages": -1}),
        (Head, {"num_classes": None, "hidden": [256, 1]}),
        (settings.Run, {"seed": 2**32 - 1, "profile": None}),
        (settings.Optimizer, {"lr_multipliers": [["classifier", 2]], "clip_norm": None}),
        (settings.Schedule, {"milestones": [], "warmup_steps": 0}),
    ],
)
def test_possible_values_have_no_fault(cls, values):
    assert spec.faults(cls, values) == []


def test_every_fault_is_listed():
    faults = spec.faults(Backbone, {"width": -1, "padding": "torch", "bn_epsilon": 0})
    assert [fault.split()[0] for fault in faults] == ["width", "bn_epsilon"]


def test_strides_of_the_backbone_are_those_of_table_2():
    assert Backbone().strides == (2, *(stage.stride for stage in mobilenet_v2.STAGES))


@pytest.mark.parametrize(
    "values",
    [
        Backbone(width=0.5, strides=(1,) * 8),
        Preprocessing(image_size=96),
        TrainingMode(bn_group_size="device"),
        Head(10, hidden=(64, 32)),
    ],
    ids=lambda values: type(values).__name__,
)
def test_json_form_round_trips(values):
    stored = json.loads(json.dumps(spec.to_json(values)))
    assert spec.from_json(type(values), stored | {"of a later version": 1}) == values
    assert spec.from_json(type(values), {}) == type(values)()


def test_values_of_a_model_are_named_as_in_a_config():
    model = ModelSpec("classification", Backbone(width=0.5), Head(7), Preprocessing())
    values = model.values()
    assert values["model.width"] == 0.5
    assert values["model.num_classes"] == 7
    assert values["data.image_size"] == 224
    assert spec.KEPT == ("dropout", "bn_momentum", "folded_norm", "quantize")
    assert "model.dropout" in values and "model.remat" not in values
    changed = model.replace({"model.width": 1.0, "data.image_size": 96, "model.dropout": 0.2})
    assert changed == ModelSpec(
        "classification",
        Backbone(),
        Head(7),
        Preprocessing(image_size=96),
        TrainingMode(dropout=0.2),
    )
    features = dataclasses.replace(model, head=None)
    assert "model.num_classes" not in features.values()
    assert features.replace({"model.num_classes": 3}) == features


def test_inherited_fields_are_those_of_a_checkpoint():
    inherited = spec.inherited()
    assert set(inherited) == {
        *(f"model.{f.name}" for f in dataclasses.fields(Backbone)),
        *(f"data.{f.name}" for f in dataclasses.fields(Preprocessing)),
        *(f"model.{name}" for name in spec.KEPT),
    }
    assert set(spec.inherited(Head)) - set(inherited) == {"model.hidden"}
    conventions = {name for name, field in inherited.items() if field.metadata["convention"]}
    assert conventions == {
        "model.width",
        "model.depth",
        "model.fixed_ends",
        "model.divisor",
        "model.last_convolution",
        "model.padding",
        "model.bn_epsilon",
        "model.bn_momentum",
        "model.folded_norm",
        "data.mean",
        "data.std",
    }
