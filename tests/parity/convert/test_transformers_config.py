"""The config files of transformers are read, and its defaults are ours."""

import pathlib
from typing import Any

import pytest

from mbv2_jax.convert import transformers_config
from tests.support import peers


def read(folder: pathlib.Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    return transformers_config.read(folder / "model.safetensors")


def test_files_of_transformers_are_read(tmp_path):
    transformers = peers.transformers()
    config = transformers.MobileNetV2Config(
        image_size=160,
        tf_padding=False,
        layer_norm_eps=1e-5,
        output_stride=16,
        classifier_dropout_prob=0.1,
        id2label={i: f"class {i}" for i in range(12)},
    )
    config.save_pretrained(tmp_path)
    fields, names = read(tmp_path)
    assert names == tuple(f"class {i}" for i in range(12))  # 10 comes after 9, not after 1
    assert fields == {
        "model.padding": "torch",
        "model.bn_epsilon": 1e-5,
        "model.output_stride": 16,
        "model.dropout": 0.1,
        "data.image_size": 160,
        "data.eval_transforms": "resize_edge(192)|center_crop(size)",
    }
    processor = transformers.MobileNetV2ImageProcessor(
        size={"shortest_edge": 200},
        crop_size={"height": 176, "width": 176},
        resample=3,
        image_mean=[0.2, 0.4, 0.6],
        image_std=[0.5, 0.5, 0.25],
    )
    processor.save_pretrained(tmp_path)
    fields, _ = read(tmp_path)
    assert fields["data.image_size"] == 176
    assert (
        fields["data.eval_transforms"]
        == "resize_edge(200, interpolation='bicubic')|center_crop(size)"
    )
    assert fields["data.mean"] == pytest.approx((51, 102, 153))
    assert fields["data.std"] == pytest.approx((127.5, 127.5, 63.75))


def test_the_defaults_are_those_of_its_classes(tmp_path):
    transformers = peers.transformers()
    default, processor = transformers.MobileNetV2Config(), transformers.MobileNetV2ImageProcessor()
    (tmp_path / "config.json").write_text("{}")
    fields, names = read(tmp_path)
    assert names == ()
    assert fields["model.padding"] == ("same" if default.tf_padding else "torch")
    assert fields["model.bn_epsilon"] == default.layer_norm_eps
    assert fields["model.output_stride"] == default.output_stride
    assert default.classifier_dropout_prob == 0.8  # TF-slim's share of the features that are kept:
    assert "model.dropout" not in fields  # the layout's convention stands
    assert fields["data.image_size"] == default.image_size == processor.crop_size["height"]
    edge = processor.size["shortest_edge"]
    assert fields["data.eval_transforms"] == f"resize_edge({edge})|center_crop(size)"
    assert processor.resample == 2  # bilinear
