"""timm's config.json beside the weights; tests/parity/convert/test_hub_folders.py has live ones."""

import json
import pathlib
from typing import Any

import pytest

from mbv2_jax.convert import timm_config
from mbv2_jax.errors import UserError

# In the form that timm.models.push_to_hf_hub gave its repositories.
CONFIG: dict[str, Any] = {
    "architecture": "mobilenetv2_100",
    "num_classes": 1000,
    "num_features": 1280,
    "pretrained_cfg": {
        "tag": "ra_in1k",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 1000,
        "pool_size": [7, 7],
        "first_conv": "conv_stem",
        "classifier": "classifier",
    },
}
IMAGENET = {
    "model.padding": "torch",
    "model.bn_epsilon": 1e-5,
    "data.image_size": 224,
    "data.eval_transforms": "resize_edge(256, interpolation='bicubic')|center_crop(size)",
    "data.mean": (123.675, 116.28, 103.53),
    "data.std": (58.395, 57.12, 57.375),
}


def read(folder: pathlib.Path, config: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    content = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(content)
    return timm_config.read(folder / "model.safetensors")


def test_a_published_config(tmp_path):
    assert read(tmp_path, CONFIG) == (IMAGENET, ())


def test_nothing_is_known_without_a_config_of_timm(tmp_path):
    assert timm_config.read(tmp_path / "model.safetensors") == ({}, ())
    assert read(tmp_path, {"architectures": ["MobileNetV2ForImageClassification"]}) == ({}, ())


def test_the_older_form_is_one_object(tmp_path):
    older = {"architecture": "mobilenetv2_100", **CONFIG["pretrained_cfg"], "labels": ["cat"]}
    assert read(tmp_path, older) == (IMAGENET, ("cat",))


def test_what_is_missing_is_timms_default(tmp_path):
    assert read(tmp_path, {"architecture": "mobilenetv2_100"}) == (IMAGENET, ())


def test_names_in_the_order_of_their_numbers(tmp_path):
    labels = {"10": "k", **{str(i): chr(97 + i) for i in range(10)}}  # 10 comes after 9
    assert read(tmp_path, CONFIG | {"label_names": labels})[1] == tuple("abcdefghijk")


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("pretrained_cfg", "input_size", [1, 224, 224]),
        ("pretrained_cfg", "input_size", [3, 0, 0]),
        ("pretrained_cfg", "input_size", 224),
        ("pretrained_cfg", "input_size", [3, 10**400, 10**400]),
        ("pretrained_cfg", "crop_pct", 1e-300),
        ("pretrained_cfg", "crop_pct", "0.9"),
        ("pretrained_cfg", "interpolation", ["bicubic"]),
        ("pretrained_cfg", "mean", [0.5]),
        ("pretrained_cfg", "mean", [0.5, 0.5, 10**400]),
        ("pretrained_cfg", "std", [0.5, 0.5, None]),
        ("model_args", "act_layer", "silu"),
        ("model_args", "bn_eps", "1e-3"),
        ("model_args", "pad_type", "valid"),
        ("model_args", "from_the_future", True),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, where, key, value):
    config = CONFIG | {where: dict(CONFIG.get(where, {})) | {key: value}}
    with pytest.raises(UserError) as caught:
        read(tmp_path, config)
    assert f"config.json has {key} {value!r}, which is not supported" in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        "[" * 100_000,
        "[]",
        "{",
        '{"architecture": 1, "pretrained_cfg": []}',
        '{"architecture": 1, "model_args": "none"}',
        '{"architecture": 1, "label_names": {"a": "cat"}}',
        '{"architecture": 1, "label_names": 3}',
        '{"architecture": 1, "label_names": [[]], "label_descriptions": {"a": "b"}}',
        '{"architecture": 1, "label_names": ["a"], "label_descriptions": ["b"]}',
        " " * (16 << 20) + "{}",
    ],
    ids=lambda config: config[:60].strip(),
)
def test_damaged_files_are_refused(tmp_path, config):
    with pytest.raises(UserError, match=r"config\.json") as caught:
        read(tmp_path, config)
    assert "\n" not in str(caught.value)
