"""Converted files of the real peers give the same logits and the same feature map of each stage.

A network of the peer gets random weights and statistics, the peer saves it, the converter reads the
file, and both see the same images, in float64 (Keras: float32). This also compares the conventions
that files do not hold (padding, epsilon).
"""

import pathlib
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import torch

from mbv2_jax.convert import importer
from mbv2_jax.model_dir import SavedModel
from tests.support import peers
from tests.support.outputs import (
    SIZE,
    TOLERANCE,
    Outputs,
    assert_same,
    images,
    of_converted,
    of_torch,
)

CLASSES = 7
# Keras computes in float32, which rounds at 6e-8: measured, 9e-7.
KERAS_TOLERANCE = 1e-5

# Keras itself warns, on the torch backend.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras")


def convert(file: pathlib.Path, layout: str, width: float, **options: Any) -> SavedModel:
    """Converts a file, and asserts the layout and the width that were recognised."""
    saved = importer.load(file, **options).saved
    assert saved.description.origin["layout"] == layout
    assert saved.spec.backbone.width == width
    return saved


def torchvision(width: float) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    model = peers.torchvision().models.mobilenet_v2(width_mult=width, num_classes=CLASSES)
    peers.randomize(model, seed=0)
    return model, [model.features[i] for i in (1, 3, 6, 10, 13, 16, 17, 18)]


@pytest.mark.parametrize("width", [0.35, 0.5, 1.0, 1.4])
def test_torchvision(width, tmp_path):
    model, ends = torchvision(width)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    saved = convert(tmp_path / "model.pth", "torchvision", width)
    assert_same(of_converted(saved, images()), of_torch(model, ends, images()))


def test_channels_that_are_multiples_of_4(tmp_path):
    model = peers.torchvision().models.mobilenet_v2(
        width_mult=0.1, num_classes=CLASSES, round_nearest=4
    )
    peers.randomize(model, seed=8)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    saved = convert(tmp_path / "model.pth", "torchvision", 0.1)
    assert saved.spec.backbone.divisor == 4
    ends = [model.features[i] for i in (1, 3, 6, 10, 13, 16, 17, 18)]
    assert_same(of_converted(saved, images()), of_torch(model, ends, images()))


TIMM = {  # its name -> width and depth
    "mobilenetv2_035": (0.35, 1.0),
    "mobilenetv2_050": (0.5, 1.0),
    "mobilenetv2_075": (0.75, 1.0),
    "mobilenetv2_100": (1.0, 1.0),
    "mobilenetv2_110d": (1.1, 1.2),
    "mobilenetv2_120d": (1.2, 1.4),
    "mobilenetv2_140": (1.4, 1.0),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name, tmp_path):
    model = peers.timm().create_model(name, num_classes=CLASSES)
    peers.randomize(model, seed=1)
    peers.timm().models.save_for_hf(model, tmp_path, safe_serialization=True)
    width, depth = TIMM[name]
    saved = convert(tmp_path / "model.safetensors", "timm", width)
    assert saved.spec.backbone.depth == depth
    ends = [*model.blocks, model.bn2]  # the activation is in the norm
    assert_same(of_converted(saved, images()), of_torch(model, ends, images()))


def test_every_mobilenetv2_of_timm_is_tried():
    assert set(peers.timm().list_models("mobilenetv2_*")) == set(TIMM)


def mmpretrain() -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    model = peers.mmpretrain().models.ImageClassifier(
        backbone={"type": "MobileNetV2"},
        neck={"type": "GlobalAveragePooling"},
        head={"type": "LinearClsHead", "num_classes": CLASSES, "in_channels": 1280},
    )
    peers.randomize(model, seed=2)
    return model, [getattr(model.backbone, name) for name in model.backbone.layers]


def test_mmpretrain(tmp_path):
    """The file is written as by mmengine's runner."""
    from mmengine.runner import checkpoint

    model, ends = mmpretrain()
    names = [f"class {i}" for i in range(CLASSES)]
    content = {
        "meta": {"dataset_meta": {"classes": names}},
        "state_dict": checkpoint.weights_to_cpu(checkpoint.get_state_dict(model)),
    }
    checkpoint.save_checkpoint(content, str(tmp_path / "epoch_300.pth"))
    saved = convert(tmp_path / "epoch_300.pth", "mmpretrain", 1.0)
    assert saved.classes == tuple(names)
    model.forward = partial(model.forward, mode="tensor")
    assert_same(of_converted(saved, images()), of_torch(model, ends, images()))


