"""Faults that the readers have in common."""

import contextlib

import pytest
import safetensors.torch
import torch

from mbv2_jax.convert import readers
from mbv2_jax.errors import UserError
from tests.support.weight_files import flipped, refusal


def test_numbers_that_are_not_finite_are_named(net, tmp_path):
    weights = net.state_dict()
    weights["1.weight"][2] = torch.nan
    weights["0.weight"][1, 2, :2, 1] = torch.inf
    for path, save in (
        (tmp_path / "net.pth", torch.save),
        (tmp_path / "net.safetensors", safetensors.torch.save_file),
    ):
        save(weights, path)
        line = refusal(path)
        assert "0.weight has 2 of 108" in line
        assert "1.weight has 1 of 4" in line
        assert "running" not in line


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path):
    torch.save({"\x1b[2J\n": torch.tensor(torch.nan)}, tmp_path / "a.pth")
    assert r"\x1b[2J\n" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_flipped_bit_is_never_a_traceback(suffix, net, tmp_path):
    """torch's legacy serialisation and safetensors have no checksums: numbers may differ."""
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        safetensors.torch.save_file(net.state_dict(), path)
    read = 0
    for content in flipped(path.read_bytes(), tries=300):
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            read += len(readers.read(path).tensors) > 0
    assert 0 < read < 300
