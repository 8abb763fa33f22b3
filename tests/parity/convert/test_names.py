"""Weights under the names that people's own programs give them, and their heads.

The networks are torchvision's inside other modules, as transfer learning builds them; the converted
ones give the same logits and feature maps in float64.
"""

import collections
import copy
import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import nn

from mbv2_jax import model_dir
from mbv2_jax.convert import importer
from mbv2_jax.errors import UserError
from tests.support import peers
from tests.support.convert_command import make_run, refused
from tests.support.outputs import assert_same, images, of_converted, of_torch

WIDTH = 0.35


def network(**options: Any) -> nn.Module:
    return peers.torchvision().models.mobilenet_v2(width_mult=WIDTH, **options)


def ends(features: Any) -> list[nn.Module]:
    return [features[i] for i in (1, 3, 6, 10, 13, 16, 17, 18)]


def randomized(model: nn.Module) -> nn.Module:
    peers.randomize(model, seed=7)
    return model


class Transfer(nn.Module):
    """The usual module of transfer learning: an encoder, pooling, and a head under some name."""

    def __init__(self, encoder: str, name: str, head: nn.Module):
        super().__init__()
        self.add_module(encoder, network().features)
        self.add_module(name, head)
        self.names = (encoder, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encoder, head = (getattr(self, name) for name in self.names)
        return head(encoder(x).mean((2, 3)))


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "backbone.", "encoder.", "model.model.", "student.net.mobilenet."]
)
def test_a_prefix_is_found_and_told(prefix, tmp_path):
    model = randomized(network(num_classes=5))
    torch.save({prefix + n: value for n, value in model.state_dict().items()}, tmp_path / "a.pth")
    torch.save(model.state_dict(), tmp_path / "b.pth")
    found, plain = (importer.load(tmp_path / name) for name in ("a.pth", "b.pth"))
    jax.tree.map(np.testing.assert_array_equal, found.saved.variables(), plain.saved.variables())
    assert f"begin with '{prefix}features.'" in found.summary["layout"]
    assert "begin with" not in plain.summary["layout"]


def test_lightnings_checkpoint(tmp_path):
    """Its Trainer writes such a file; `model` is the module's attribute."""
    model = randomized(network(num_classes=5))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()}
        | {"criterion.weight": torch.ones(5)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": 0.1}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "device": torch.device("cpu")},
    }
    torch.save(checkpoint, tmp_path / "epoch=3.ckpt")
    imported = importer.load(tmp_path / "epoch=3.ckpt")
    assert "the loss's weights" in imported.summary["arrays"]
    expected = of_torch(model, ends(model.features), images())
    assert_same(of_converted(imported.saved, images()), expected)


@pytest.mark.parametrize("how", ["whole", "state"])
@pytest.mark.parametrize(
    ("encoder", "name", "head"),
    [
        ("features", "fc", nn.Linear(1280, 5)),
        ("backbone", "head", nn.Sequential(nn.Dropout(0.3), nn.Linear(1280, 5))),
        ("encoder", "linear", nn.Linear(1280, 5, bias=False)),
        ("0", "2", nn.Sequential(nn.Linear(1280, 16), nn.ReLU(), nn.Linear(16, 5))),
        (
            "body",
            "classifier",
            nn.Sequential(
                nn.Linear(1280, 32),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(32, 16),
                nn.ReLU(),
                nn.Linear(16, 5),
            ),
        ),
    ],
    ids=["fc", "head", "no bias", "two layers", "three layers"],
)
def test_heads(encoder, name, head, how, tmp_path):
    model = randomized(Transfer(encoder, name, copy.deepcopy(head)))  # other tests take it, too
    torch.save(model if how == "whole" else model.state_dict(), tmp_path / "net.pth")
    imported = importer.load(tmp_path / "net.pth")
    widths = [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)]
    assert imported.saved.spec.head.hidden == tuple(widths[:-1])
    assumed = any("ReLU is assumed" in line for line in imported.warnings)
    assert assumed == (how == "state" and len(widths) > 1)
    assert any("has no bias" in line for line in imported.warnings) == (name == "linear")
    expected = of_torch(model, ends(getattr(model, encoder)), images())
    assert_same(of_converted(imported.saved, images()), expected)


