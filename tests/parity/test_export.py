"""Models written for other frameworks give the same logits there.

The model's arrays come from a torchvision network, not through the converter, and that network is
what the others are compared with.
"""

import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from flax.traverse_util import flatten_dict

from mbv2_jax import command_line, model_dir
from mbv2_jax.convert import __main__ as convert
from mbv2_jax.convert.layouts import OF_TASK, TARGETS
from mbv2_jax.model_json import Description
from mbv2_jax.spec import Backbone
from mbv2_jax.tasks.classification.settings import Head
from tests.support import REPOSITORY, peers, tiny_model

CLASSES = ("cat", "dog", "eel", "fox", "gnu")
# Two torch networks with the same numbers, in float64, may sum them in another order.
TOLERANCE = 1e-12


def network(width: float) -> torch.nn.Module:
    model = peers.torchvision().models.mobilenet_v2(width_mult=width, num_classes=len(CLASSES))
    peers.randomize(model, seed=0)
    return model.eval()


# The conventions of transformers, which pads as TensorFlow does.
TENSORFLOW = {"padding": "same", "bn_epsilon": 1e-3}


def write(folder: pathlib.Path, width: float, **conventions: Any) -> pathlib.Path:
    """Writes `network(width)` as a model directory."""
    model = network(width)
    spec = dataclasses.replace(
        tiny_model.SPEC, backbone=Backbone(width, **conventions), head=Head(len(CLASSES))
    )
    arrays = peers.parameters(model), peers.statistics(model)
    model_dir.write(folder / "model", *arrays, Description(spec, CLASSES))
    return folder / "model"


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., dict[str, str]]:
    """Runs the command in this process; returns its output by the names in the first column."""

    def run(*arguments: object) -> dict[str, str]:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command_line.run(convert.main)
        out, err = capsys.readouterr()
        assert stopped.value.code == 0, err
        return {name: text.strip() for name, text in map(_columns, out.splitlines())}

    def _columns(line: str) -> tuple[str, str]:
        name, _, text = line.partition("   ")
        return name, text

    return run


def logits(model: torch.nn.Module, **options: Any) -> np.ndarray:
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3))
    with torch.no_grad():
        y = model.double().eval()(peers.nchw(images), **options)
    return getattr(y, "logits", y).numpy()


def peer_of(target: str, width: float) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Returns an untrained network of the framework, and how to ask it for logits."""
    if target == "mmpretrain":
        head = {"num_classes": len(CLASSES), "in_channels": int(1280 * max(width, 1))}
        model = peers.mmpretrain().get_model(
            "mobilenet-v2_8xb32_in1k", backbone={"widen_factor": width}, head=head
        )
        return model, {"mode": "tensor"}
    if target == "timm":
        name = f"mobilenetv2_{width * 100:03.0f}"
        return peers.timm().create_model(name, num_classes=len(CLASSES)), {}
    module = peers.torchvision().models
    return module.mobilenet_v2(width_mult=width, num_classes=len(CLASSES)), {}


@pytest.mark.parametrize("width", [0.5, 1.4])
@pytest.mark.parametrize("target", ["mmpretrain", "torchvision", "timm"])
def test_the_same_logits_there(target, width, run, tmp_path):
    file = tmp_path / "model.pth"
    said = run(write(tmp_path, width), f"--to={target}", f"--output={file}")
    checkpoint = torch.load(file, weights_only=True)
    peer, options = peer_of(target, width)
    peer.load_state_dict(checkpoint.get("state_dict", checkpoint), strict=True)
    assert abs(logits(peer, **options) - logits(network(width).double())).max() < TOLERANCE

    # The same with the line of code that the command prints.
    model = loaded_as_said(said["load it with"])
    np.testing.assert_array_equal(logits(model, **options), logits(peer, **options))


def loaded_as_said(line: str) -> torch.nn.Module:
    names: dict[str, Any] = {"torch": torch, "safetensors": safetensors}
    for name in ("mmpretrain", "timm", "torchvision", "transformers"):
        names[name] = getattr(peers, name)()
    exec(line, names)
    return names["model"]


def test_the_same_logits_in_transformers(run, tmp_path):
    """transformers pads as TensorFlow does: the comparison is with its own network."""
    folder = write(tmp_path, 0.5, **TENSORFLOW)
    said = run(folder, "--to=transformers", f"--output={tmp_path / 'model.safetensors'}")
    transformers = peers.transformers()
    # The arrays are those of the torchvision network; only the conventions differ.
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.5, num_labels=len(CLASSES), tf_padding=False, layer_norm_eps=1e-5
    )
    peer = transformers.MobileNetV2ForImageClassification(config)
    peer.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=True)
    assert abs(logits(peer) - logits(network(0.5))).max() < TOLERANCE

    model = loaded_as_said(said["load it with"])
    for ours, theirs in zip(model.parameters(), network(0.5).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def bits(folder: pathlib.Path) -> dict[str, bytes]:
    trees = model_dir.read(folder).variables()
    return {name: leaf.tobytes() for name, leaf in flatten_dict(trees, sep="/").items()}


TO_BOTH_FILES = {"torchvision": "m.safetensors", "safetensors": "m.safetensors"}


OF_CLASSIFIERS = [to for to, layout in TARGETS.items() if layout in OF_TASK["classification"]]


@pytest.mark.parametrize("target", OF_CLASSIFIERS)
def test_in_again_bit_for_bit(target, run, tmp_path):
    width = 1.0 if target == "tonylins" else 0.35  # tonylins has no such width
    folder = write(tmp_path, width, **(TENSORFLOW if target == "transformers" else {}))
    file = tmp_path / TO_BOTH_FILES.get(target, "m.pth")
    assert len(bits(folder)) == 52 * 5 + 2  # arrays: none is missing
    run(folder, f"--to={target}", f"--output={file}")
    run(file, f"--output={tmp_path / 'again'}")
    assert bits(tmp_path / "again") == bits(folder)


def test_the_real_command_writes_the_same_file(run, tmp_path):
    folder = write(tmp_path, 0.35)
    run(folder, "--to=mmpretrain", f"--output={tmp_path / 'here.pth'}")
    arguments = [str(folder), "--to=mmpretrain", f"--output={tmp_path / 'there.pth'}"]
    command = [sys.executable, "-m", "convert", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here, there = (torch.load(tmp_path / name) for name in ("here.pth", "there.pth"))
    assert here["state_dict"].keys() == there["state_dict"].keys()
    for name, array in here["state_dict"].items():
        assert torch.equal(array, there["state_dict"][name])
