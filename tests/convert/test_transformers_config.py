"""The JSON files that transformers keeps beside its weights are read."""

import json
import pathlib
import re
from typing import Any

import pytest

from mbv2_jax.convert import transformers_config
from mbv2_jax.errors import UserError


def read(folder: pathlib.Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    return transformers_config.read(folder / "model.safetensors")


def test_without_config_nothing_is_known(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 99}}')
    assert read(tmp_path) == ({}, ())


@pytest.mark.parametrize("size", [160, [160, 160]])
def test_older_forms_of_sizes_are_read(tmp_path, size):
    (tmp_path / "config.json").write_text(json.dumps({"image_size": size}))
    assert read(tmp_path)[0]["data.image_size"] == 160
    old = {"size": 180, "crop_size": 144}  # as the feature extractors of 2022 wrote them
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    fields, _ = read(tmp_path)
    assert fields["data.image_size"] == 144
    assert fields["data.eval_transforms"] == "resize_edge(180)|center_crop(size)"


def test_unsupported_processors_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text('{"do_center_crop": false}')
    with pytest.raises(UserError, match="do_center_crop false"):
        read(tmp_path)
    for resample in ("1", "[3]"):
        processor = f'{{"resample": {resample}}}'
        (tmp_path / "preprocessor_config.json").write_text(processor)
        with pytest.raises(UserError, match=f"resample {re.escape(resample)}"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("size", {"longest_edge": 256}, "not a square"),
        ("image_mean", [10**400, 0, 0], "must be numbers"),
        ("image_std", 0.5, "must be numbers"),
        ("rescale_factor", 0, "must be numbers"),
    ],
)
def test_values_of_another_form_are_refused(tmp_path, key, value, named):
    (tmp_path / "config.json").write_text("{}")
    processor = {"image_mean": [0.5, 0.5, 0.5]} | {key: value}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(UserError, match=named):
        read(tmp_path)


def test_another_scale_and_an_exact_size_are_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    processor = {
        "size": {"height": 224, "width": 224},
        "rescale_factor": 1 / 127.5,
        "image_mean": [1.0, 1.0, 1.0],
        "image_std": [1.0, 1.0, 1.0],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    fields, _ = read(tmp_path)
    assert fields["data.eval_transforms"] == "resize(224)|center_crop(size)"
    assert fields["data.mean"] == fields["data.std"] == pytest.approx((127.5, 127.5, 127.5))


def test_names_of_another_form_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"id2label": {"a": "cat"}}')
    with pytest.raises(UserError, match="id2label"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"output_stride": 4}, "output_stride is 4; the network here has 32 or 16 or 8"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"image_size": [160, 96]}, "square"),
        ({"image_size": [[160], [160]]}, "square"),
    ],
)
def test_another_network_is_refused(tmp_path, config, named):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=named):
        read(tmp_path)


def test_files_without_a_json_object_are_refused(tmp_path):
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json"):
            read(tmp_path)
