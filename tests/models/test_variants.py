"""The registry holds the paper's grid and imports no jax."""

import dataclasses
import subprocess
import sys

import pytest

from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.models.profile import profile
from mbv2_jax.models.variants import VARIANTS


def test_the_papers_grid_is_complete():
    grid = {
        f"mobilenet_v2_{width}_{size}"
        for width in ("0.35", "0.5", "0.75", "1.0")
        for size in (96, 128, 160, 192, 224)
    }
    ports = {f"mobilenet_v2_{width}_224" for width in ("0.25", "1.3", "1.4")}
    deeper = {"mobilenet_v2_110d", "mobilenet_v2_120d"}
    assert set(VARIANTS) == grid | ports | deeper


def test_the_published_model():
    variant = VARIANTS["mobilenet_v2_1.0_224"]
    assert (variant.backbone.width, variant.preprocessing.image_size) == (1.0, 224)
    assert variant.preprocessing.eval_transforms == "resize_edge(256)|center_crop(224)"
    assert variant.preprocessing.mean == (123.675, 116.28, 103.53)
    assert variant.preprocessing.std == (58.395, 57.12, 57.375)


@pytest.mark.parametrize(
    ("size", "edge"), [(96, 109), (128, 146), (160, 182), (192, 219), (224, 256)]
)
def test_evaluation_keeps_seven_eighths(size, edge):
    # d-li14's mobilenetv2.pytorch (imagenet.py) resizes to int(size / 0.875), timm likewise.
    variant = VARIANTS[f"mobilenet_v2_0.5_{size}"]
    assert variant.preprocessing.eval_transforms == f"resize_edge({edge})|center_crop({size})"


def test_a_variant_makes_its_network():
    variant = VARIANTS["mobilenet_v2_0.35_96"]
    model = MobileNetV2(**dataclasses.asdict(variant.backbone))
    assert (model.width, model.padding, model.bn_epsilon) == (0.35, "torch", 1e-5)
    assert profile(model, variant.preprocessing.image_size).params == 1_677_128


@pytest.mark.parametrize(
    ("name", "parameters"), [("mobilenet_v2_110d", 4_516_520), ("mobilenet_v2_120d", 5_831_144)]
)
def test_the_deeper_variants_are_timms(name, parameters):
    # The counts are timm's, whose blocks are compared in tests/parity/models/test_depth.py.
    variant = VARIANTS[name]
    model = MobileNetV2(**dataclasses.asdict(variant.backbone))
    assert profile(model, variant.preprocessing.image_size).params == parameters
    # crop_pct 0.875 and bicubic interpolation, as in timm's default_cfg
    assert variant.preprocessing.eval_transforms == (
        "resize_edge(256, interpolation='bicubic')|center_crop(224)"
    )


def test_variants_need_no_jax():
    code = "import sys, mbv2_jax.models.variants; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
