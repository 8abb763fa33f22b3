"""A config, checked and resolved: what the config, a checkpoint or the data decides."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from ml_collections import ConfigDict

from mbv2_jax import command_line
from mbv2_jax.command_line import flatten
from mbv2_jax.configs import default
from mbv2_jax.errors import UserError
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.spec import Backbone, Preprocessing, TrainingMode
from mbv2_jax.tasks.classification.settings import Head, Settings
from mbv2_jax.tasks.classification.task import Classification
from mbv2_jax.tasks.segmentation import settings as segmentation
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import settings as settings_lib
from mbv2_jax.training.checkpoint import differences
from tests.support import tiny_model

RECIPES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).resolve().parents[2] / "configs").glob("*.py")
    if path.stem not in ("__init__", "default")
)
TINY = SavedModel({}, {}, tiny_model.DESCRIPTION, pathlib.Path("tiny"))


def make(**fields: Any) -> ConfigDict:
    """Returns the config of defaults with some fields changed; `__` stands for a dot."""
    config = default.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_resolved_config_round_trips(name):
    settings = config_lib.read(command_line.load_config(name))
    spec, task = config_lib.resolve(settings, None)
    stored = json.loads(json.dumps(settings.to_dict(spec)))  # as config.json

    again = default.get_config(settings.run.task)
    again.update_from_flattened_dict(
        {key: tuple(v) if isinstance(v, list) else v for key, v in flatten(stored).items()}
    )
    settings_again = config_lib.read(again)
    assert settings_again == settings
    assert config_lib.resolve(settings_again, None) == (spec, task)
    assert json.loads(json.dumps(settings_again.to_dict(spec))) == stored
    assert differences(stored, settings.to_dict(spec)) == []
    # A run that is continued takes the unset fields from there.
    assert config_lib.resolve(settings, None, previous=stored) == (spec, task)


def test_sections_become_frozen_settings():
    settings = config_lib.read(make(batch_size=8, schedule__name="poly", data__workers=2))
    assert settings.run == settings_lib.Run(batch_size=8)
    assert settings.schedule == settings_lib.Schedule(name="poly")
    assert settings.data == settings_lib.Data(workers=2)
    assert settings.checkpoint.best_metric == "top1"  # the task's
    assert settings.task is Classification
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.run.batch_size = 16  # type: ignore[misc] # that is the test


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "clasification"}, "task is 'clasification': did you mean 'classification'?"),
        ({"task": "no.module:X"}, "task is 'no.module:X', which cannot be imported"),
        ({"batch_size": 0}, "batch_size is 0: it must be a whole number, 1 or more"),
        ({"model__width": -1.0}, "model.width is -1.0: it must be above 0"),
        ({"model__padding": "SAME"}, "model.padding is 'SAME': known are 'torch', 'same'"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5: it must be 0 or more, at most 1"),
        ({"schedule__warmup_steps": -1}, "schedule.warmup_steps is -1: it must be a whole number"),
        ({"schedule__power": 0.0}, "schedule.power is 0.0: it must be above 0"),
        ({"checkpoint__best_metric": "top2"}, "checkpoint.best_metric is 'top2': did you mean"),
        (
            {"checkpoint__patience": 3, "checkpoint__keep_best": 0},
            "checkpoint.patience needs the best checkpoint",
        ),
        ({"model__dtype": "float64"}, "model.dtype is 'float64': set JAX_ENABLE_X64=1"),
        ({"profile": "9:3"}, "profile is '9:3': it must be FIRST:LAST"),
        ({"compilation_cache": "s3://x"}, "compilation_cache=s3://x: give a folder on a disk, or"),
        ({"model__bn_group_size": 7}, "batch_size 256 does not divide into groups of model.bn_g"),
        ({"model__bn_group_size": 512}, "model.bn_group_size 512 is more than batch_size 256"),
    ],
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(UserError) as refused:
        config_lib.read(make(**fields))
    assert message in str(refused.value)


def test_config_then_previous_run_then_checkpoint_then_default_decide():
    config = make(model__num_classes=6, model__bn_momentum=0.9, data__image_size=64)
    settings = config_lib.read(config)
    previous = {"data": {"image_size": 48, "eval_transforms": "resize(size)"}}
    spec, task = config_lib.resolve(settings, None, TINY, previous)
    assert spec.backbone == Backbone(width=0.1)
    assert spec.head == Head(6)
    assert spec.preprocessing == Preprocessing(64, "resize(size)", tiny_model.MEAN, tiny_model.STD)
    assert spec.mode == TrainingMode(dropout=0.2)
    assert task == Classification(Head(6), (), Settings())
    spec, _ = config_lib.resolve(settings, None)
    assert spec.backbone == Backbone()
    assert spec.preprocessing == Preprocessing(image_size=64)


def test_conventions_of_a_checkpoint_are_not_changed():
    settings = config_lib.read(make(model__width=0.5, data__mean=(1.0, 2.0, 3.0)))
    with pytest.raises(UserError) as refused:
        config_lib.resolve(settings, None, TINY)
    message = str(refused.value)
    assert "model.width is 0.5, the checkpoint's is 0.1" in message
    assert (
        "To use it: --config.model.width=0.1 --config.data.mean='(120.0, 110.0, 100.0)'" in message
    )
    # Its other fields may change.
    settings = config_lib.read(make(model__dropout=0.5, data__image_size=96))
    spec, _ = config_lib.resolve(settings, None, TINY)
    assert (spec.mode.dropout, spec.preprocessing.image_size) == (0.5, 96)


def test_hidden_layers_are_the_checkpoints_unless_given():
    spec = dataclasses.replace(tiny_model.SPEC, head=Head(6, hidden=(8,)))
    description = dataclasses.replace(tiny_model.DESCRIPTION, spec=spec)
    saved = dataclasses.replace(TINY, description=description)
    for given, found in ((None, (8,)), ((), ()), ((4, 2), (4, 2))):
        settings = config_lib.read(make(model__num_classes=3, model__hidden=given))
        assert config_lib.resolve(settings, None, saved)[0].head == Head(3, hidden=found)
        assert config_lib.resolve(settings, None)[0].head == Head(3, hidden=given or ())
    # Those of another task's model mean something else.
    other = dataclasses.replace(spec, task="another")
    saved = dataclasses.replace(TINY, description=dataclasses.replace(description, spec=other))
    settings = config_lib.read(make(model__num_classes=3))
    assert config_lib.resolve(settings, None, saved)[0].head == Head(3)


def test_group_size_of_a_device_is_its_share_of_the_batch():
    mode = TrainingMode(bn_group_size="device")
    assert config_lib.on_devices(mode, 32, 4) == TrainingMode(bn_group_size=8)
    assert config_lib.on_devices(TrainingMode(bn_group_size=16), 32, 4).bn_group_size == 16


def test_saved_model_is_evaluated_as_it_was_trained_unless_overridden(capsys):
    settings = config_lib.read(
        make(model__width=1.0, data__image_size=224, model__dtype="bfloat16")
    )
    spec = config_lib.evaluated_spec(settings, TINY, {})
    assert spec == tiny_model.SPEC.replace({"model.dtype": "bfloat16"})
    assert capsys.readouterr().err == ""
    spec = config_lib.evaluated_spec(settings, TINY, {"data.image_size": 64})
    assert spec.preprocessing.image_size == 64
    assert "data.image_size: 64 instead of the checkpoint's 32" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"model\.width is 0\.5, but tiny was trained with 0\.1"):
        config_lib.evaluated_spec(settings, TINY, {"model.width": 0.5})
    for name, value in (("depth", 1.2), ("fixed_ends", True), ("last_convolution", False)):
        with pytest.raises(UserError, match=rf"model\.{name} is {value}, but tiny was trained"):
            config_lib.evaluated_spec(settings, TINY, {f"model.{name}": value})
    with pytest.raises(UserError, match=r"model\.hidden is \(8,\), but tiny was trained with \(\)"):
        config_lib.evaluated_spec(settings, TINY, {"model.hidden": (8,)})
    with pytest.raises(UserError, match=r"num_classes is 7, but tiny was trained with 6"):
        config_lib.evaluated_spec(settings, TINY, {"model.num_classes": 7})


def test_a_field_of_a_head_that_leaves_the_arrays_alone_can_be_overridden(capsys):
    head = segmentation.Head(6, aspp_rates=(6,))
    spec = dataclasses.replace(tiny_model.SPEC, task="segmentation", head=head)
    description = dataclasses.replace(tiny_model.DESCRIPTION, spec=spec)
    saved = dataclasses.replace(TINY, description=description)
    settings = config_lib.read(default.get_config("segmentation"))
    found = config_lib.evaluated_spec(settings, saved, {"model.align_corners": False})
    assert found.head == dataclasses.replace(head, align_corners=False)
    err = capsys.readouterr().err
    assert "model.align_corners: False instead of the checkpoint's True" in err
    with pytest.raises(UserError, match=r"aspp_rates is \(\), but tiny was trained with \(6,\)"):
        config_lib.evaluated_spec(settings, saved, {"model.aspp_rates": ()})


def test_fields_that_an_old_config_lacks_count_as_their_defaults():
    new = config_lib.read(make(model__num_classes=6)).to_dict(tiny_model.SPEC)
    old = json.loads(json.dumps(new))
    del old["task"], old["schedule"]["power"], old["schedule"]["warmup_steps"]
    del old["model"]["output_stride"], old["optimizer"]["lr_multipliers"]
    assert differences(old, new) == []
    new["schedule"] |= {"power": 2.0, "base_lr": 0.1}
    new["optimizer"]["lr_multipliers"] = (("classifier", 2.0),)
    assert differences(old, new) == [
        "optimizer.lr_multipliers: [] -> [['classifier', 2.0]]",
        "schedule.base_lr: 0.045 -> 0.1",
        "schedule.power: 0.9 -> 2.0",
    ]
    # A field that only the old config has was removed since.
    old["removed"] = 3
    assert "removed: 3 -> None" in differences(old, new)