def test_mmcls(tmp_path):
    """The file is written as by mmcls 0.x on many devices, with torch before 1.6."""
    model, ends = mmpretrain()
    names = [f"class {i}" for i in range(CLASSES)]
    torch.save(
        {
            "meta": {"CLASSES": names},
            "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        },
        tmp_path / "latest.pth",
        _use_new_zipfile_serialization=False,
    )
    saved = convert(tmp_path / "latest.pth", "mmpretrain", 1.0)
    assert saved.classes == tuple(names)
    model.forward = partial(model.forward, mode="tensor")
    assert_same(of_converted(saved, images()), of_torch(model, ends, images()))


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_backbone_alone(prefix, tmp_path):
    """A file without classifier gives a model of features only."""
    model = peers.mmpretrain().models.MobileNetV2(widen_factor=0.5, out_indices=range(8))
    peers.randomize(model, seed=3)
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "backbone.pth")
    saved = convert(tmp_path / "backbone.pth", "mmpretrain", 0.5)
    assert saved.features_only
    ends = [getattr(model, name) for name in model.layers]
    assert_same(of_converted(saved, images()), of_torch(model, ends, images()))


@pytest.mark.parametrize(
    ("layout", "last"), [("tonylins", "features.18"), ("d-li14", "conv")], ids=lambda v: v
)
def test_flat_blocks(layout, last, tmp_path):
    """A network of torchvision is saved under the names of ports that don't install as packages.

    A block of theirs is one flat list (convolution, norm, activation, convolution, ...).
    """
    model, ends = torchvision(1.0)
    places = ["features.0.0", "features.0.1"]
    for block in range(1, 18):
        convs = 2 if block == 1 else 3
        places += [f"features.{block}.conv.{3 * i + j}" for i in range(convs) for j in (0, 1)]
    places += [f"{last}.0", f"{last}.1"]
    values = list(model.state_dict().values())
    weights: dict[str, torch.Tensor] = {}
    for conv, norm in zip(places[::2], places[1::2], strict=True):
        weights[f"{conv}.weight"] = values.pop(0)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            weights[f"{norm}.{name}"] = values.pop(0)
    weights["classifier.weight"], weights["classifier.bias"] = values
    torch.save(
        {"epoch": 150, "state_dict": {f"module.{name}": value for name, value in weights.items()}},
        tmp_path / "checkpoint.pth.tar",
    )
    saved = convert(tmp_path / "checkpoint.pth.tar", layout, 1.0)
    assert_same(of_converted(saved, images()), of_torch(model, ends, images()))


# TensorFlow's padding depends on whether a map's side is even. Of 96 pixels the sides are 48, 24,
# 12, 6, 3; of 97: 49, 25, 13, 7, 4; of 75: 38, 19, 10, 5, 3.
TENSORFLOW = [(0.35, 97), (1.0, 96), (1.4, 75)]


def keras_model(width: float, size: int, seed: int, **options: Any) -> Any:
    """Returns Keras's network with random float32 weights."""
    model = peers.keras().applications.MobileNetV2(
        input_shape=(size, size, 3), alpha=width, weights=None, **options
    )
    generator = np.random.default_rng(seed)
    values = []
    for variable in model.weights:
        shape = tuple(variable.shape)
        if len(shape) == 4:  # variance-preserving
            fan_in = shape[0] * shape[1] * (1 if "depthwise" in variable.name else shape[2])
            value = generator.standard_normal(shape) * np.sqrt(2 / fan_in)
        elif variable.name in ("gamma", "moving_variance"):
            value = generator.uniform(0.5, 1.5, shape)
        else:
            value = generator.uniform(-0.5, 0.5, shape)
        values.append(value.astype(np.float32))
    model.set_weights(values)
    return model


def of_keras(model: Any, x: np.ndarray) -> Outputs:
    """Runs a network of `keras_model` in float32, the only type in which Keras normalises."""
    ends = ["expanded_conv_project_BN", *(f"block_{i}_add" for i in (2, 5, 9, 12, 15))]
    ends += ["block_16_project_BN", "out_relu"]
    outputs = [model.get_layer(end).output for end in ends]
    has_classifier = len(model.output.shape) == 2
    outputs += [model.output] if has_classifier else []
    values = peers.keras().Model(model.input, outputs)(x.astype(np.float32), training=False)
    arrays = [value.detach().numpy().astype(np.float64) for value in values]
    return Outputs(arrays[: len(ends)], arrays[-1] if has_classifier else None)


