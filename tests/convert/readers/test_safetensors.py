"""Safetensors files are read as they are."""

import safetensors.torch
import torch

from mbv2_jax.convert import readers
from tests.support.weight_files import assert_is, refusal


def test_safetensors(net, tmp_path):
    weights = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    weights |= {"half": torch.ones(2).half() / 3, "bfloat16": torch.arange(6).bfloat16() / 7}
    safetensors.torch.save_file(weights, tmp_path / "net.pth", {"format": "pt", "by": "me"})
    file = readers.read(tmp_path / "net.pth")  # the content decides, not the name
    assert (file.container, file.contents.metadata) == ("safetensors", {"format": "pt", "by": "me"})
    expected = dict(net.state_dict())
    expected |= {name: weights[name].float() for name in ("half", "bfloat16")}
    assert_is(file.tensors, {name: expected[name] for name in file.tensors})
    assert len(file.tensors) == len(expected)


def test_safetensors_without_metadata(net, tmp_path):
    safetensors.torch.save_file(net.state_dict(), tmp_path / "a.safetensors")
    assert readers.read(tmp_path / "a.safetensors").contents.metadata == {}


def test_safetensors_that_are_no_plain_weights(net, tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    assert "w is F8_E4M3" in refusal(path)
    safetensors.torch.save_file(net.state_dict(), path)
    assert "one set of weights" in refusal(path, ema=True)
    path.write_bytes(path.read_bytes()[:-4])
    assert "damaged or cut off" in refusal(path)
