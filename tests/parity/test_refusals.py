"""Files with another network, or with faults, are refused in one line, and nothing is written.

The files are those of the real peers, some with an array removed, added or cut.
"""

import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mbv2_jax import command_line
from mbv2_jax.convert import __main__ as convert
from tests.support import REPOSITORY, peers

Weights = dict[str, Any]

# Keras itself warns, on the torch backend.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras")


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Converts a file; returns the one line with which the command refuses it."""

    def refusal(file: pathlib.Path) -> str:
        output = tmp_path / "output" / "model"
        arguments = ["convert", str(file), f"--output={output}"]
        monkeypatch.setattr(sys, "argv", arguments)
        capsys.readouterr()  # the peer prints while it saves
        with pytest.raises(SystemExit) as stopped:
            command_line.run(convert.main)
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (2, "")
        assert not output.parent.exists()
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert str(file.parent) in err  # the file, or one beside it
        return err

    return refusal


# A file of each container, and how to change its arrays.


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Writes a good file of each of torchvision, transformers and Keras."""
    folder = tmp_path_factory.mktemp("good")
    model = peers.torchvision().models.mobilenet_v2(width_mult=0.35, num_classes=7)
    torch.save(model.state_dict(), folder / "model.pth")
    transformers = peers.transformers()
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, num_labels=7)
    transformers.MobileNetV2ForImageClassification(config).save_pretrained(folder)
    model = peers.keras().applications.MobileNetV2(alpha=0.35, classes=7, weights=None)
    model.save_weights(folder / "model.weights.h5")
    return {path.suffix: path for path in folder.iterdir() if path.suffix != ".json"}


def alter(good: pathlib.Path, bad: pathlib.Path, change: Callable[[Weights], object]) -> None:
    """Writes `good` to `bad` with its arrays changed."""
    if good.suffix == ".pth":
        weights = torch.load(good)
        change(weights)
        torch.save({name: torch.as_tensor(value) for name, value in weights.items()}, bad)
    elif good.suffix == ".safetensors":
        weights = load_file(good)
        change(weights)
        save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, bad)
    else:
        shutil.copy(good, bad)
        with h5py.File(bad, "r+") as file:
            change(_Arrays(file["layers"]))


class _Arrays(dict):
    """The arrays of a .weights.h5 file, as a dict by the layer's name and the array's number."""

    def __init__(self, layers: h5py.Group):
        self.layers = layers
        self.groups = {g["vars"].attrs["name"]: g["vars"] for g in layers.values() if g["vars"]}

    def __getitem__(self, name: str) -> np.ndarray:
        layer, number = name.split("/")
        return self.groups[layer][number][()]

    def __delitem__(self, name: str) -> None:
        layer, number = name.split("/")
        del self.groups[layer][number]

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        layer, number = name.split("/")
        if layer not in self.groups:
            self.groups[layer] = self.layers.create_group(f"{layer}/vars")
            self.groups[layer].attrs["name"] = layer
        elif number in self.groups[layer]:
            del self[name]
        self.groups[layer][number] = value


# Container -> the arrays to remove, to add and to cut, and their names in the message.
ARRAYS = {
    ".pth": {
        "missing": ("features.3.conv.1.1.running_var",) * 2,
        "extra": ("features.19.weight",) * 2,
        "cut": ("features.9.conv.2.weight",) * 2,
    },
    ".safetensors": {
        "missing": ("mobilenet_v2.layer.1.conv_3x3.normalization.running_var",) * 2,
        "extra": ("mobilenet_v2.layer.16.expand_1x1.convolution.weight",) * 2,
        "cut": ("mobilenet_v2.layer.7.reduce_1x1.convolution.weight",) * 2,
    },
    ".h5": {
        "missing": ("block_2_depthwise_BN/3", "block_2_depthwise_BN"),
        "extra": ("block_17_expand/0", "block_17_expand"),
        "cut": ("block_8_project/0", "block_8_project/kernel"),
    },
}
CHANGES: dict[str, Callable[[Weights, str], None]] = {
    "missing": lambda weights, name: weights.__delitem__(name),
    "extra": lambda weights, name: weights.__setitem__(name, np.zeros(3, np.float32)),
    "cut": lambda weights, name: weights.__setitem__(name, weights[name][:, :-1]),
}


@pytest.mark.parametrize("faults", [["missing"], ["extra"], ["cut"], [*CHANGES]], ids="+".join)
@pytest.mark.parametrize("suffix", ARRAYS)
def test_faulty_arrays_are_all_named(suffix, faults, files, refusal, tmp_path):
    def change(weights: Weights) -> None:
        for fault in faults:
            CHANGES[fault](weights, ARRAYS[suffix][fault][0])

    bad = tmp_path / files[suffix].name
    alter(files[suffix], bad, change)
    line = refusal(bad)
    for fault, (_, name) in ARRAYS[suffix].items():
        assert (name in line) == (fault in faults), line


