"""Safetensors files are read as they are."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, save_file

from mbv2_jax.convert import readers
from tests.support.weight_files import refusal


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    """Returns the arrays of a convolution and a normalisation."""
    draw = np.random.default_rng(0).standard_normal
    return {
        "0.weight": draw((4, 3, 3, 3)).astype(np.float32),
        "1.weight": draw(4).astype(np.float32),
        "1.running_var": draw(4).astype(np.float32) ** 2,
        "1.num_batches_tracked": np.array(7),
    }


def test_safetensors(weights, tmp_path):
    half = np.full(2, 1 / 3, np.float16)
    bfloat16 = (np.arange(6) / 7).astype(ml_dtypes.bfloat16)
    saved = {f"module.{name}": array for name, array in weights.items()}
    saved |= {"half": half, "bfloat16": bfloat16}
    save_file(saved, tmp_path / "net.pth", {"format": "pt", "by": "me"})
    file = readers.read(tmp_path / "net.pth")  # the content decides, not the name
    assert (file.container, file.contents.metadata) == ("safetensors", {"format": "pt", "by": "me"})
    expected = weights | {"half": half.astype("f"), "bfloat16": bfloat16.astype("f")}
    assert set(file.tensors) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(file.tensors[name], array, err_msg=name, strict=True)


def test_safetensors_without_metadata(weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    assert readers.read(tmp_path / "a.safetensors").contents.metadata == {}
    # The library reads this, too.
    header = json.dumps(
        {"__metadata__": None, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    )
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    (tmp_path / "b.safetensors").write_bytes(content)
    assert load(content).keys() == {"a"}
    assert readers.read(tmp_path / "b.safetensors").contents.metadata == {}


def test_safetensors_that_are_no_plain_weights(weights, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": np.ones(2, ml_dtypes.float8_e4m3fn)}, path)
    assert "w is F8_E4M3" in refusal(path)
    save_file(weights, path)
    assert "one set of weights" in refusal(path, ema=True)
    path.write_bytes(path.read_bytes()[:-4])
    assert "damaged or cut off" in refusal(path)
