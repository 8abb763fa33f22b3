"""Sizes against the published ones (the paper's tables, mmpretrain's page), exactly."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from mbv2_jax.models.layers import Conv, ConvNorm
from mbv2_jax.models.mobilenet_v2 import Backbone, MobileNetV2
from mbv2_jax.models.profile import profile, table

# Width multiplier, resolution, parameters with 1000 classes, multiply-adds.
SIZES = [
    (0.25, 224, 1_519_112, 37_201_312),
    (0.35, 224, 1_677_128, 59_285_808),
    (0.5, 224, 1_968_680, 97_131_840),
    (0.75, 224, 2_636_424, 209_069_792),
    (1.0, 224, 3_504_872, 300_774_272),
    (1.3, 224, 5_386_792, 509_374_560),
    (1.4, 224, 6_108_776, 582_195_824),
    (1.0, 192, 3_504_872, 221_316_608),
    (1.0, 160, 3_504_872, 154_083_200),
    (1.0, 128, 3_504_872, 99_074_048),
    (1.0, 96, 3_504_872, 56_289_152),
]


@pytest.mark.parametrize(("width", "image_size", "params", "multiply_adds"), SIZES)
def test_sizes_of_the_grid(width, image_size, params, multiply_adds):
    model = MobileNetV2(width=width)
    measured = profile(model, image_size)
    assert (measured.params, measured.multiply_adds) == (params, multiply_adds)
    assert sum(row.params for row in measured.rows) == params
    assert sum(row.multiply_adds for row in measured.rows) == multiply_adds
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == params


def test_the_pages_count():
    # https://mmpretrain.readthedocs.io: MobileNet V2, 3.50 M parameters, 0.319 GFLOPs.
    page_count = profile(MobileNetV2(), 224).page_count
    assert f"{page_count / 1e9:.3f}" == "0.319"
    assert round(page_count / 1e6, 2) == 319.02


def test_rows_by_hand():
    rows = {row.name: row for row in profile(MobileNetV2(), 224).rows}
    assert len(rows) == 53  # 52 convolutions and the classifier
    stem = rows["stem"]
    assert stem.output_shape == (112, 112, 32)
    assert stem.params == 3 * 3 * 3 * 32 + 2 * 32
    assert stem.multiply_adds == 112 * 112 * 32 * 3 * 3 * 3
    depthwise = rows["layer2_0/depthwise"]
    assert depthwise.output_shape == (56, 56, 96)
    assert depthwise.params == 3 * 3 * 96 + 2 * 96
    assert depthwise.multiply_adds == 56 * 56 * 96 * 3 * 3
    classifier = rows["classifier"]
    assert classifier.output_shape == (1000,)
    assert classifier.params == 1280 * 1000 + 1000
    assert classifier.multiply_adds == 1280 * 1000


def test_strides_classes_and_features_only():
    whole = profile(MobileNetV2(num_classes=10, strides=(1, 1, 1, 2, 2, 1, 2, 1)), 32)
    features = profile(MobileNetV2(num_classes=None, strides=(1, 1, 1, 2, 2, 1, 2, 1)), 32)
    assert whole.rows[-2].output_shape == (4, 4, 1280)  # 32 over three strides of 2
    assert whole.params - features.params == 1280 * 10 + 10
    assert whole.multiply_adds - features.multiply_adds == 1280 * 10
    # The page's count has the pool, which only a classifier needs, and no classifier.
    assert whole.page_count - features.page_count == 4 * 4 * 1280


def test_hidden_layers_and_no_last_convolution():
    model = MobileNetV2(num_classes=10, hidden=(256, 64), last_convolution=False)
    rows = profile(model, 224).rows
    assert [row.name for row in rows[-4:]] == [
        "layer7_0/project",
        "hidden_0",
        "hidden_1",
        "classifier",
    ]
    assert [row.params for row in rows[-3:]] == [320 * 256 + 256, 256 * 64 + 64, 64 * 10 + 10]
    assert [row.multiply_adds for row in rows[-3:]] == [320 * 256, 256 * 64, 64 * 10]
    assert [row.output_shape for row in rows[-3:]] == [(256,), (64,), (10,)]


class Detector(nn.Module):
    """A network with a head of plain convolutions."""

    @nn.compact
    def __call__(self, x):
        backbone = Backbone(endpoints=("layer6_0/expand",))
        nn.share_scope(self, backbone)
        y = ConvNorm(24, kernel_size=3, name="tower")
        return Conv(4, bias=True, name="boxes")(y(backbone(x)["layer6_0/expand"], False))


def test_another_networks_head():
    rows = {row.name: row for row in profile(Detector(), 64).rows}
    assert rows["tower"].multiply_adds == 4 * 4 * 9 * 576 * 24
    assert rows["tower"].params == 9 * 576 * 24 + 2 * 24
    boxes = rows["boxes"]
    assert (boxes.output_shape, boxes.params) == ((4, 4, 4), 24 * 4 + 4)
    assert boxes.multiply_adds == 4 * 4 * 24 * 4
    assert list(rows)[-3:] == ["layer6_0/project", "tower", "boxes"]
    assert "last" not in rows


def test_table_is_aligned_and_complete():
    lines = table(profile(MobileNetV2(), 224)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["layer", "output", "parameters", "multiply-adds"]
    assert lines[2].split() == ["stem", "112", "x", "112", "x", "32", "928", "10,838,016"]
    assert lines[-1].split() == ["total", "3,504,872", "300,774,272"]
    assert len(lines) == 53 + 4  # layers; header, total, two rulers