def test_the_shapes_are_named(files, refusal, tmp_path):
    def change(weights: Weights) -> None:
        CHANGES["cut"](weights, "features.9.conv.2.weight")

    alter(files[".pth"], tmp_path / "bad.pth", change)
    # layer4 has 24 channels, 64 times 0.35, which the expansion multiplies by 6.
    assert "features.9.conv.2.weight is float32 (24, 143, 1, 1), not (24, 144, 1, 1)" in refusal(
        tmp_path / "bad.pth"
    )


def test_the_command_refuses_in_one_line(files, tmp_path):
    alter(files[".pth"], tmp_path / "bad.pth", lambda weights: weights.pop("features.18.1.bias"))
    done = subprocess.run(
        [sys.executable, "-m", "convert", tmp_path / "bad.pth", f"--output={tmp_path / 'm'}"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "missing: features.18.1.bias" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


# Other networks: name -> how to write the file, and pieces of the message.


def _torchvision(name: str, **options: Any) -> Callable[[pathlib.Path], pathlib.Path]:
    def write(folder: pathlib.Path) -> pathlib.Path:
        model = getattr(peers.torchvision().models, name)(**options)
        torch.save(model.state_dict(), folder / "model.pth")
        return folder / "model.pth"

    return write


def _timm(name: str) -> Callable[[pathlib.Path], pathlib.Path]:
    def write(folder: pathlib.Path) -> pathlib.Path:
        peers.timm().models.save_for_hf(
            peers.timm().create_model(name), folder, safe_serialization=True
        )
        return folder / "model.safetensors"

    return write


def _mmpretrain(**backbone: Any) -> Callable[[pathlib.Path], pathlib.Path]:
    def write(folder: pathlib.Path) -> pathlib.Path:
        model = peers.mmpretrain().models.ImageClassifier(backbone=backbone)
        torch.save({"state_dict": model.state_dict()}, folder / "epoch_1.pth")
        return folder / "epoch_1.pth"

    return write


def _transformers(kind: str, **fields: Any) -> Callable[[pathlib.Path], pathlib.Path]:
    def write(folder: pathlib.Path) -> pathlib.Path:
        transformers = peers.transformers()
        model = getattr(transformers, kind)(transformers.MobileNetV2Config(**fields))
        model.save_pretrained(folder)
        return folder / "model.safetensors"

    return write


def _keras(name: str, suffix: str) -> Callable[[pathlib.Path], pathlib.Path]:
    def write(folder: pathlib.Path) -> pathlib.Path:
        keras = peers.keras()
        if name == "Sequential":
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")])
        else:
            model = getattr(keras.applications, name)(weights=None, include_top=False)
        model.save(folder / f"model{suffix}")
        return folder / f"model{suffix}"

    return write


NOT_OURS = "not those of a MobileNetV2"
OTHERS: dict[str, tuple[Callable[[pathlib.Path], pathlib.Path], list[str]]] = {
    "torchvision resnet18": (_torchvision("resnet18"), [NOT_OURS, "bn1.bias"]),
    "torchvision mobilenet_v3": (
        _torchvision("mobilenet_v3_small"),
        [NOT_OURS, "classifier.0.bias"],
    ),
    "timm mnasnet": (
        _timm("mnasnet_050"),
        ["missing: blocks.4.2", "blocks.0.0.bn2.weight is float32 (8,)"],
    ),
    "mmpretrain ResNet": (_mmpretrain(type="ResNet", depth=18), [NOT_OURS, "backbone.bn1.bias"]),
    "mmpretrain width 1.33": (
        _mmpretrain(type="MobileNetV2", widen_factor=1.33),
        # int(1280 * 1.33) channels, where every other port has a multiple of 8
        ["backbone.conv2.bn.bias", "(1702,)", "(1704,)"],
    ),
    "transformers, coarse": (
        _transformers(
            "MobileNetV2ForImageClassification", depth_multiplier=0.5, finegrained_output=False
        ),
        ["mobilenet_v2.conv_1x1.convolution.weight", "(640, 160, 1, 1)", "(1280, 160, 1, 1)"],
    ),
    "transformers, expanded stem": (
        _transformers("MobileNetV2ForImageClassification", first_layer_is_expansion=False),
        ["mobilenet_v2.conv_stem.expand_1x1"],
    ),
    "transformers, output stride 4": (
        _transformers("MobileNetV2ForSemanticSegmentation", output_stride=4),
        ["output_stride is 4; the network here has 32 or 16 or 8"],
    ),
    "keras MobileNet": (_keras("MobileNet", ".keras"), [NOT_OURS, "conv1/kernel"]),
    "keras Sequential": (_keras("Sequential", ".h5"), [NOT_OURS, "dense/kernel"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(name, refusal, tmp_path):
    write, pieces = OTHERS[name]
    line = refusal(write(tmp_path))
    for piece in pieces:
        assert piece in line, line