@pytest.mark.parametrize(
    ("width", "size", "file"),
    [
        (*case, file)
        for case, file in zip(TENSORFLOW, ("m.weights.h5", "m.keras", "m.h5"), strict=True)
    ],
)
def test_keras(width, size, file, tmp_path):
    model = keras_model(width, size, 4, classes=CLASSES, classifier_activation=None)
    if file == "m.weights.h5":
        model.save_weights(tmp_path / file)
    else:
        model.save(tmp_path / file)
    saved = convert(tmp_path / file, "keras", width)
    assert_same(of_converted(saved, images(size)), of_keras(model, images(size)), KERAS_TOLERANCE)


def test_keras_without_top(tmp_path):
    model = keras_model(0.35, SIZE, 5, include_top=False)
    model.save_weights(tmp_path / "m.weights.h5")
    saved = convert(tmp_path / "m.weights.h5", "keras", 0.35)
    assert saved.features_only
    assert_same(of_converted(saved, images()), of_keras(model, images()), KERAS_TOLERANCE)


def transformers(
    width: float, kind: str = "MobileNetV2ForImageClassification", **fields: Any
) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    module = peers.transformers()
    config = module.MobileNetV2Config(depth_multiplier=width, **fields)
    model = getattr(module, kind)(config)
    peers.randomize(model, seed=6)
    base = getattr(model, "mobilenet_v2", model)
    return model, [base.conv_stem, *(base.layer[i] for i in (1, 4, 8, 11, 14, 15)), base.conv_1x1]


@pytest.mark.parametrize(("width", "size"), TENSORFLOW)
def test_transformers(width, size, tmp_path):
    model, ends = transformers(width, num_labels=CLASSES)
    model.save_pretrained(tmp_path)
    saved = convert(tmp_path / "model.safetensors", "transformers", width)
    assert_same(of_converted(saved, images(size)), of_torch(model, ends, images(size)))


def test_transformers_config(tmp_path):
    """config.json has the padding, the epsilon, the output stride and the class names."""
    labels = {i: f"class {i}" for i in range(CLASSES)}
    model, ends = transformers(
        0.35,
        id2label=labels,
        tf_padding=False,
        layer_norm_eps=1e-5,
        image_size=SIZE,
        output_stride=16,
    )
    model.save_pretrained(tmp_path)
    saved = convert(tmp_path / "model.safetensors", "transformers", 0.35)
    assert saved.classes == tuple(labels.values())
    assert saved.spec.preprocessing.image_size == SIZE
    assert_same(of_converted(saved, images()), of_torch(model, ends, images()))


def test_transformers_background_class(tmp_path):
    """Google's weights have 1001 classes, the first of which is the background."""
    model, ends = transformers(0.35, num_labels=1001)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    kept = convert(tmp_path / "pytorch_model.bin", "transformers", 0.35)
    dropped = convert(tmp_path / "pytorch_model.bin", "transformers", 0.35, drop_background=True)
    expected = of_torch(model, ends, images())
    assert expected.logits is not None and expected.logits.shape == (2, 1001)
    assert_same(of_converted(kept, images()), expected)
    # Dropping the class changes nothing else.
    for kept_layer in kept.params.keys() - {"classifier"}:
        jax.tree.map(
            np.testing.assert_array_equal, dropped.params[kept_layer], kept.params[kept_layer]
        )
    pooled = expected.maps[-1].mean((1, 2))
    head = dropped.params["classifier"]
    logits = pooled @ head["kernel"].astype(np.float64) + head["bias"]
    assert abs(logits - expected.logits[:, 1:]).max() <= TOLERANCE * abs(expected.logits).max()
    assert kept.classes[0] == "background"
    assert kept.classes[1:] == dropped.classes
    assert dropped.classes[0].startswith("tench")


def test_transformers_backbone_alone(tmp_path):
    model, ends = transformers(0.35, "MobileNetV2Model")
    model.save_pretrained(tmp_path)
    saved = convert(tmp_path / "model.safetensors", "transformers", 0.35)
    assert saved.features_only
    assert_same(of_converted(saved, images()), of_torch(model, ends, images()))