@pytest.mark.parametrize(
    ("names", "sizes", "several"),
    [
        (("z", "a"), (1280, 5), False),
        (("z", "y", "a"), (512, 1280, 5), False),
        (("dense1", "dense2", "a"), (1280, 1280, 5), True),
        (("dense9", "dense10", "classifier"), (1280, 1280, 1280), True),
    ],
)
def test_the_order_of_dense_layers(names, sizes, several, tmp_path):
    """Their sizes tell it, whatever the order of the names; if they cannot, a warning says so."""
    layers: dict[str, nn.Module] = {}
    inputs = 1280
    for name, outputs in zip(names, sizes, strict=True):
        layers |= {name: nn.Linear(inputs, outputs), f"{name}_activation": nn.ReLU()}
        inputs = outputs
    layers.popitem()
    model = randomized(Transfer("features", "head", nn.Sequential(collections.OrderedDict(layers))))
    torch.save(model.state_dict(), tmp_path / "net.pth")
    imported = importer.load(tmp_path / "net.pth")
    assert any("in several orders" in line for line in imported.warnings) == several
    expected = of_torch(model, ends(model.features), images())
    assert_same(of_converted(imported.saved, images()), expected)


def test_a_classifier_put_in_the_place_of_torchvisions(tmp_path):
    model = network()
    model.classifier = nn.Linear(model.last_channel, 5)
    randomized(model)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    saved = importer.load(tmp_path / "net.pth").saved
    assert_same(of_converted(saved, images()), of_torch(model, ends(model.features), images()))


def test_one_output_becomes_two_classes(tmp_path):
    model = randomized(Transfer("features", "fc", nn.Linear(1280, 1)))
    torch.save(model.state_dict(), tmp_path / "net.pth")
    imported = importer.load(tmp_path / "net.pth")
    assert any("became two classes" in line for line in imported.warnings)
    logits = of_torch(model, ends(model.features), images()).logits
    got = of_converted(imported.saved, images()).logits
    assert got is not None and logits is not None and got.shape == (2, 2)
    assert (got[:, 0] == 0).all()
    np.testing.assert_allclose(got[:, 1:], logits, rtol=1e-11)


# Heads that no network here has


def attention() -> nn.Module:
    return nn.ModuleDict({"attention": nn.MultiheadAttention(1280, 4), "fc": nn.Linear(1280, 5)})


REFUSED = {
    "batch normalisation": (
        nn.Sequential(nn.Linear(1280, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)),
        "head.1.running_mean",
    ),
    "attention": (attention(), "head.attention.in_proj_weight"),
    "flattened": (
        nn.Linear(1280 * 49, 5),
        "head takes 62,720 numbers, and the backbone gives 1,280",
    ),
    "side by side": (
        nn.ModuleDict({"age": nn.Linear(1280, 3), "sex": nn.Linear(1280, 2)}),
        "head.sex takes 1,280 numbers, and head.age gives 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_heads_are_refused_with_a_remedy_that_works(name, tmp_path, monkeypatch, capsys):
    run = make_run(monkeypatch, capsys)
    head, named = REFUSED[name]
    model = randomized(Transfer("features", "head", head))
    torch.save(model.state_dict(), tmp_path / "net.pth")
    line = refused(run(tmp_path / "net.pth", f"--output={tmp_path / 'm'}"))
    assert named in line
    assert "--features-only converts the backbone alone" in line
    code, out, _ = run(tmp_path / "net.pth", f"--output={tmp_path / 'm'}", "--features-only")
    assert code == 0
    for array in head.state_dict():
        if "num_batches_tracked" not in array:
            assert f"head.{array}" in out
    saved = model_dir.read(tmp_path / "m")
    assert saved.features_only
    model.forward = model.features.forward
    expected = of_torch(model, ends(model.features), images())
    assert_same(of_converted(saved, images()), dataclasses.replace(expected, logits=None))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), nn.ReLU6()])
