"""The fields of a config: each is declared once, has a default, and is explained."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from mbv2_jax.command_line import flatten
from mbv2_jax.spec import Backbone, Preprocessing, TrainingMode
from mbv2_jax.tasks.classification.settings import Head, Settings
from mbv2_jax.training import settings

DECLARED = settings.declared("classification")


def test_no_two_declarations_share_a_name():
    declarations = [settings.Run, Settings, Head, Backbone, TrainingMode, Preprocessing]
    declarations += settings.SECTIONS.values()
    assert len(DECLARED) == sum(len(dataclasses.fields(cls)) for cls in declarations)


def test_config_of_defaults_has_every_field_and_is_locked():
    config = settings.make_config("classification")
    values = flatten(config.to_dict())
    assert values.keys() == DECLARED.keys()
    for name, field in DECLARED.items():
        assert values[name] == (None if field.metadata["inherited"] else field.default), name
    with pytest.raises(AttributeError, match="widht"):
        config.model.widht = 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", "many"),
        ("model.width", "wide"),
        ("model.strides", 2),
        ("model.num_classes", 2.5),
        ("optimizer.clip_norm", "short"),
        ("schedule.warmup_steps", "three"),
    ],
)
def test_fields_keep_their_types(name, value):
    config = settings.make_config("classification")
    with pytest.raises(TypeError, match=name.rpartition(".")[2]):
        config.update_from_flattened_dict({name: value})


@pytest.mark.parametrize("value", [0, 32, "device"])
def test_field_of_several_types_takes_each(value):
    config = settings.make_config("classification")
    config.model.bn_group_size = value
    assert config.model.bn_group_size == value


def test_explanation_lists_every_field_with_default_and_meaning():
    lines = settings.explain("classification").splitlines()
    named = [line.strip() for line in lines if line.startswith("  ") and line[2] != " "]
    assert named == list(DECLARED)
    text = " " + " ".join(" ".join(lines).split())
    for name, field in DECLARED.items():
        meaning = " ".join(field.metadata["help"].split())
        start = text.index(f" {name} {meaning} (default: ")
        default = text[start:].partition("(default: ")[2]
        inherited = "the checkpoint's, or " if field.metadata["inherited"] else ""
        shown = f"{field.default}" if inherited else repr(field.default)
        assert default.startswith(f"{inherited}{shown})"), name
    assert max(map(len, lines)) <= 100


def test_configs_are_plain_data():
    config = settings.make_config("classification")
    for value in flatten(config.to_dict()).values():
        assert value is None or isinstance(value, (bool, int, float, str, tuple))
    assert isinstance(config, ConfigDict)