def test_unknown_activations_of_a_whole_model_are_refused(activation, tmp_path):
    head = nn.Sequential(nn.Linear(1280, 16), activation, nn.Linear(16, 5))
    torch.save(Transfer("features", "head", head), tmp_path / "net.pth")
    with pytest.raises(UserError, match=rf"{type(activation).__name__} \(head.1\)"):
        importer.load(tmp_path / "net.pth")


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (nn.Sequential(nn.LayerNorm(1280, elementwise_affine=False), nn.Linear(1280, 5)), "head.0"),
        (nn.Sequential(nn.AdaptiveMaxPool1d(1280), nn.Linear(1280, 5)), "head.0"),
        (nn.Sequential(nn.Linear(1280, 5), nn.ReLU(), nn.Softmax(dim=1)), "head.2"),
    ],
    ids=["norm", "pooling", "two activations"],
)
def test_modules_without_arrays_that_no_head_here_has_are_refused(head, named, tmp_path):
    torch.save(Transfer("features", "head", head), tmp_path / "net.pth")
    with pytest.raises(UserError, match=rf"classifier of dense layers: \w+ \({named}\)"):
        importer.load(tmp_path / "net.pth")


def test_a_head_that_ends_in_the_logarithm_of_softmax(tmp_path):
    """Its own output is that of softmax of the converted network's logits."""
    head = nn.Sequential(nn.Linear(1280, 16), nn.ReLU(), nn.Linear(16, 5), nn.LogSoftmax(dim=1))
    model = randomized(Transfer("features", "head", head))
    torch.save(nn.DataParallel(model), tmp_path / "net.pth")
    imported = importer.load(tmp_path / "net.pth")
    assert not any("ReLU is assumed" in line for line in imported.warnings)
    expected = of_torch(model, ends(model.features), images()).logits
    logits = of_converted(imported.saved, images()).logits
    assert expected is not None and logits is not None
    got = torch.tensor(logits).log_softmax(1)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)  # some are nearly 0


class Functional(nn.Module):
    """A head whose activation is in its code, which no file shows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1280, 16)
        self.fc2 = nn.Linear(16, 5)
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def test_what_the_code_of_a_whole_model_decides_is_assumed(tmp_path):
    model = randomized(Transfer("features", "head", Functional()))
    torch.save(model, tmp_path / "net.pth")
    imported = importer.load(tmp_path / "net.pth")
    assert any("ReLU is assumed" in line for line in imported.warnings)
    assert_same(
        of_converted(imported.saved, images()), of_torch(model, ends(model.features), images())
    )


def test_a_head_that_a_module_defines_before_its_backbone(tmp_path):
    model = randomized(Transfer("features", "head", nn.Linear(1280, 5)))
    modules = model._modules
    modules["features"] = modules.pop("features")
    assert list(modules) == ["head", "features"]
    torch.save(model, tmp_path / "net.pth")
    saved = importer.load(tmp_path / "net.pth").saved
    assert_same(of_converted(saved, images()), of_torch(model, ends(model.features), images()))


def test_dense_layers_without_an_activation_between_them_are_refused(tmp_path):
    head = nn.Sequential(nn.Linear(1280, 16), nn.Linear(16, 5))
    torch.save(Transfer("features", "head", head), tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"the activation of head\.0 is linear, not relu"):
        importer.load(tmp_path / "net.pth")


# Several networks in a file


def test_a_module_of_two_names_is_one_network(tmp_path):
    model = randomized(network(num_classes=5))
    both = nn.ModuleDict({"model": model, "body": model.features})
    torch.save(both.state_dict(), tmp_path / "net.pth")
    saved = importer.load(tmp_path / "net.pth").saved
    assert_same(of_converted(saved, images()), of_torch(model, ends(model.features), images()))


def test_networks_of_two_layouts_are_refused_with_a_remedy_that_works(tmp_path):
    peers.torchvision()  # timm imports it
    import timm

    other = randomized(timm.create_model("mobilenetv2_035", num_classes=5))
    both = nn.ModuleDict({"student": network(), "teacher": other})
    torch.save(both.state_dict(), tmp_path / "net.pth")
    torch.save(other.state_dict(), tmp_path / "timm.pth")
    for flag in (False, True):
        with pytest.raises(
            UserError, match=r"'torchvision' behind .*'timm' behind .*--layout=timm"
        ):
            importer.load(tmp_path / "net.pth", features_only=flag)
    got = importer.load(tmp_path / "net.pth", layout="timm", features_only=True)
    expected = importer.load(tmp_path / "timm.pth", features_only=True)
    jax.tree.map(np.testing.assert_array_equal, got.saved.variables(), expected.saved.variables())


def test_two_networks_are_refused(tmp_path):
    both = nn.ModuleDict({"student": network(), "teacher": network()})
    torch.save(both.state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"several networks.*'student\.features\.'"):
        importer.load(tmp_path / "net.pth")
